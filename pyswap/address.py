"""Where a pool listens, and how two ends prove to each other that they know its secret.

A pool's address goes into the pickles of its arrays, the environment of child processes and the
user's registry.  Whoever reads one can attach to the pool only if it is of the same user as well:
both ends ask the kernel for the other's uid.  The proofs are what a stranger who binds the
name before us, or listens in its place, cannot give.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import socket
import struct
import time
from pathlib import Path
from typing import Any, NamedTuple

from . import config
from .errors import Error, PoolClosedError

__all__ = ["Address", "connect_to", "is_gone", "listen", "open_line_to", "peer_uid", "proof"]

SECRET_BYTES = 16
CLIENT, SERVER = "client", "server"
"""Who proves: one end's proof sent back is none of the other's."""


class Address(NamedTuple):
    """All that a process needs to find a pool, and to be let in."""

    pool: str
    socket: str
    secret: str
    host: str
    machine: str
    network: int


def listen(pool: str) -> tuple[socket.socket, Address]:
    """Bind the abstract socket of a new pool; the name is random, so nobody has it before us."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        name = f"pyswap.{pool[:64]}.{secrets.token_hex(8)}"
        sock.bind(f"\0{name}")
        sock.listen(config.ATTACH_PENDING)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    secret = secrets.token_hex(SECRET_BYTES)
    return sock, Address(pool, name, secret, socket.gethostname(), _machine(), _network())


def open_line_to(address: Address) -> socket.socket:
    """Connect to a pool's socket, whose other end is this user's; nothing is proven yet.

    Raises
    ------
    PoolClosedError
        If nobody listens there any more.
    PermissionError
        If the other end is another user's.
    Error
        If the pool is on another host or in another network namespace.
    """
    if address.machine != _machine():
        raise Error(
            f"pool {address.pool!r} is on host {address.host!r}, or was there before its last "
            f"start, and this is {socket.gethostname()!r}: arrays do not leave their machine"
        )
    if address.network != _network():
        raise Error(
            f"pool {address.pool!r} is in another network namespace, where its socket cannot be "
            "reached from here: use it from the same container, or share the host's network"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(config.ATTACH_WAIT_S)
        connect_to(sock, address)
        uid = peer_uid(sock)
        if uid != os.geteuid():
            raise PermissionError(
                errno.EPERM,
                f"pool {address.pool!r} is of uid {uid}, and this process of uid {os.geteuid()}: "
                "only processes of one user share a pool",
            )
    except ConnectionRefusedError:
        sock.close()
        raise PoolClosedError(
            f"pool {address.pool!r} is closed: it has ended, and its arrays with it"
        ) from None
    except (BlockingIOError, TimeoutError):
        sock.close()
        raise Error(f"pool {address.pool!r} lets nobody in: is its swapper stopped?") from None
    except BaseException:
        sock.close()
        raise
    return sock


def connect_to(sock: socket.socket, address: Address) -> None:
    """Connect, also where so many others do that the kernel says to come again."""
    deadline = time.monotonic() + config.ATTACH_WAIT_S
    while True:
        try:
            sock.connect(f"\0{address.socket}")
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(config.RETRY_S)


def peer_uid(sock: socket.socket) -> int:
    """Ask the kernel who is at the other end: who connected, or who called listen()."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def proof(secret: str, who: str, client_nonce: Any, server_nonce: Any) -> str:
    """Show that one knows the secret, by what both ends chose for this one time."""
    said = f"{who} {client_nonce} {server_nonce}".encode()
    return hmac.new(bytes.fromhex(secret), said, "sha256").hexdigest()


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _network() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def is_gone(address: Address) -> bool:
    """Whether nobody can listen there any more, which of another machine nobody here knows."""
    if address.host == socket.gethostname() and address.machine != _machine():
        return True
    if (address.machine, address.network) != (_machine(), _network()):
        return False
    end = f" @{address.socket}\n"
    return end not in Path("/proc/net/unix").read_text(errors="replace")

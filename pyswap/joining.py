"""How a process that no fork made comes into a pool: both ends prove themselves to each other."""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import threading
from pathlib import Path

from . import address as addresses
from . import protocol
from .address import Address
from .errors import Error, PoolClosedError
from .protocol import Message
from .settings import Settings
from .worker import Attachment, Joined, attachments

__all__ = ["attachment_for"]

_lock = threading.Lock()


def attachment_for(address: Address) -> Attachment:
    """Return this process's part in a pool, attached now where it has none.

    Raises
    ------
    PoolClosedError, PermissionError, Error
        If the pool cannot be attached to; the text tells why.
    """
    with _lock:
        for attachment in attachments():
            if attachment.address.socket == address.socket and not attachment.is_left():
                return attachment
        return _attach(address)


def _attach(address: Address) -> Attachment:
    sock = addresses.open_line_to(address)
    fds: list[int] = []
    try:
        nonce = secrets.token_hex(16)
        protocol.send(sock, {"op": "attach", "seq": 1, "nonce": nonce})
        greeting, fds = protocol.receive(sock)
        protocol.raise_reply(greeting)
        theirs = protocol.text_of(greeting, "nonce")
        wanted = addresses.proof(address.secret, addresses.SERVER, nonce, theirs)
        if not hmac.compare_digest(protocol.text_of(greeting, "proof").encode(), wanted.encode()):
            raise PermissionError(
                errno.EPERM, f"what listens for pool {address.pool!r} does not know its secret"
            )
        shown = addresses.proof(address.secret, addresses.CLIENT, nonce, theirs)
        protocol.send(sock, {"op": "attach", "seq": 2, "proof": shown})
        answer, fds = protocol.receive(sock)
        protocol.raise_reply(answer)
        settings = _settings(answer)
        control_fd, store_fd, channel_fd, *vault = fds
        if len(vault) != 2:
            raise Error(f"pool {address.pool!r} is of another version of pyswap")
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        sock.close()
        if isinstance(error, TimeoutError):
            raise Error(f"pool {address.pool!r} does not answer: is its swapper stopped?") from None
        if isinstance(error, ConnectionError):
            raise PoolClosedError(f"pool {address.pool!r} has just ended") from None
        raise
    return Attachment(settings, Joined(address, sock, channel_fd, control_fd, store_fd, vault))


def _settings(answer: Message) -> Settings:
    told = dict(answer["settings"])
    path = told.pop("swap_path")
    return Settings(**told, swap_path=None if path is None else Path(path))


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)

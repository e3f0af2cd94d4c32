"""Messages between a worker and its swapper: one JSON object a packet, descriptors beside it.

A request carries ``op`` and ``seq``; its reply carries the same ``seq``, and ``error`` and
``text`` where it failed. A reply to a request that was interrupted is recognised by its number and
thrown away.
"""

from __future__ import annotations

import json
import os
import socket
from array import array
from typing import Any

from . import config
from .errors import Error, GoneError, PoolClosedError, SwapFullError, SwapIOError

__all__ = ["Message", "pair", "raise_reply", "receive", "send"]

Message = dict[str, Any]

_EXCEPTIONS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Error, GoneError, PoolClosedError, SwapFullError, SwapIOError)
} | {"MemoryError": MemoryError, "ValueError": ValueError, "OSError": OSError}


def pair() -> tuple[socket.socket, socket.socket]:
    """Make two connected sockets that keep packets apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message and its descriptors."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > config.MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over {config.MESSAGE_BYTES}")
    socket.send_fds(sock, [data], fds)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """Receive one message and its descriptors.

    Raises
    ------
    ConnectionError
        At the end of the connection.
    ValueError
        If the packet is no message; its descriptors are closed.
    """
    fds = array("i")
    # Not socket.recv_fds(): it drops its flags, and these must be closed on exec from the start.
    data, ancillary, flags, _ = sock.recvmsg(
        config.MESSAGE_BYTES, socket.CMSG_LEN(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) // fds.itemsize * fds.itemsize])
    if not data:
        raise ConnectionError("the connection has ended")
    try:
        message = json.loads(data)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or not isinstance(message, dict):
            raise ValueError("no message")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, list(fds)


def failure(error: Exception) -> Message:
    """Make the part of a reply that tells of an exception."""
    for kind in type(error).__mro__:
        if kind.__name__ in _EXCEPTIONS:
            number = error.errno if isinstance(error, OSError) else None
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return {"error": kind.__name__, "text": text, "errno": number}
    return {"error": "Error", "text": f"{type(error).__name__}: {error}"}


def raise_reply(reply: Message) -> None:
    """Raise what a reply tells of, if anything."""
    if "error" not in reply:
        return
    kind = _EXCEPTIONS.get(reply["error"], Error)
    if issubclass(kind, OSError) and reply.get("errno") is not None:
        raise kind(reply["errno"], reply["text"])
    raise kind(reply["text"])

"""Messages between a worker and its swapper: one JSON object a packet, descriptors beside it.

A request carries ``op`` and ``seq``; its reply carries the same ``seq``, and ``error`` and
``text`` where it failed. A reply to a request that was interrupted is recognised by its number and
thrown away.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from array import array
from typing import Any

from . import config
from .errors import Error, GoneError, PoolClosedError, SwapFullError, SwapIOError

__all__ = [
    "LINE_BEGIN",
    "LINE_END",
    "LINE_LOOK",
    "LINE_MOVE",
    "LOOK_PAGES",
    "Message",
    "count_of",
    "counts_of",
    "failure",
    "pack_answer",
    "pair",
    "raise_reply",
    "receive",
    "receive_words",
    "send",
    "text_of",
]

Message = dict[str, Any]

MESSAGE_FDS = 6
"""Most descriptors of one message."""
TEXT_LENGTH = 1000
"""Most characters of an exception's text in a reply."""

_EXCEPTIONS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (Error, GoneError, PoolClosedError, SwapFullError, SwapIOError)
} | {"MemoryError": MemoryError, "ValueError": ValueError, "OSError": OSError}


def pair() -> tuple[socket.socket, socket.socket]:
    """Make two connected sockets that keep packets apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(
    sock: socket.socket, message: Message, fds: tuple[int, ...] = (), *, wait: bool = True
) -> None:
    """Send one message and its descriptors; BlockingIOError where it would wait and may not."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > config.MESSAGE_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is over {config.MESSAGE_BYTES}")
    # Not socket.send_fds() and recv_fds(): these take flags, and pass them on to nobody.
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
    sock.sendmsg([data], rights, 0 if wait else socket.MSG_DONTWAIT)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """Receive one message and its descriptors.

    Raises
    ------
    ConnectionError
        At the end of the connection.
    ValueError
        If the packet is no message; its descriptors are closed.
    """
    data, rights, flags, _ = sock.recvmsg(
        config.MESSAGE_BYTES, socket.CMSG_LEN(4 * MESSAGE_FDS), socket.MSG_CMSG_CLOEXEC
    )
    fds = array("i", b"".join(words[: len(words) // 4 * 4] for _, _, words in rights)).tolist()
    try:
        return _parse(data, flags), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _parse(data: bytes, flags: int) -> Message:
    if not data:
        raise ConnectionError("the connection has ended")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ValueError("the message is cut short")
    try:
        message = json.loads(data)
    except RecursionError:
        raise ValueError("the message is nested too deep") from None
    if not isinstance(message, dict) or not _is_count(message.get("seq")):
        raise ValueError("no message")
    return message


# A line: an allocator's orders, each of five words, and the answers, a word each.

LINE_BEGIN, LINE_END, LINE_MOVE, LINE_LOOK = 1, 2, 3, 4
LOOK_PAGES = (1 << 16) - 1
"""Most pages of the answer to LINE_LOOK, which has their number in its lowest 16 bits."""
_ORDER, _ANSWER = struct.Struct("=5Q"), struct.Struct("=q")


def receive_words(line: socket.socket) -> tuple[int, int, int, int, int]:
    """Receive one order: what to do, a region's address, the first page, how many, and where to.

    Raises
    ------
    ValueError
        If it is none, or the line has ended.
    """
    data = line.recv(_ORDER.size + 1)
    if len(data) != _ORDER.size:
        raise ValueError("no order")
    order, address, first, count, to = _ORDER.unpack(data)
    if order not in (LINE_BEGIN, LINE_END, LINE_MOVE, LINE_LOOK):
        raise ValueError(f"no order {order}")
    return order, address, first, count, to


def pack_answer(number: int) -> bytes:
    """Make the answer to an order."""
    return _ANSWER.pack(number)


# The fields of a request, which anybody may have written.


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def count_of(message: Message, name: str) -> int:
    """Return a field that must be an integer of 64 bits without a sign."""
    value = message.get(name)
    if type(value) is not int or not _is_count(value):
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1")
    return value


def counts_of(message: Message, name: str, width: int, limit: int) -> list[list[int]]:
    """Return a field that must be at most `limit` lists of `width` integers as in `count_of`."""
    rows = message.get(name)
    if not isinstance(rows, list) or len(rows) > limit:
        raise ValueError(f"{name} must be a list of at most {limit} lists")
    for row in rows:
        if not isinstance(row, list) or len(row) != width or not all(map(_is_count, row)):
            raise ValueError(f"{name} must be lists of {width} integers from 0 to 2^64 - 1")
    return rows


def text_of(message: Message, name: str) -> str:
    """Return a field that must be text."""
    value = message.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text")
    return value


def failure(error: Exception) -> Message:
    """Make the part of a reply that tells of an exception."""
    for kind in type(error).__mro__:
        if kind.__name__ in _EXCEPTIONS:
            number = error.errno if isinstance(error, OSError) else None
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            return {"error": kind.__name__, "text": text[:TEXT_LENGTH], "errno": number}
    return {"error": "Error", "text": f"{type(error).__name__}: {error}"[:TEXT_LENGTH]}


def raise_reply(reply: Message) -> None:
    """Raise what a reply tells of, if anything."""
    if "error" not in reply:
        return
    kind = _EXCEPTIONS.get(reply["error"], Error)
    if issubclass(kind, OSError) and reply.get("errno") is not None:
        raise kind(reply["errno"], reply["text"])
    raise kind(reply["text"])

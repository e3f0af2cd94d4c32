"""The swapper's side of attaching: who connects to the pool's socket, and may come in.

Two packets each way, the newcomer first: a nonce; a nonce and the swapper's proof; the
newcomer's proof; the segments.  From then on the connection is a worker's as any other.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from . import address, config, protocol
from .errors import Error
from .protocol import Message

__all__ = ["Listener"]


@dataclass
class _Newcomer:
    sock: socket.socket
    until: float
    client_nonce: str = ""
    server_nonce: str = field(default_factory=lambda: secrets.token_hex(16))


class Listener:
    """Lets processes in; used by the swapper's main thread only.

    Parameters
    ----------
    sock : socket
        Listens, and does not block.
    secret : str
        What newcomers must know, and are shown to be known here.
    selector : selectors.BaseSelector
        Its keys' data are called.
    admit : callable
        Makes a worker of a connection: returns the answer and descriptors to send and close.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: str,
        selector: selectors.BaseSelector,
        admit: Callable[[socket.socket], tuple[Message, tuple[int, ...]]],
    ) -> None:
        self._sock, self._secret, self._selector, self._admit = sock, secret, selector, admit
        self._newcomers: list[_Newcomer] = []
        selector.register(sock, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except BlockingIOError:
            return
        except OSError:
            # Too many descriptors, say: whoever waits stays in the queue.
            time.sleep(config.RETRY_S)
            return
        uid = address.peer_uid(sock)
        if uid != os.geteuid():
            self._refuse(sock, 0, PermissionError(errno.EPERM, f"the pool is not of uid {uid}"))
            return
        # The eldest that says nothing makes room.
        while len(self._newcomers) >= config.ATTACH_PENDING:
            self._forget(self._newcomers[0]).close()
        newcomer = _Newcomer(sock, time.monotonic() + config.ATTACH_WAIT_S)
        self._newcomers.append(newcomer)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(newcomer))

    def tend(self) -> None:
        """Close the connections of those that have said nothing for too long."""
        now = time.monotonic()
        for newcomer in [n for n in self._newcomers if n.until < now]:
            self._forget(newcomer).close()

    def _serve(self, newcomer: _Newcomer) -> None:
        if newcomer not in self._newcomers:
            return
        seq = 0
        try:
            message, fds = protocol.receive(newcomer.sock)
            for fd in fds:
                os.close(fd)
            seq = message["seq"]
            if not newcomer.client_nonce:
                self._greet(newcomer, message)
                return
            shown = protocol.text_of(message, "proof")
            if not hmac.compare_digest(shown.encode(), self._proof(address.CLIENT, newcomer)):
                raise PermissionError(errno.EPERM, "the pool's secret is another")
        except (OSError, ValueError) as error:
            self._refuse(self._forget(newcomer), seq, error)
            return
        sock = self._forget(newcomer)
        try:
            answer, out = self._admit(sock)
        except (Error, MemoryError, OSError) as error:
            self._refuse(sock, seq, error)
            return
        try:
            # Of a newcomer that is gone the end of file tells.
            with suppress(OSError):
                protocol.send(sock, {**answer, "seq": seq}, out, wait=False)
        finally:
            for fd in out:
                os.close(fd)

    def _greet(self, newcomer: _Newcomer, message: Message) -> None:
        """Prove first: whoever asks learns nothing by it that it did not know."""
        newcomer.client_nonce = protocol.text_of(message, "nonce")
        if not newcomer.client_nonce:
            raise ValueError("a newcomer comes with a nonce")
        answer = {"nonce": newcomer.server_nonce, "seq": message["seq"]}
        answer["proof"] = self._proof(address.SERVER, newcomer).decode()
        protocol.send(newcomer.sock, answer, wait=False)

    def _proof(self, who: str, newcomer: _Newcomer) -> bytes:
        nonces = newcomer.client_nonce, newcomer.server_nonce
        return address.proof(self._secret, who, *nonces).encode()

    def _forget(self, newcomer: _Newcomer) -> socket.socket:
        self._newcomers.remove(newcomer)
        self._selector.unregister(newcomer.sock)
        return newcomer.sock

    @staticmethod
    def _refuse(sock: socket.socket, seq: int, error: Exception) -> None:
        with sock, suppress(OSError):
            protocol.send(sock, {**protocol.failure(error), "seq": seq}, wait=False)

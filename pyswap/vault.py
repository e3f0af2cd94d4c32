"""The vault: descriptors that outlive the swapper, queued in a socket that every process holds.

A swapper that comes after another asks nobody for anything. It looks through the queue and takes
nothing out (MSG_PEEK, SO_PEEK_OFF), and so can the next one, should this one die meanwhile.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from . import config

__all__ = ["Deposit", "Vault"]

_SO_PEEK_OFF = 42
_DEPOSIT_FDS = 8
_DEPOSIT_BYTES = 1 << 14


@dataclass
class Deposit:
    """One message of the vault.

    Attributes
    ----------
    kind : str
        "pool", "area" or "worker".
    number, serial : int
        Whose descriptors these are; a place that became another's has another serial.
    facts : dict
        What else has to be known of them.
    fds : list of int
        The descriptors; whoever got the deposit owns them.
    order : int
        Of two deposits for one user the higher one counts.
    """

    kind: str
    number: int
    serial: int
    facts: dict[str, Any]
    fds: list[int]
    order: int = 0

    @property
    def user(self) -> tuple[str, int, int]:
        """Whose it is."""
        return self.kind, self.number, self.serial

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Vault:
    """Used by one swapper, and only while it holds the fence; not from several threads.

    Parameters
    ----------
    reader, writer : int
        Descriptors of the two ends, which are this object's from here on.

    Attributes
    ----------
    held : int
        Descriptors that count.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = socket.socket(fileno=reader)
        self._writer = socket.socket(fileno=writer)
        for end, option in ((self._writer, socket.SO_SNDBUF), (self._reader, socket.SO_RCVBUF)):
            end.setsockopt(socket.SOL_SOCKET, option, config.VAULT_BYTES)
        # The kernel tells twice what it was told.
        self._bytes = self._writer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        self.held = 0
        self._latest: dict[tuple[str, int, int], int] = {}
        self._fds: dict[tuple[str, int, int], int] = {}
        self._order = 0
        self._length = 0

    def put(
        self, kind: str, number: int, serial: int, facts: dict[str, Any], fds: tuple[int, ...]
    ) -> None:
        """Keep descriptors; what the same user has there already counts no more.

        Raises
        ------
        OSError
            If the kernel takes no more.
        """
        self._order += 1
        deposit = Deposit(kind, number, serial, facts, list(fds), self._order)
        spare = nullcontext if deposit.user in self._latest else self._sparing
        try:
            with spare():
                self._send(deposit)
        except OSError:
            # What counts no more may be all that is in the way.
            self._tidy(at_once=True)
            try:
                with spare():
                    self._send(deposit)
            except OSError as error:
                raise _no_room(error) from None
        self.held += len(fds) - self._fds.get(deposit.user, 0)
        self._fds[deposit.user] = len(fds)
        self._latest[deposit.user] = self._order
        self._length += 1
        self._tidy()

    def forget(self, kind: str, number: int, serial: int) -> None:
        """Let what a user has there go, sooner or later; an area's file at once."""
        self._latest.pop((kind, number, serial), None)
        self.held -= self._fds.pop((kind, number, serial), 0)
        self._tidy(at_once=kind == "area")

    def ends(self) -> tuple[int, int]:
        """Descriptors of the two ends for a process that comes in, which it owns."""
        return os.dup(self._reader.fileno()), os.dup(self._writer.fileno())

    def look(self) -> list[Deposit]:
        """Return every deposit that counts; nothing is taken out."""
        self._reader.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        found: dict[tuple[str, int, int], Deposit] = {}
        self._length = 0
        while (deposit := self._receive(socket.MSG_PEEK)) is not None:
            self._length += 1
            self._order = max(self._order, deposit.order)
            other = found.get(deposit.user)
            if other is None or other.order <= deposit.order:
                found[deposit.user], deposit = deposit, other
            if deposit is not None:
                deposit.close()
        self._reader.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
        self._latest = {user: deposit.order for user, deposit in found.items()}
        self._fds = {user: len(deposit.fds) for user, deposit in found.items()}
        self.held = sum(self._fds.values())
        return list(found.values())

    def _tidy(self, *, at_once: bool = False) -> None:
        """Take out what counts no more, once it is the larger part.

        What counts is put behind before it is taken from the front: whenever this process dies,
        every deposit is there, and one perhaps twice.
        """
        stale = self._length - len(self._latest)
        if not at_once and stale <= max(config.VAULT_STALE, len(self._latest)):
            return
        for _ in range(self._length):
            self._reader.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
            try:
                head = self._receive(socket.MSG_PEEK)
            except OSError:
                # Without descriptors to spare it is tidied another time.
                head = None
            self._reader.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, -1)
            if head is None:
                break
            counts = self._latest.get(head.user) == head.order
            if counts:
                try:
                    self._send(head)
                except OSError:
                    head.close()
                    return
            head.close()
            taken = self._receive(0)
            if taken is not None:
                taken.close()
            self._length -= not counts

    @contextmanager
    def _sparing(self) -> Iterator[None]:
        """Have the kernel refuse early, which leaves room for tidying and for who is there already.

        It looks at the sender's limit on open files when it counts what is in flight.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            lower = max(0, soft - config.VAULT_SPARE_FDS)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
        lower = self._bytes - config.VAULT_SPARE_BYTES
        self._writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, lower)
        try:
            yield
        finally:
            self._writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._bytes)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def _send(self, deposit: Deposit) -> None:
        d = deposit
        data = json.dumps([d.kind, d.number, d.serial, d.facts, d.order]).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", d.fds))]
        self._writer.sendmsg([data], rights, socket.MSG_DONTWAIT)

    def _receive(self, flags: int) -> Deposit | None:
        try:
            data, rights, flags_out, _ = self._reader.recvmsg(
                _DEPOSIT_BYTES,
                socket.CMSG_SPACE(4 * _DEPOSIT_FDS),
                flags | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return None
        fds = array("i", b"".join(words for _, _, words in rights)).tolist()
        if flags_out & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise OSError(errno.EMFILE, "this process may not open as many files as the vault has")
        kind, number, serial, facts, order = json.loads(data)
        return Deposit(kind, number, serial, facts, fds, order)


def _no_room(error: OSError) -> OSError:
    """Say in the user's words why the vault takes no more."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if error.errno == errno.ETOOMANYREFS:
        why = (
            f"the pools of this user keep {limit} descriptors already, the most that the kernel "
            "lets them: raise the hard limit on open files (ulimit -Hn) before a pool is made"
        )
    elif error.errno == errno.EAGAIN:
        why = (
            "what the kernel keeps for this pool is full: it has too many files, or processes; "
            "net.core.wmem_max bounds it"
        )
    else:
        return error
    return OSError(error.errno, why)

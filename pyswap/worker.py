"""A process's side of a pool: connection, userfaultfd, attendant, and what fork does with them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from . import address as addresses
from . import config, protocol, registry
from ._native import native
from .address import Address
from .errors import Error, PoolClosedError
from .objects import Backing
from .protocol import Message
from .segments import create_segment, open_swap, remove_stale_segments
from .settings import Settings

_log = logging.getLogger("pyswap")

_PACKAGE = str(Path(__file__).resolve().parent.parent)
"""Where a swapper finds this package."""

_BOOT = """\
import os, sys
if os.fork(): os._exit(0)
os.setsid()
sys.path.insert(0, sys.argv[1])
from pyswap.swapper import main
main()
"""
"""The swapper's first lines: a child of nobody, in a session of its own, without site-packages."""

_SUCCESSOR = """\
import signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
sys.path.insert(0, sys.argv[1])
from pyswap.swapper import main
main()
"""
"""Those of one that comes after another: an attendant starts it, with every signal blocked."""


class Joined(NamedTuple):
    """What a pool gives a process that it lets in; the descriptors are the process's."""

    address: Address
    sock: socket.socket
    channel_fd: int
    control_fd: int
    store_fd: int
    vault: list[int]


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()
_tokens = iter(range(1, 1 << 62))


class Attachment:
    """The part of this process in one pool.

    Safe to use from several threads: one request is under way at a time.

    Parameters
    ----------
    settings : Settings
        What the pool is made with.
    joined : Joined, optional
        The way into a pool that is there already; a new one is made without.
    """

    def __init__(self, settings: Settings, joined: Joined | None = None) -> None:
        self.settings = settings
        self.token = next(_tokens)
        self.creator_pid = os.getpid()
        self._pid = os.getpid()  # whose connection this is: in a child, the parent's until the hook
        self.user_only = False
        self.leaving = False
        self.regions: dict[int, tuple[int, int, int, int]] = {}
        self.labels: dict[int, str] = {}  # names of those that have one
        self._by_object: weakref.WeakValueDictionary[tuple[int, int], native.Region]
        self._by_object = weakref.WeakValueDictionary()  # shared ones: an object has one here
        self._object_lock = threading.Lock()
        self.private: set[int] = set()  # addresses of those regions that are copied on write
        self.read_only: set[int] = set()  # of those that nobody may write to
        self._pending: deque[tuple[int, int]] = deque()
        self._forks: dict[int, tuple[int, int] | None] = {}  # by the thread that forks
        self._lock = threading.Lock()
        self.caller: int | None = None  # the thread that makes a request
        self._leave_lock = threading.Lock()  # taken by who leaves, and never given back
        self._seq = 0
        self._fds: list[int] = []
        self._vault: list[int] = []  # the descriptors of its ends
        self._sock: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._attendant: native.Attendant | None = None
        self.address: Address
        self.uffd = -1
        self.control: native.Control | None = None
        try:
            if joined is None:
                self._start()
            else:
                self._join(joined)
        except BaseException:
            self._drop()
            raise
        _attachments.add(self)

    # Beginning.

    def _start(self) -> None:
        """Make the segments and the swap file, and start the swapper on them."""
        s = self.settings
        _check_kernel(os.uname().release)
        self.uffd, self.user_only = _open_uffd()
        remove_stale_segments()
        b = config.bounds(s.frame_count, s.page_size)
        page_count = config.STORE_BYTES // s.page_size
        # A record takes memory once its frame is in use: the table may be as long as ever needed.
        frame_room = max(s.frame_count, psutil.virtual_memory().total // s.page_size)
        layout = native.control_bytes(frame_room, page_count)
        self.control_fd = self._keep(create_segment("control", layout["size"], layout["regions"]))
        store_bytes = page_count * s.page_size
        self.store_fd = self._keep(create_segment("store", store_bytes, s.memory_bytes))
        _probe_store(self.store_fd, s.page_size)
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):
            self._vault.append(self._keep(end.detach()))
        swap_fd, _ = open_swap(s)
        try:
            sizes = {
                **asdict(b),
                "frame_count": s.frame_count,
                "frame_room": frame_room,
                "chunk_limit": config.chunk_limit(s.page_size),
                "page_count": page_count,
                "page_bytes": s.page_size,
                "overcommit": s.overcommit,
                "frame_wait_ms": config.FRAME_WAIT_MS,
                "stuck_ms": config.STUCK_MS,
                "mark": secrets.randbits(64),
            }
            setup: Message = {
                "name": s.name,
                "settings": {**asdict(s), "swap_path": str(s.swap_path) if s.swap_path else None},
                "sizes": sizes,
                "control_fd": self.control_fd,
                "store_fd": self.store_fd,
                "swap_fd": swap_fd,
                "swap_bytes": s.swap_bytes,
                "swap_path": str(s.swap_path),
                "vault": self._vault,
            }
            self._sock, self._channel = self._listen_and_spawn(setup)
        finally:
            if swap_fd >= 0:
                os.close(swap_fd)
        self._make_control_read_only()
        self._say_hello()

    def _join(self, joined: Joined) -> None:
        """Take the place that a pool has kept for this process."""
        self._sock = joined.sock
        self._channel = socket.socket(fileno=joined.channel_fd)
        self.control_fd = self._keep(joined.control_fd)
        self.store_fd = self._keep(joined.store_fd)
        self._vault = [self._keep(fd) for fd in joined.vault]
        self.address = joined.address
        _check_kernel(os.uname().release)
        self.uffd, self.user_only = _open_uffd()
        self._say_hello()

    def _say_hello(self) -> None:
        assert self._sock is not None
        self._empty_fd = self._keep(os.memfd_create("pyswap-empty", os.MFD_CLOEXEC))
        self._sock.settimeout(config.START_TIMEOUT_S)
        self._hello([])
        self._sock.settimeout(None)

    def _make_control_read_only(self) -> None:
        """Keep a descriptor that cannot write the tables: from here on only the swapper can."""
        read_only = os.open(f"/proc/self/fd/{self.control_fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(read_only, self.control_fd, inheritable=False)
        os.close(read_only)

    def _listen_and_spawn(self, setup: Message) -> tuple[socket.socket, socket.socket]:
        """Start the swapper, with the socket where others find the pool, and its secret.

        Anybody may read a process's arguments, so the secret goes by a file without a name. The
        socket is not kept here: with the swapper it shall end.
        """
        listening, self.address = addresses.listen(self.settings.name)
        with listening, os.fdopen(os.memfd_create("pyswap-secret", os.MFD_CLOEXEC), "w") as secret:
            secret.write(self.address.secret)
            secret.flush()
            registered = registry.register(self.address)
            handed = {"listen_fd": listening.fileno(), "secret_fd": secret.fileno()}
            try:
                # The swapper removes the entry when it ends.
                return self._spawn({**setup, **handed, "registered": str(registered or "")})
            except BaseException:
                if registered is not None:
                    registered.unlink(missing_ok=True)
                raise

    def _spawn(self, setup: Message) -> tuple[socket.socket, socket.socket]:
        """Start the swapper; the process that starts it ends at once, and is waited for here."""
        sock, sock_end = protocol.pair()
        channel, channel_end = protocol.pair()
        try:
            fds = [setup["control_fd"], setup["store_fd"], *setup["vault"]]
            fds += [sock_end.fileno(), channel_end.fileno()]
            fds += [setup["listen_fd"], setup["secret_fd"]]
            if setup["swap_fd"] >= 0:
                fds.append(setup["swap_fd"])
            setup = {**setup, "sock_fd": sock_end.fileno(), "channel_fd": channel_end.fileno()}
            command = _command(_BOOT, setup)
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=fds,
                cwd="/",
                check=True,
            )
        except BaseException:
            sock.close()
            channel.close()
            raise
        finally:
            sock_end.close()
            channel_end.close()
        return sock, channel

    def _hello(self, regions: list[tuple[int, int, int]]) -> tuple[list[int], dict[int, int]]:
        """Attach this process.

        Returns the addresses whose arrays are gone, and the first page id of each private array
        that is in one piece.
        """
        limit = config.HELLO_REGIONS
        if self.control is not None:
            # A child's attendant: the swapper may die before it has answered.
            self._begin_attendant(self.control)
        pidfd = os.pidfd_open(os.getpid())
        try:
            message = {"op": "hello", "pid": os.getpid(), "last": len(regions) <= limit}
            message["regions"] = regions[:limit]
            told = [self._exchange(message, (self.uffd, pidfd))]
        finally:
            os.close(pidfd)
        for i in range(limit, len(regions), limit):
            message = {"op": "inherit", "last": len(regions) <= i + limit}
            message["regions"] = regions[i : i + limit]
            told.append(self._exchange(message, ()))
        if self.control is None:
            self.control = native.Control(self.control_fd)
            if os.fstat(self.store_fd).st_size != self.control.store_bytes():
                raise Error("the page store is not of the length that the control segment says")
            self._begin_attendant(self.control)
        lost = [address for answer in told for address in answer["lost"]]
        return lost, {address: first for answer in told for address, first in answer["whole"]}

    def _begin_attendant(self, control: native.Control) -> None:
        assert self._channel is not None
        assert self._sock is not None
        reader, writer = self._vault
        name = f"pyswap-takeover-{control.mark():016x}".encode()
        self._attendant = native.Attendant(
            control,
            self._channel.fileno(),
            self._sock.fileno(),
            self.uffd,
            self.store_fd,
            self._empty_fd,
            self.token,
            (_successor(), reader, writer, self.control_fd, name),
        )

    def _end_attendant(self) -> None:
        if self._attendant is not None and self._channel is not None:
            self._attendant.detach()
            self._channel.shutdown(socket.SHUT_RDWR)
            self._attendant.join()
            self._attendant = None

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    # Requests.

    def call(self, op: str, *, fds: tuple[int, ...] = (), **fields: Any) -> Message:
        """Make a request and return the reply.

        Raises
        ------
        PoolClosedError
            If this process has left the pool, or the pool has ended.
        Error
            If the swapper died; else whatever the swapper answers with.
        """
        try:
            with self._lock:
                return self._exchange({"op": op, **fields}, fds)
        finally:
            self._flush()

    def _exchange(self, message: Message, fds: tuple[int, ...]) -> Message:
        """One request and its reply; `_lock` is held, or this process has one thread."""
        if self._sock is None:
            raise PoolClosedError(f"pool {self.settings.name!r} is closed in this process")
        # Garbage that is collected meanwhile may come back here, and must not wait for the lock.
        self.caller = threading.get_ident()
        try:
            return self._ask(self._sock, message, fds)
        finally:
            self.caller = None

    def _ask(self, sock: socket.socket, message: Message, fds: tuple[int, ...]) -> Message:
        self._seq += 1
        seq = self._seq
        try:
            protocol.send(sock, {**message, "seq": seq}, fds)
            while True:
                reply, received = protocol.receive(sock)
                if reply.get("again"):
                    # Another swapper is there, which may not know of this request.
                    protocol.send(sock, {**message, "seq": seq}, fds)
                elif reply.get("seq") == seq:
                    break
                for fd in received:
                    os.close(fd)
        except TimeoutError:
            raise Error("the swapper did not answer in time; is this machine overloaded?") from None
        except ConnectionError:
            raise self._ended() from None
        protocol.raise_reply(reply)
        reply["fds"] = received
        return reply

    def _ended(self) -> Error:
        name = self.settings.name
        if self.control is None:
            return Error(f"the swapper of pool {name!r} could not start; its reason is on stderr")
        if self.control.ended():
            return PoolClosedError(
                f"pool {name!r} has ended: its creator is gone and no array was left"
            )
        return Error(f"the swapper of pool {name!r} died")

    # Regions.

    def new_region(
        self,
        size: int,
        name: str,
        *,
        private: bool = False,
        sparse: bool = False,
        backing: Backing | None = None,
        row_bytes: int = 0,
    ) -> native.Region:
        """Make an object of `size` bytes and map it; see `Objects.create`."""
        page = self.settings.page_size
        mapped = -(-max(1, size) // page) * page
        address = native.reserve(mapped)
        try:
            fields: Message = {"address": address, "size": size, "name": name, "row": row_bytes}
            if backing is None:
                reply = self.call("create", **fields, private=private, sparse=sparse)
            else:
                fields.update(read_only=backing.read_only, offset=backing.offset)
                reply = self.call("open", fds=(backing.fd,), **fields, stamp=backing.stamp)
        except BaseException:
            # Interrupted after the request had gone out, the region may exist: this takes it back.
            self.region_ended(address, mapped)
            raise
        offset = int(reply["base"]) * page
        self.regions[address] = (int(reply["object"]), int(reply["generation"]), offset, mapped)
        if backing is not None and backing.read_only:
            self.read_only.add(address)
        region = self._mapped_region(address, mapped, size)
        # Until it is shared its pages follow one another, so it was mapped in one piece.
        if private or sparse:
            self.private.add(address)
        else:
            self._by_object[self.regions[address][:2]] = region
        return region

    def object_region(
        self, number: int, generation: int, mapped: int, *, loaded: bool = False
    ) -> native.Region:
        """Return the region of a shared object in this process, mapped now where there is none.

        With `loaded` a pickle's reference is taken over, if one is left.

        Raises
        ------
        GoneError
            If the object has ended.
        """
        with self._object_lock:
            region = self._by_object.get((number, generation))
            # A weak reference may bring back one that is just being ended.
            if region is not None and not region.ended:
                self.call("receive" if loaded else "touch", address=region.address)
                return region
            return self._map_object(number, generation, mapped, loaded)

    def _map_object(self, number: int, generation: int, mapped: int, loaded: bool) -> native.Region:
        fields: Message = {
            "object": number,
            "generation": generation,
            "mapped": mapped,
            "loaded": loaded,
        }
        deadline = time.monotonic() + config.ATTACH_WAIT_S
        address = native.reserve(mapped)
        try:
            reply = self.call("map", address=address, **fields)
            while reply.get("busy"):
                # Another thread ended the region here, and has not said so yet.
                if time.monotonic() > deadline:
                    raise Error("an array that another thread has ended stays mapped")
                time.sleep(config.RETRY_S)
                reply = self.call("map", address=address, **fields)
        except BaseException:
            self.region_ended(address, mapped)
            raise
        offset = int(reply["base"]) * self.settings.page_size
        self.regions[address] = (number, generation, offset, mapped)
        if reply["read_only"]:
            self.read_only.add(address)
        if reply["label"]:
            self.labels[address] = reply["label"]
        region = self._mapped_region(address, mapped, mapped)
        self._by_object[number, generation] = region
        return region

    def mapper(self) -> tuple[int, int, int]:
        """Return what maps pages of this pool in C code; see `native.Attendant.mapper`."""
        assert self._attendant is not None
        return self._attendant.mapper()

    def open_line(self) -> int:
        """Give the swapper an end of a new line; returns the other, which is the caller's."""
        ours, theirs = protocol.pair()
        with ours, theirs:
            self.call("line", fds=(theirs.fileno(),))
            return ours.detach()

    def snapshot(self, source: int) -> native.Region:
        """Map a private region's pages once more, copied on write from here on."""
        number, generation, offset, mapped = self.regions[source]
        address = native.reserve(mapped)
        try:
            self.call("snapshot", address=source, target=address)
        except BaseException:
            self.region_ended(address, mapped)
            raise
        self.regions[address] = (number, generation, offset, mapped)
        self.private.add(address)
        return self._mapped_region(address, mapped, mapped)

    def _mapped_region(self, address: int, mapped: int, size: int) -> native.Region:
        """Map a region that the swapper knows; on failure it is ended again."""
        try:
            self._map(address)
            writable = address not in self.read_only
            region = native.Region(self, address, mapped, size, self.token, writable)
        except BaseException:
            native.reserve_again(address, mapped)
            self.region_ended(address, mapped)
            raise
        # A swapper that died before the range was noted has had no attendant see to it.
        if self._attendant is None or self._attendant.orphaned():
            raise self._ended()
        return region

    def _map(self, address: int, whole: int | None = None) -> None:
        """Map a region where it was reserved: from page id `whole` on, or in pieces."""
        page = self.settings.page_size
        pages = self.regions[address][3] // page
        writable = address not in self.read_only
        runs = self.page_runs(address, 0, pages) if whole is None else [(0, pages, whole)]
        for index, count, number in runs:
            begin, at = address + index * page, number * page
            native.map_range(begin, count * page, self.store_fd, at, self.uffd, writable)

    def page_runs(self, address: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Where the pages of a region are: (index, pages, page id), in order of the index."""
        if address not in self.private:
            yield first, count, self.regions[address][2] // self.settings.page_size + first
            return
        end = first + count
        while first < end:
            runs = self.call("runs", address=address, first=first, count=end - first)["runs"]
            if not runs:
                raise Error("the array is gone")
            for index, pages, number in runs:
                yield index, pages, number
            first = index + pages

    def region_ended(self, address: int, mapped: int) -> None:
        """Called when nothing refers to a region any more; its addresses are reserved still."""
        self._pending.append((address, mapped))
        self._flush()

    def _flush(self) -> None:
        """Tell the swapper of ended regions.

        The garbage collector may come here in the middle of a request of this very thread: then
        the lock is taken, and who holds it flushes after.
        """
        if os.getpid() != self._pid:
            # A forked child before its hook: it must not speak for its parent.
            return
        while self._pending and self._lock.acquire(blocking=False):
            try:
                while self._pending:
                    # Where the pool has ended, the region has ended with it.
                    with contextlib.suppress(Error):
                        self._exchange({"op": "remove", "address": self._pending[0][0]}, ())
                    # Only now, so that an interrupt above leaves it to the next flush.
                    address, mapped = self._pending.popleft()
                    self.regions.pop(address, None)
                    self.private.discard(address)
                    self.labels.pop(address, None)
                    self.read_only.discard(address)
                    native.unreserve(address, mapped)
            finally:
                self._lock.release()
        if self.leaving and not self.regions:
            self._leave()

    # Ending.

    def is_left(self) -> bool:
        """Whether this process has no part in the pool any more."""
        return self._sock is None

    def close(self) -> None:
        """End this process's use as soon as its last array is gone."""
        if self._sock is None:
            return
        try:
            self.call("close")
        except Error as error:
            _log.debug("pyswap: close: %s", str(error))
        self.leaving = True
        self._flush()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Nobody closed the pool, but no array of it is left either.  At the interpreter's end the
        # process's end says the rest.
        if not is_finalizing() and self._sock is not None and os.getpid() == self._pid:
            self._leave()

    def _leave(self) -> None:
        if not self._leave_lock.acquire(blocking=False):
            return
        if self._sock is not None:
            try:
                with self._lock:
                    self._exchange({"op": "bye"}, ())
            except Error as error:
                _log.debug("pyswap: bye: %s", str(error))
        self._drop()

    def _drop(self) -> None:
        """Give back every descriptor and the attendant."""
        _attachments.discard(self)
        self._end_attendant()
        for end in (self._sock, self._channel):
            if end is not None:
                end.close()
        self._sock = self._channel = None
        self._close_fds()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1

    # Fork.

    def before_fork(self) -> None:
        """Have the swapper keep a place for the child, with references for all it inherits."""
        prepared = None
        ended = self.control is not None and self.control.ended()
        if self._sock is not None and not ended:
            try:
                prepared = self._prepare_fork(self._sock)
            except (Error, MemoryError, OSError) as error:
                name = self.settings.name
                _log.error("pyswap: pool %r: the child will have no arrays: %s", name, str(error))
        self._forks[threading.get_ident()] = prepared

    def _prepare_fork(self, sock: socket.socket) -> tuple[int, int]:
        if not self._lock.acquire(timeout=config.FORK_TIMEOUT_S):
            raise Error("another thread's request to the swapper takes too long")
        try:
            sock.settimeout(config.FORK_TIMEOUT_S)
            first, second = self._exchange({"op": "fork"}, ())["fds"]
            return first, second
        finally:
            sock.settimeout(None)
            self._lock.release()

    def after_fork_in_parent(self) -> None:
        """Close the child's ends: it has them, or is not there, which the swapper will see."""
        for fd in self._forks.pop(threading.get_ident(), None) or ():
            os.close(fd)

    def after_fork_in_child(self) -> None:
        """Become a worker of its own: map everything again, over a userfaultfd of this process."""
        self._lock = threading.Lock()
        self._leave_lock = threading.Lock()
        self._object_lock = threading.Lock()
        prepared = self._forks.pop(threading.get_ident(), None)
        self._forget_parent()
        while self._pending:
            native.unreserve(*self._pending.popleft())
        # What another thread of the parent was making or ending is nobody's here.
        self.regions = {a: r for a, r in self.regions.items() if native.owns(a)}
        self.private.intersection_update(self.regions)
        self.read_only.intersection_update(self.regions)
        if prepared is not None:
            self._adopt(*prepared)
        elif self.regions:
            self._orphan(list(self.regions), "this process was forked without the swapper's help")
        self._pid = os.getpid()
        self._flush()

    def _forget_parent(self) -> None:
        """Close what is the parent's, so that its end is noticed."""
        for other in self._forks.values():
            for fd in other or ():
                os.close(fd)
        self._forks.clear()
        if self._attendant is not None:
            self._attendant.forget()
            self._attendant = None
        for end in (self._sock, self._channel):
            if end is not None:
                end.close()
        self._sock = self._channel = None
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1

    def _adopt(self, sock_fd: int, channel_fd: int) -> None:
        self._sock = socket.socket(fileno=sock_fd)
        self._channel = socket.socket(fileno=channel_fd)
        try:
            self.uffd, self.user_only = _open_uffd()
            # Nothing is touched before the swapper knows of it: this is the process's only thread.
            for address in self.regions.keys() - self.private:
                self._map(address)
            regions = [(a, o, g) for a, (o, g, _, _) in self.regions.items()]
            lost, whole = self._hello(regions)
            self._pid = os.getpid()
            for address in self.private.difference(lost):
                self._map(address, whole.get(address))
        except (Error, OSError) as error:
            self._end_attendant()
            self._orphan(list(self.regions), str(error))
            return
        except BaseException as error:
            # An interrupt, say.  A touch must not wait for a swapper that may not know of us.
            self._end_attendant()
            self._orphan(list(self.regions), repr(error))
            raise
        if lost:
            self._orphan(lost, "it was freed while this process was forked")

    def _orphan(self, addresses: list[int], why: str) -> None:
        """Have touches of these arrays end in SIGBUS, and say so."""
        if not addresses:
            return
        line = (
            f"pyswap: pool {self.settings.name!r}: {why}; "
            f"touching {len(addresses)} of its arrays is SIGBUS\n"
        )
        # Not through sys.stderr: a thread of the parent may have held its lock at the fork.
        os.write(2, line.encode())
        for address in addresses:
            self._poison(address)

    def _poison(self, address: int) -> None:
        """Have touches end in SIGBUS; where the kernel has no memory even for that, in SIGSEGV."""
        for _ in range(config.MAP_TRIES):
            with contextlib.suppress(OSError):
                native.map_range(address, self.regions[address][3], self._empty_fd, 0, -1)
                return


def _command(program: str, setup: Message) -> list[str]:
    """A program of this Python, without site-packages, that gets the setup as its last argument."""
    return [sys.executable, "-E", "-S", "-c", program, _PACKAGE, json.dumps(setup)]


@functools.cache
def _successor() -> list[bytes]:
    """What it takes to start another swapper; made once, since every forked child names it."""
    # In it these are descriptors 3 to 5.
    setup = {"vault": [3, 4], "control_fd": 5, "successor": True}
    return [os.fsencode(word) for word in _command(_SUCCESSOR, setup)]


def _check_kernel(release: str) -> None:
    """Refuse kernels that cannot map a page write-protected at once (UFFDIO_CONTINUE_MODE_WP)."""
    numbers = [int(n) for n in re.findall(r"\d+", release)[:2]]
    if numbers < [6, 4]:
        raise Error(f"pyswap needs Linux 6.4 or newer; this is {release}")


def attachments() -> list[Attachment]:
    """All parts that this process has in pools."""
    return list(_attachments)


def attachment_of(token: int) -> Attachment | None:
    """Find this process's part in a pool by the token that its regions carry."""
    return next((each for each in list(_attachments) if each.token == token), None)


def _open_uffd() -> tuple[int, bool]:
    try:
        return native.open_uffd()
    except OSError as error:
        raise Error(
            f"userfaultfd is not to be had here ({error.strerror}): pyswap needs Linux 6.4 or "
            "newer, and a container whose seccomp profile allows the userfaultfd system call"
        ) from None


def _probe_store(fd: int, page_bytes: int) -> None:
    """A page must cost a page: with huge pages forced on shared memory it would cost 2 MiB."""
    before = os.fstat(fd).st_blocks
    try:
        os.posix_fallocate(fd, 0, page_bytes)
    except OSError as error:
        reason = f"shared memory has no room for a page of {page_bytes} bytes: {error.strerror}"
        raise OSError(error.errno, reason) from None
    cost = (os.fstat(fd).st_blocks - before) * 512
    native.punch(fd, 0, page_bytes)
    if cost != page_bytes:
        raise Error(
            f"a page of {page_bytes} bytes takes {cost} bytes of shared memory here, so no budget "
            "could be kept: set /sys/kernel/mm/transparent_hugepage/shmem_enabled to advise"
        )


def _before() -> None:
    for attachment in list(_attachments):
        attachment.before_fork()


def _after_in_parent() -> None:
    for attachment in list(_attachments):
        attachment.after_fork_in_parent()


def _after_in_child() -> None:
    for attachment in list(_attachments):
        attachment.after_fork_in_child()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)

"""The swapper process: serves its workers' requests, and runs the threads that move pages.

It is its own session, started by `pyswap.worker` and known by "pyswap.swapper" in its command
line.  It ends by itself when no worker is left, or when creation has ended and no array lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import select
import selectors
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

from . import config, protocol
from ._native import native
from .areas import Areas
from .birth import birth
from .errors import Error, PoolClosedError
from .listener import Listener
from .objects import Backing, Objects, PagedObject, RegionRecord
from .pins import Pinner, Pins
from .protocol import Message
from .swapoff import Swapoffs
from .vault import Deposit, Vault

_log = logging.getLogger("pyswap")

MAX_WORKERS = 256
_WORKER_FDS = 8
"""Descriptors that a process costs while it comes in."""
_POOL_FDS = ("control_fd", "store_fd", "listen_fd", "secret_fd")
"""The descriptors of a pool itself, as the setup names them."""
PLACE_FREE, PLACE_PROMISED, PLACE_TAKEN = range(3)
_ADVICE = {"normal": 0, "sequential": 1, "random": 2}


@dataclass
class _Worker:
    """One attached process, or the place kept for a child that is being forked.

    `promised` has what a child will map, by address. One that was another swapper's is `resumed`:
    it asks again what it was asking for, and may get twice what it has already; `seq` is the
    latest request that was served here.
    """

    number: int
    serial: int
    sock: socket.socket
    channel: socket.socket
    promised: dict[int, RegionRecord] = field(default_factory=dict)
    regions: dict[int, RegionRecord] = field(default_factory=dict)
    pins: Pinner = field(init=False)
    line: socket.socket | None = None
    attached: bool = False
    waiting: int = 0
    silent: bool = False
    farewell: bool = False
    pidfd: int = -1
    pid: int = 0
    resumed: bool = False
    seq: int = 0

    def __post_init__(self) -> None:
        self.pins = Pinner(self.number)


class Server:
    """The main thread of a swapper.

    Parameters
    ----------
    setup : dict
        What the creator chose; see `pyswap.worker.Attachment`.
    vault : Vault
        Where descriptors are kept for the swapper after this one.
    left : list of Deposit, optional
        What the swapper before this one has left there.
    """

    def __init__(self, setup: Message, vault: Vault, left: list[Deposit] | None = None) -> None:
        self._setup = setup
        self._vault = vault
        self._poll = select.epoll()
        self.tables = native.Swapper(
            setup["control_fd"],
            setup["store_fd"],
            self._poll.fileno(),
            {**setup["sizes"], "mappings_limit": _mappings_limit()},
            left is not None,
        )
        sizes = setup["sizes"]
        self.objects = Objects(self.tables, vault, sizes["page_bytes"], sizes["page_count"])
        self.areas = Areas(
            self.tables,
            vault,
            sizes["page_bytes"],
            sizes["frame_count"],
            sizes["reserve_pages"],
            bool(sizes["overcommit"]),
        )
        self.swapoffs = Swapoffs(self.tables, self.areas)
        self.pins = Pins(self.tables)
        self._workers: dict[int, _Worker] = {}
        self._leaving: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._service = ThreadPoolExecutor(config.SERVICE_THREADS, "service")
        self._finished: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._finished_r, self._finished_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._creator_gone = False
        self._frame_count: int = sizes["frame_count"]
        self._resizing = False
        self._next_online = 0.0
        self._tell_offline = 0.0
        self._serial = 0
        self._left: native.Takeover | None = None
        if left is None:
            self._begin()
        else:
            self._left = native.Takeover(self.tables)
            self._resume(self._left, left)

    def _begin(self) -> None:
        """Be a new pool's swapper."""
        setup = self._setup
        kept = {name: setup[name] for name in ("name", "sizes", "settings", "registered")}
        self._vault.put("pool", 0, 0, kept, tuple(setup[name] for name in _POOL_FDS))
        self.tables.set_birth(**birth())
        if setup["swap_fd"] >= 0:
            self.areas.add(setup["swap_path"], setup["swap_fd"], setup["swap_bytes"], 0, [])
        sock = socket.socket(fileno=setup["sock_fd"])
        channel = socket.socket(fileno=setup["channel_fd"])
        self._expect(_Worker(0, self._new_serial(), sock, channel))

    def _new_serial(self) -> int:
        self._serial += 1
        return self._serial

    # A takeover.

    def _resume(self, left: native.Takeover, deposited: list[Deposit]) -> None:
        """Go on where another swapper was killed; see core/takeover.pxd."""
        left.repair()
        deposits = {deposit.user: deposit for deposit in deposited}
        for deposit in deposited:
            if deposit.kind == "area":
                facts, (fd,) = deposit.facts, deposit.fds
                if not self.areas.adopt(left, deposit.number, **facts, fd=fd):
                    os.close(fd)
        for number, (place, serial, pid) in enumerate(left.places()):
            self._serial = max(self._serial, serial)
            found = deposits.pop(("worker", number, serial), None)
            if found is None:
                continue
            if place:
                self._resume_worker(left, found, pid if place == PLACE_TAKEN else 0)
            else:
                self._vault.forget(*found.user)
                found.close()
        self._resume_arrays(left)
        for user, deposit in deposits.items():
            o = self.objects.live.get(deposit.number) if deposit.kind == "file" else None
            if o is not None and o.generation == deposit.serial:
                left.file_adopt(o.number, deposit.fds.pop())
            elif deposit.kind in ("worker", "file"):
                self._vault.forget(*user)
                deposit.close()
        left.waiters_wake()
        for worker in list(self._workers.values()):
            with suppress(OSError):
                protocol.send(worker.sock, {"seq": 0, "again": True}, wait=False)
        _log.warning(
            "pyswap: pool %r: process %d is the swapper now: the one before it died",
            self._setup["name"],
            os.getpid(),
        )

    def _resume_worker(self, left: native.Takeover, found: Deposit, pid: int) -> None:
        """Serve a worker on: one that was attached, or is yet to say hello."""
        sock, channel, *rest = found.fds
        worker = _Worker(
            found.number, found.serial, socket.socket(fileno=sock), socket.socket(fileno=channel)
        )
        worker.resumed = True
        if pid:
            uffd, worker.pidfd = rest
            worker.pid, worker.attached = pid, True
            left.worker_adopt(worker.number, uffd, os.dup(channel))
            self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._lost(worker))
        else:
            for fd in rest:
                os.close(fd)
        self._expect(worker)

    def _resume_arrays(self, left: native.Takeover) -> None:
        """Find again whose the regions and pins are, and how many frames there are."""
        begun, promised = self.objects.resume(left)
        for region in begun:
            self._workers[region.worker].regions[region.address] = region
        for region in promised:
            self._workers[region.worker].promised[region.address] = region
        pinners = {number: worker.pins for number, worker in self._workers.items()}
        self.pins.resume(left, pinners, begun)
        self.objects.closed = left.closed()
        self._creator_gone = 0 not in self._workers
        if self._creator_gone:
            self.objects.close()
        frames, budget = left.frames_left()
        with suppress(MemoryError, OSError):
            if frames < budget:
                self.tables.frames_add(budget - frames)
        frames, _ = left.frames_left()
        self._set_frames(frames, frames)

    # The loop.

    def run(self) -> None:
        """Serve until nobody is left."""
        secret = os.pread(self._setup["secret_fd"], 100, 0).decode()
        listening = socket.socket(fileno=self._setup["listen_fd"])
        self._listener = Listener(listening, secret, self._selector, self._admit)
        self._start_threads()
        while not self._is_over():
            timeout = config.RETRY_S if self._busy() else config.OFFLINE_RETRY_S
            for key, _ in self._selector.select(timeout):
                key.data()
            self._tend()
        self.tables.set_ended()
        if self._setup["registered"]:
            with suppress(OSError):
                os.unlink(self._setup["registered"])

    def _start_threads(self) -> None:
        loops = (
            [self.tables.fault_loop] * config.FAULT_THREADS
            + [self.tables.starved_loop] * config.STARVED_THREADS
            + [self.tables.readahead_loop] * config.READAHEAD_THREADS
            + [self.tables.reclaim_loop, self.tables.write_ahead_loop]
        )
        for loop in loops:
            _start_thread(loop)
        _start_thread(self.tables.beat_loop, config.BEAT_MS, self._setup["sizes"]["stuck_ms"])
        self._selector.register(self._finished_r, selectors.EVENT_READ, self._finish)

    def _is_over(self) -> bool:
        if not self._workers:
            return True
        return (self.objects.closed or self._creator_gone) and not self.objects.live

    def _busy(self) -> bool:
        reminding = self._left is not None and bool(self._left.copies_remind())
        return reminding or bool(self._leaving) or not self.objects.sweep()

    def _tend(self) -> None:
        """Finish what could not be finished at once."""
        self._listener.tend()
        for worker in list(self._leaving):
            self._try_end(worker)
        if time.monotonic() >= self._next_online:
            self._next_online = time.monotonic() + config.OFFLINE_RETRY_S
            self._try_online()
            self.areas.tell()
            self.objects.rest()
            # One that another program replaced may have been looked at by somebody at the time.
            for worker in [w for w in self._workers.values() if w.silent]:
                self._try_end(worker)
            for worker in [w for w in self._workers.values() if w.attached]:
                self._expel(worker)

    def _expel(self, worker: _Worker) -> None:
        """End a process that closed its connection, once a fault of its waits for its attendant."""
        if not self.tables.worker_deaf(worker.number) or _has_ended(worker.pidfd):
            return
        _log.warning(
            "pyswap: pool %r: process %d closed its connection to the pool, and one of its faults "
            "cannot be served: it gets SIGBUS",
            self._setup["name"],
            worker.pid,
        )
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGBUS)

    def _try_online(self) -> None:
        """Give frames without memory another try, and tell the log of them once in a while."""
        frames = self.tables.frames_online(config.BATCH_PAGES)
        if frames and time.monotonic() >= self._tell_offline:
            self._tell_offline = time.monotonic() + config.TELL_S
            _log.warning(
                "pyswap: %d frames found no memory: somebody else fills /dev/shm; the pool goes on "
                "with fewer, and tries them again",
                frames,
            )

    # Workers.

    def _expect(self, worker: _Worker) -> None:
        self._workers[worker.number] = worker
        self._selector.register(worker.sock, selectors.EVENT_READ, lambda: self._serve(worker))

    def _serve(self, worker: _Worker) -> None:
        """One request of a worker, or its end."""
        if self._workers.get(worker.number) is not worker:
            return
        try:
            message, fds = protocol.receive(worker.sock)
        except ConnectionError:
            self._lost(worker)
            return
        except (ValueError, OSError) as error:
            text = str(error)
            _log.warning("pyswap: worker %d sent no message and is cut off: %s", worker.pid, text)
            # It may map arrays, and be served for these; of the connection it sees the end.
            with suppress(OSError):
                worker.sock.shutdown(socket.SHUT_RDWR)
            self._lost(worker)
            return
        if worker.resumed:
            if message["seq"] <= worker.seq:
                # It is asked once more what another swapper had not read.
                for fd in fds:
                    os.close(fd)
                return
            worker.seq = message["seq"]
        reply: Message | None
        try:
            reply, out = self._handle(worker, message, fds)
        except Exception as error:  # noqa: BLE001 (the worker is told, and the others served)
            if not isinstance(error, (Error, MemoryError, OSError, ValueError)):
                _log.exception("pyswap: request %r failed", message.get("op"))
            reply, out = protocol.failure(error), ()
        if reply is not None:
            self._reply(worker, message, reply, out)
        if worker.farewell:
            self._lost(worker)

    def _reply(
        self, worker: _Worker, message: Message, reply: Message, fds: tuple[int, ...] = ()
    ) -> None:
        try:
            protocol.send(worker.sock, {**reply, "seq": message["seq"]}, fds, wait=False)
        except OSError:
            # It is gone, as its end of file says; or it reads no replies, and waits for none.
            pass
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(
        self, worker: _Worker, message: Message, fds: list[int]
    ) -> tuple[Message | None, tuple[int, ...]]:
        op = message.get("op")
        if op == "hello":
            return self._hello(worker, message, fds), ()
        if op == "swapon" and worker.attached:
            return self._swapon(worker, message, fds), ()
        if op == "line" and worker.attached:
            return self._open_line(worker, fds), ()
        if op == "open" and worker.attached:
            return self._open(worker, message, fds), ()
        for fd in fds:
            os.close(fd)
        if not worker.attached:
            raise ValueError("the first request must be hello")
        if op == "fork":
            return self._fork(worker)
        if op in ("pin", "pageout", "drain", "resize"):
            if worker.waiting == config.WORKER_REQUESTS:
                raise ValueError(f"{worker.waiting} such requests of this process are under way")
            getattr(self, f"_begin_{op}")(worker, message)
            return None, ()
        handler = getattr(self, f"_do_{op}", None) if isinstance(op, str) else None
        if handler is None:
            raise ValueError(f"no request {op!r}")
        return handler(worker, message), ()

    def _hello(self, worker: _Worker, message: Message, fds: list[int]) -> Message:
        """Attach a process: its userfaultfd, its pidfd, and where it mapped what it inherited."""
        with ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            if worker.resumed and worker.attached:
                return self._do_inherit(worker, message)
            if worker.attached or len(fds) != 2:
                raise ValueError("hello comes once, with two descriptors")
            uffd, pidfd = fds
            if b"Pid:" not in Path(f"/proc/self/fdinfo/{pidfd}").read_bytes():
                raise ValueError("hello comes with a pidfd")
            pid = protocol.count_of(message, "pid")
            _inherited(message)
            # A blocking one is always ready, and reading it would hold a fault thread.
            os.set_blocking(uffd, False)
            self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._lost(worker))
            undo.callback(self._selector.unregister, pidfd)
            channel = os.dup(worker.channel.fileno())
            undo.callback(os.close, channel)
            kept = (worker.sock.fileno(), channel, uffd, pidfd)
            self._vault.put("worker", worker.number, worker.serial, {}, kept)
            self.tables.worker_begin(worker.number, pid, uffd, channel)
            self.tables.worker_place(worker.number, PLACE_TAKEN, worker.serial)
            undo.pop_all()
        worker.pid, worker.pidfd, worker.attached = pid, pidfd, True
        return self._do_inherit(worker, message)

    def _do_inherit(self, worker: _Worker, message: Message) -> Message:
        """Note a child's regions, a message full at a time; what was promised beyond is dropped."""
        inherited = _inherited(message)
        lost = [
            address
            for address, number, generation in inherited
            if not self._inherit(worker, address, number, generation)
        ]
        if message.get("last"):
            for region in worker.promised.values():
                self.objects.drop(region)
            worker.promised.clear()
        return {"lost": lost, "whole": self._whole(worker, [each[0] for each in inherited])}

    def _whole(self, worker: _Worker, addresses: list[int]) -> list[tuple[int, int]]:
        """Where private regions are that lie in one piece: a child need not ask for each."""
        whole = []
        for address in addresses:
            region = worker.regions.get(address)
            if region is not None and region.object.private:
                pages = region.object.pages
                runs = self.tables.region_runs(region.number, region.generation, 0, pages, 1)
                whole += [(address, first) for _, count, first in runs if count == pages]
        return whole

    def _inherit(self, worker: _Worker, address: int, number: int, generation: int) -> bool:
        """Note a region that a child mapped again; False where its object is gone."""
        if worker.resumed and address in worker.regions:
            return True
        region = worker.promised.pop(address, None)
        if region is not None:
            o = region.object
            if (o.number, o.generation) == (number, generation):
                self.objects.begin(region)
                worker.regions[address] = region
                return True
            self.objects.drop(region)
        # Made by another thread of the parent between its hook and the fork: a private one, which
        # nobody has shared with this child, is not its.
        made = self.objects.live.get(number)
        if made is None or made.generation != generation or made.released or made.private:
            return False
        worker.regions[address] = self.objects.map(worker.number, made, address)
        return True

    def _fork(self, worker: _Worker) -> tuple[Message, tuple[int, ...]]:
        """Keep a place for a child, with references for all that it will inherit."""
        number = self._free_number()
        sock, child_sock = protocol.pair()
        channel, child_channel = protocol.pair()
        child = _Worker(number, self._new_serial(), sock, channel)
        try:
            child.promised = self.objects.promise(number, worker.regions.values())
            self._keep_place(child)
        except BaseException:
            for end in (sock, child_sock, channel, child_channel):
                end.close()
            for region in child.promised.values():
                self.objects.drop(region)
            raise
        self._expect(child)
        return {}, (child_sock.detach(), child_channel.detach())

    def _free_number(self) -> int:
        """Find a place for one more process."""
        self._check_descriptors(_WORKER_FDS)
        number = next((n for n in range(1, MAX_WORKERS) if n not in self._workers), None)
        room = (self._frame_count - 32) // 4
        if number is None or len(self._workers) >= room:
            raise Error(
                f"the pool has {len(self._workers)} processes; {min(room, MAX_WORKERS)} "
                "are the most for its memory: give it a larger budget or smaller pages"
            )
        return number

    def _check_descriptors(self, wanted: int) -> None:
        """Refuse what would not leave descriptors enough to go on: one that finds no room is lost.

        The kernel keeps no more for a user's vaults, either, than the limit on open files says.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        coming = sum(_WORKER_FDS for worker in self._workers.values() if not worker.attached)
        own = config.own_descriptors(limit)
        used = self._vault.held + coming + 2 * len(self._workers) + own
        if limit != resource.RLIM_INFINITY and used + wanted > limit:
            raise OSError(
                errno.EMFILE,
                f"the swapper may have {limit} descriptors, too few for one more file or process "
                "here: raise the hard limit on open files (ulimit -Hn) before the pool is made",
            )

    def _admit(self, sock: socket.socket) -> tuple[Message, tuple[int, ...]]:
        """Give a process that has proven itself a place, and the segments; `hello` comes next."""
        self._check_open()
        number = self._free_number()
        with ExitStack() as undo:
            # Only the swapper writes the tables.
            path = f"/proc/self/fd/{self._setup['control_fd']}"
            control = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            undo.callback(os.close, control)
            store = os.dup(self._setup["store_fd"])
            undo.callback(os.close, store)
            ends = self._vault.ends()
            for fd in ends:
                undo.callback(os.close, fd)
            channel, theirs = protocol.pair()
            worker = _Worker(number, self._new_serial(), sock, channel)
            self._keep_place(worker)
            undo.pop_all()
        self._expect(worker)
        out = (control, store, theirs.detach(), *ends)
        return {"settings": self._setup["settings"]}, out

    def _keep_place(self, worker: _Worker) -> None:
        """Keep a place, and the sockets of who will come, for the swapper after this one."""
        kept = worker.sock.fileno(), worker.channel.fileno()
        self._vault.put("worker", worker.number, worker.serial, {}, kept)
        self.tables.worker_place(worker.number, PLACE_PROMISED, worker.serial)

    def _check_open(self) -> None:
        if self.objects.closed or self._creator_gone:
            why = "its creator has ended" if self._creator_gone else "it was closed"
            raise PoolClosedError(
                f"pool {self._setup['name']!r} is closed, since {why}: nobody attaches to it"
            )

    def _lost(self, worker: _Worker) -> None:
        """A worker's connection or process has ended; both may be told of in one round."""
        if self._workers.get(worker.number) is not worker:
            return
        if not worker.silent:
            worker.silent = True
            self._selector.unregister(worker.sock)
        if worker not in self._leaving:
            self._try_end(worker)

    def _try_end(self, worker: _Worker) -> None:
        """End a worker once its memory is gone, or at once where it maps nothing.

        One that only closed its socket is served on as long as it maps an array.
        """
        may_touch = worker.attached and not worker.farewell and bool(worker.regions)
        if may_touch and not self.tables.worker_gone(worker.number):
            if _has_ended(worker.pidfd) and worker not in self._leaving:
                # From here on the timer asks: the pidfd would be readable all the time.
                self._selector.unregister(worker.pidfd)
                self._leaving.append(worker)
            return
        if worker in self._leaving:
            self._leaving.remove(worker)
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        """Take back everything a process had: it can touch nothing any more."""
        self.swapoffs.cancel(worker.number)
        self.pins.end_all(worker.pins)
        regions = list(worker.regions.values())
        worker.regions.clear()
        self.objects.unmap(regions)
        for region in worker.promised.values():
            self.objects.drop(region)
        if worker.attached:
            self.tables.worker_end(worker.number)
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.pidfd)
            os.close(worker.pidfd)
        else:
            self.tables.worker_place(worker.number, PLACE_FREE, worker.serial)
        worker.attached = False
        self._close_line(worker)
        for end in (worker.channel, worker.sock):
            # The vault has it yet; the process, if it lives, is to know at once.
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._vault.forget("worker", worker.number, worker.serial)
        del self._workers[worker.number]
        if worker.number == 0:
            self._creator_gone = True
            self.objects.close()

    # Requests, each named by its op.

    def _do_create(self, worker: _Worker, message: Message) -> Message:
        if self._creator_gone:
            raise PoolClosedError("the pool's creator has ended: it makes no more arrays")
        address = protocol.count_of(message, "address")
        size = protocol.count_of(message, "size")
        made = self._made_before(worker, address)
        if made is not None:
            return made
        sparse = bool(message.get("sparse"))
        private = sparse or bool(message.get("private"))
        name = protocol.text_of(message, "name")
        o = self.objects.create(
            size, name, private=private, sparse=sparse, row_bytes=_row_of(message)
        )
        worker.regions[address] = self.objects.map(worker.number, o, address)
        return {"object": o.number, "generation": o.generation, "base": o.base}

    # What pickles and names refer to.

    def _do_map(self, worker: _Worker, message: Message) -> Message:
        """Map an object that a pickle or a name refers to, once in a process."""
        address, number = (protocol.count_of(message, name) for name in ("address", "object"))
        if self._made_before(worker, address) is not None:
            o = worker.regions[address].object
            if message.get("loaded"):
                self._receive(worker, message, o)
            return {"base": o.base, "read_only": o.read_only, "label": o.label}
        o = self.objects.find(number, protocol.count_of(message, "generation"))
        self._check_open()
        if o.private:
            raise ValueError("a private array is each process's own")
        if any(region.object is o for region in worker.regions.values()):
            # Another thread is about to say that it has unmapped it.
            return {"busy": True}
        if o.pages * self._setup["sizes"]["page_bytes"] != protocol.count_of(message, "mapped"):
            raise ValueError("the array is of another size")
        worker.regions[address] = self.objects.map(worker.number, o, address)
        if message.get("loaded"):
            self._receive(worker, message, o)
        return {"base": o.base, "read_only": o.read_only, "label": o.label}

    def _do_send(self, worker: _Worker, message: Message) -> Message:
        """Add a reference for a pickle."""
        o = self._region(worker, message).object
        self._check_open()
        if o.private:
            raise ValueError("a private array is each process's own")
        self.objects.find(o.number, o.generation)
        if not self._served_before(worker, message):
            self.objects.send(o, (worker.number, message["seq"]))
        return {}

    def _do_receive(self, worker: _Worker, message: Message) -> Message:
        """Take over a pickle's reference of what this process maps already."""
        self._do_touch(worker, message)
        self._receive(worker, message, self._region(worker, message).object)
        return {}

    def _receive(self, worker: _Worker, message: Message, o: PagedObject) -> None:
        if not self._served_before(worker, message):
            self.objects.receive(o, (worker.number, message["seq"]))

    def _served_before(self, worker: _Worker, message: Message) -> bool:
        """Whether another swapper had counted what a request asks for, which comes again."""
        if self._left is None or not worker.resumed:
            return False
        return bool(self._left.served(worker.number) == message["seq"])

    def _do_touch(self, worker: _Worker, message: Message) -> Message:
        """See whether what this process maps lives still."""
        o = self._region(worker, message).object
        self.objects.find(o.number, o.generation)
        return {}

    def _do_name(self, worker: _Worker, message: Message) -> Message:
        """Have an array found by a name."""
        o = self._region(worker, message).object
        self.objects.name(o, *(protocol.text_of(message, name) for name in ("label", "layout")))
        return {}

    def _do_drop_transit(self, worker: _Worker, message: Message) -> Message:
        age_s = protocol.count_of(message, "older_than_ns") / 1e9
        return {"dropped": self.objects.drop_transits(age_s)}

    def _do_keep(self, worker: _Worker, message: Message) -> Message:
        """Have an object live until it is told that it need not."""
        number, generation = (protocol.count_of(message, n) for n in ("object", "generation"))
        self.objects.keep(self.objects.find(number, generation), kept=bool(message.get("kept")))
        return {}

    def _do_named(self, worker: _Worker, message: Message) -> Message:
        """Tell which arrays have a name."""
        label = protocol.text_of(message, "label")
        page_bytes = self._setup["sizes"]["page_bytes"]
        found = [o for o in self.objects.live.values() if o.label == label and not o.released]
        rows = [(o.number, o.generation, o.pages * page_bytes, o.layout) for o in found[:2]]
        return {"arrays": rows}

    @staticmethod
    def _made_before(worker: _Worker, address: int) -> Message | None:
        """What another swapper had made of a request that comes again."""
        region = worker.regions.get(address) if worker.resumed else None
        if region is None:
            return None
        o = region.object
        return {"object": o.number, "generation": o.generation, "base": o.base}

    # A worker's allocator has a line of its own, since it can run no Python code.

    def _open_line(self, worker: _Worker, fds: list[int]) -> Message:
        """Take the end of a worker's line, in place of the one before."""
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise ValueError("line comes with one descriptor")
        line = socket.socket(fileno=fds[0])
        if (line.family, line.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            line.close()
            raise ValueError("a line is a socket of packets")
        self._close_line(worker)
        worker.line = line
        self._selector.register(line, selectors.EVENT_READ, lambda: self._serve_line(worker, line))
        return {}

    def _close_line(self, worker: _Worker) -> None:
        if worker.line is not None:
            self._selector.unregister(worker.line)
            worker.line.close()
            worker.line = None

    def _serve_line(self, worker: _Worker, line: socket.socket) -> None:
        """One order of an allocator, about a range: the answer is a number."""
        if worker.line is not line:
            return
        try:
            words = protocol.receive_words(line)
            line.send(protocol.pack_answer(self._obey_line(worker, *words)), socket.MSG_DONTWAIT)
        except (OSError, ValueError):
            self._close_line(worker)

    def _obey_line(
        self, worker: _Worker, order: int, address: int, first: int, count: int, to: int
    ) -> int:
        region = worker.regions.get(address)
        if region is None or not region.object.sparse or region.object.released:
            return -errno.ESRCH
        if not count or first + count > region.object.pages:
            return -errno.EINVAL
        if order == protocol.LINE_END:
            return self.objects.end_range(region, first, count)
        if order == protocol.LINE_LOOK:
            return self.objects.look_at(region, first, min(count, protocol.LOOK_PAGES))
        if order == protocol.LINE_MOVE:
            if to + count > region.object.pages or abs(to - first) < count:
                return -errno.EINVAL
            return self.objects.move_range(region, first, count, to)
        if self.objects.closed or self._creator_gone:
            return -errno.ESHUTDOWN
        return self.objects.begin_range(region, first, count)

    def _open(self, worker: _Worker, message: Message, fds: list[int]) -> Message:
        """Make an array whose pages come from a file."""
        with ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            if self._creator_gone:
                raise PoolClosedError("the pool's creator has ended: it makes no more arrays")
            if len(fds) != 1 or not stat.S_ISREG(os.fstat(fds[0]).st_mode):
                raise ValueError("open comes with the descriptor of a file")
            self._check_descriptors(1)
            address = protocol.count_of(message, "address")
            made = self._made_before(worker, address)
            if made is not None:
                return made
            size, offset = protocol.count_of(message, "size"), protocol.count_of(message, "offset")
            if size == 0 or offset + size > os.fstat(fds[0]).st_size:
                raise ValueError("the file is shorter than the array")
            stamp = protocol.count_of(message, "stamp")
            backing = Backing(fds[0], bool(message.get("read_only")), offset, stamp)
            name = protocol.text_of(message, "name")
            o = self.objects.create(size, name, backing=backing, row_bytes=_row_of(message))
        worker.regions[address] = self.objects.map(worker.number, o, address)
        return {"object": o.number, "generation": o.generation, "base": o.base}

    def _do_remove(self, worker: _Worker, message: Message) -> Message:
        region = worker.regions.pop(protocol.count_of(message, "address"), None)
        if region is not None:
            self.objects.unmap([region])
        return {}

    def _do_release(self, worker: _Worker, message: Message) -> Message:
        o = self._region(worker, message).object
        if o.private:
            raise ValueError("a private array is each process's own: it ends with its last name")
        self.objects.release(o)
        return {}

    def _do_snapshot(self, worker: _Worker, message: Message) -> Message:
        region = self._region(worker, message)
        target = protocol.count_of(message, "target")
        if not region.object.private:
            raise ValueError("a shared array has no snapshots")
        if not (worker.resumed and target in worker.regions):
            worker.regions[target] = self.objects.snapshot(worker.number, region, target)
        made = worker.regions[target]
        return {"object": made.object.number, "generation": made.object.generation}

    def _do_runs(self, worker: _Worker, message: Message) -> Message:
        """Tell where an array's pages are: (index, pages, page id), a message full at a time."""
        region = self._region(worker, message)
        first, count = (protocol.count_of(message, name) for name in ("first", "count"))
        if first + count > region.object.pages:
            raise ValueError("a range of pages beyond the array")
        limit = config.REQUEST_RANGES
        return {
            "runs": self.tables.region_runs(region.number, region.generation, first, count, limit)
        }

    def _do_advise(self, worker: _Worker, message: Message) -> Message:
        advice = protocol.text_of(message, "advice")
        region = self._region(worker, message)
        ranges = self._ranges(region, message)
        if advice in _ADVICE:
            self.objects.advise(region, _ADVICE[advice])
            return {}
        work = {"willneed": self.tables.prefetch, "dontneed": self.tables.cool}.get(advice)
        if work is None:
            raise ValueError(f"no advice {advice!r}")
        for first, count in ranges:
            work(region.number, region.generation, first, count)
        return {}

    def _swapon(self, worker: _Worker, message: Message, fds: list[int]) -> Message:
        maker = [worker.number, worker.serial, message["seq"]]
        with ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
            if len(fds) != 1:
                raise ValueError("swapon comes with one descriptor")
            self._check_descriptors(1)
            made = self.areas.made_by(maker)
            if made is not None:
                return {"area": made}
            size = protocol.count_of(message, "size")
            if not size or size % self._setup["sizes"]["page_bytes"]:
                raise ValueError(f"a swap area of {size} bytes is not of whole pages")
            # A pidfd or a socket would have no size; a file that is too short could not be read.
            if os.fstat(fds[0]).st_size < size:
                raise ValueError("the swap file is shorter than the area")
            priority = message.get("priority")
            if type(priority) is not int or not -(1 << 31) <= priority < 1 << 31:
                raise ValueError("priority must be an integer of 32 bits")
            path = protocol.text_of(message, "path")
            number = self.areas.add(path, fds[0], size, priority, maker)
            undo.pop_all()
        return {"area": number}

    def _do_swaps(self, worker: _Worker, message: Message) -> Message:
        return {"areas": [asdict(area) for area in self.areas.records()]}

    def _do_swapoff(self, worker: _Worker, message: Message) -> Message:
        return {"total": self.swapoffs.begin(protocol.count_of(message, "area"), worker.number)}

    def _do_swapoff_cancel(self, worker: _Worker, message: Message) -> Message:
        self.swapoffs.cancel(worker.number)
        return {}

    def _do_unpin(self, worker: _Worker, message: Message) -> Message:
        self.pins.cancel(worker.pins, protocol.count_of(message, "pin"))
        return {}

    def _do_close(self, worker: _Worker, message: Message) -> Message:
        if worker.number == 0:
            self.objects.close()
            self.tables.set_closed()
        return {}

    def _do_bye(self, worker: _Worker, message: Message) -> Message:
        """Leave in good order; the process has unmapped all its regions."""
        if worker.regions:
            raise ValueError("bye with regions left")
        worker.farewell = True
        return {}

    def _do_check(self, worker: _Worker, message: Message) -> Message:
        """Check the tables; readahead that is still under way is given time to end."""
        deadline = time.monotonic() + config.CHECK_S
        while True:
            self.objects.sweep()
            try:
                self.tables.check()
            except AssertionError as error:
                if time.monotonic() > deadline:
                    return {"broken": str(error)}
                time.sleep(config.RETRY_S)
            else:
                return {}

    # Requests that take long run in the service threads.

    def _later(
        self,
        worker: _Worker,
        message: Message,
        work: Callable[[], Message],
        done: Callable[[Message], Message] | None = None,
    ) -> None:
        """Answer a request with what `work` returns in a service thread, and `done` makes of it."""
        worker.waiting += 1

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 (the worker waits for an answer)
                result = protocol.failure(error)
            self._finished.put(lambda: answer(result))
            # A full pipe has woken the main thread already.
            with suppress(BlockingIOError):
                os.write(self._finished_w, b"x")

        def answer(result: Message) -> None:
            worker.waiting -= 1
            self._reply(worker, message, done(result) if done else result)

        self._service.submit(run)

    def _begin_pageout(self, worker: _Worker, message: Message) -> None:
        region = self._region(worker, message)
        ranges = self._ranges(region, message)
        self._later(worker, message, lambda: self._evict_pages(region, ranges))

    def _begin_pin(self, worker: _Worker, message: Message) -> None:
        region, number = self._region(worker, message), protocol.count_of(message, "pin")
        ranges, write = self._ranges(region, message), bool(message.get("write"))
        made = worker.pins.granted.get(number) if worker.resumed else None
        if made is not None and made.ranges == ranges:
            self._reply(worker, message, {})
            return
        if made is not None:
            # Another swapper had come so far.
            self.pins.end(worker.pins, number)
        if region.object.read_only and write:
            raise ValueError("the array is open for reading: nothing may write to it")
        frames = self._frame_count
        limit = self._pin_limit(frames)
        pin = self.pins.take(worker.pins, number, region, ranges, write, limit, frames)

        def end(result: Message) -> Message:
            gone = worker.regions.get(region.address) is not region
            return self.pins.grant(worker.pins, number, pin, result, gone=gone)

        self._later(worker, message, lambda: self.pins.hold(pin), end)

    def _begin_resize(self, worker: _Worker, message: Message) -> None:
        """Have more frames at once, or fewer once they are free."""
        wanted, before = protocol.count_of(message, "frames"), self._frame_count
        if self._resizing:
            raise ValueError("the pool is being resized already")
        if wanted < 128 or (wanted - 32) // 4 < len(self._workers):
            raise ValueError(
                f"{wanted} frames are too few for {len(self._workers)} processes: a pool needs "
                f"{max(128, 4 * len(self._workers) + 32)}"
            )
        if self.pins.pages > self._pin_limit(wanted):
            raise MemoryError(f"{self.pins.pages} pages are pinned, too many for {wanted} frames")
        # Until the last frame has retired, the budget is the old one.
        self._set_frames(wanted, max(wanted, before))
        if wanted >= before:
            self._grow(worker, message, before, wanted)
            return
        self._resizing = True

        def end(result: Message) -> Message:
            self._resizing = False
            frames = before if "error" in result else wanted
            self._set_frames(frames, frames)
            return result

        self._later(worker, message, lambda: self._retire(before - wanted), end)

    def _grow(self, worker: _Worker, message: Message, before: int, wanted: int) -> None:
        try:
            self.tables.frames_add(wanted - before)
        except BaseException:
            self._set_frames(before, before)
            raise
        self._reply(worker, message, {})

    def _set_frames(self, frame_count: int, memory_pages: int) -> None:
        """Go by another number of frames: what may be pinned and committed, when to reclaim."""
        bounds = config.bounds(frame_count, self._setup["sizes"]["page_bytes"])
        self.areas.resize(frame_count, bounds.reserve_pages)
        self.tables.set_bounds(memory_pages, asdict(bounds))
        self._frame_count = frame_count

    def _retire(self, frames: int) -> Message:
        """Take frames out of use, in a service thread; all or none."""
        for done in range(frames):
            if not self.tables.frame_retire(config.RETIRE_WAIT_S):
                self.tables.frames_add(done)
                raise MemoryError(f"of {frames} frames only {done} became free in time")
        return {}

    def _begin_drain(self, worker: _Worker, message: Message) -> None:
        """Have some pages leave a swap area; tells how many have slots of it still."""
        number = protocol.count_of(message, "area")
        if worker.resumed:
            if self.swapoffs.is_over(number):
                self._reply(worker, message, {"left": 0})
                return
            self.swapoffs.resume(number, worker.number)
        going = self.swapoffs.find(number, worker.number)
        owners = self.objects.owners()

        def end(result: Message) -> Message:
            self.swapoffs.end(number)
            return result

        self._later(worker, message, lambda: self.swapoffs.move(going, owners), end)

    def _finish(self) -> None:
        os.read(self._finished_r, 4096)
        while not self._finished.empty():
            self._finished.get()()

    def _pin_limit(self, frame_count: int) -> int:
        """How many pages may be pinned: what is left must be enough to exchange pages."""
        bounds = config.bounds(frame_count, self._setup["sizes"]["page_bytes"])
        return frame_count - 2 * bounds.high_frames - len(self._workers)

    def _evict_pages(self, region: RegionRecord, ranges: list[tuple[int, int]]) -> Message:
        """Evict, in a service thread; tells how many pages stay."""
        which = region.number, region.generation
        return {"left": sum(self.tables.evict(*which, first, count) for first, count in ranges)}

    # Checks.

    @staticmethod
    def _region(worker: _Worker, message: Message) -> RegionRecord:
        region = worker.regions.get(protocol.count_of(message, "address"))
        if region is None:
            raise ValueError("no array is mapped there")
        return region

    @staticmethod
    def _ranges(region: RegionRecord, message: Message) -> list[tuple[int, int]]:
        rows = protocol.counts_of(message, "ranges", 2, config.REQUEST_RANGES)
        if any(count < 1 or first + count > region.object.pages for first, count in rows):
            raise ValueError("a range of pages beyond the array")
        return [(first, count) for first, count in rows]


def _row_of(message: Message) -> int:
    """How far apart the rows of a new array are; 0: that is not said."""
    return protocol.count_of(message, "row") if "row" in message else 0


def _inherited(message: Message) -> list[list[int]]:
    """What a child says that it mapped: address, object and generation of each."""
    return protocol.counts_of(message, "regions", 3, config.HELLO_REGIONS)


def _mappings_limit() -> int:
    """How many mappings the kernel lets a process have."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def _has_ended(pidfd: int) -> bool:
    """Whether a process has; select() would not take a descriptor over 1023."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def take_fence(control_fd: int) -> int | None:
    """Lock the control segment until this process ends; None where another swapper has it.

    The lock belongs to an open file description that nobody else has, and is given back by the
    kernel when all threads of this process have ended: so there are never two swappers at once.
    """
    fence = os.open(f"/proc/self/fd/{control_fd}", os.O_RDONLY | os.O_CLOEXEC)
    deadline = time.monotonic() + config.FENCE_S
    while True:
        try:
            fcntl.flock(fence, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(config.RETRY_S)
        else:
            return fence


def _start_thread(loop: Callable[..., None], *args: int) -> None:
    """Run a loop in a daemon thread that tools like top show under the loop's name."""
    name = loop.__name__.removesuffix("_loop")

    def run() -> None:
        with suppress(OSError):
            Path("/proc/thread-self/comm").write_text(name)
        loop(*args)

    threading.Thread(target=run, name=name, daemon=True).start()


def main() -> None:
    """Run the swapper: the setup is the last argument, as JSON."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # It ends by itself when its workers have; a broadcast signal must not take their data before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Five descriptors a worker: the usual soft limit of 1024 would not do for MAX_WORKERS.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    setup = json.loads(sys.argv[-1])
    fence = take_fence(setup["control_fd"])
    if fence is None:
        _log.warning("pyswap: another swapper is there: this one ends")
        os._exit(1)
    vault = Vault(*setup["vault"])
    left = vault.look() if setup.get("successor") else None
    if left is not None:
        pool = next(deposit for deposit in left if deposit.kind == "pool")
        os.close(setup["control_fd"])
        setup = {**pool.facts, **dict(zip(_POOL_FDS, pool.fds, strict=True))}
    Server(setup, vault, left).run()
    # The loops are daemon threads, in waits that nothing more will end.
    os._exit(0)

"""The swapper process: serves its workers' requests, and runs the threads that move pages.

It is its own session, started by `pyswap.worker` and known by "pyswap.swapper" in its command
line.  It ends by itself when no worker is left, or when creation has ended and no array lives.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from . import config, protocol
from ._native import native
from .errors import Error, PoolClosedError
from .objects import Objects, PagedObject, RegionRecord
from .protocol import Message

_log = logging.getLogger("pyswap")

MAX_WORKERS = 256
_ADVICE = {"normal": 0, "sequential": 1, "random": 2}


@dataclass
class _Pin:
    """Pinned ranges of one worker: (object, first page, pages)."""

    ranges: list[tuple[PagedObject, int, int]]
    write: bool
    pages: int


@dataclass
class _Worker:
    """One attached process, or the place kept for a child that is being forked.

    `promised` has the object and the advice of what a child will map, by address.
    """

    number: int
    sock: socket.socket
    channel: socket.socket
    promised: dict[int, tuple[PagedObject, int]] = field(default_factory=dict)
    regions: dict[int, RegionRecord] = field(default_factory=dict)
    pins: dict[int, _Pin] = field(default_factory=dict)
    cancelled: set[int] = field(default_factory=set)
    attached: bool = False
    silent: bool = False
    farewell: bool = False
    pidfd: int = -1
    pid: int = 0


class Server:
    """The main thread of a swapper.

    Parameters
    ----------
    setup : dict
        What the creator chose; see `pyswap.worker.start_swapper`.
    """

    def __init__(self, setup: Message) -> None:
        self._setup = setup
        self._poll = select.epoll()
        self.tables = native.Swapper(
            setup["control_fd"],
            setup["store_fd"],
            setup["swap_fd"],
            self._poll.fileno(),
            setup["sizes"],
        )
        sizes = setup["sizes"]
        limit = None if setup["overcommit"] else sizes["commit_limit_pages"]
        self.objects = Objects(self.tables, sizes["page_bytes"], sizes["page_count"], limit)
        self._workers: dict[int, _Worker] = {}
        self._leaving: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._service = ThreadPoolExecutor(config.SERVICE_THREADS, "service")
        self._finished: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._finished_r, self._finished_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._creator_gone = False
        self._pinned_pages = 0
        self._next_online = 0.0

    # The loop.

    def run(self) -> None:
        """Serve until nobody is left."""
        sock = socket.socket(fileno=self._setup["sock_fd"])
        channel = socket.socket(fileno=self._setup["channel_fd"])
        self._expect(_Worker(0, sock, channel))
        self._start_threads()
        while not self._is_over():
            timeout = config.RETRY_S if self._busy() else config.OFFLINE_RETRY_S
            for key, _ in self._selector.select(timeout):
                key.data()
            self._tend()
        self.tables.set_ended()

    def _start_threads(self) -> None:
        loops = (
            [self.tables.fault_loop] * config.FAULT_THREADS
            + [self.tables.starved_loop] * config.STARVED_THREADS
            + [self.tables.readahead_loop] * config.READAHEAD_THREADS
            + [self.tables.reclaim_loop, self.tables.write_ahead_loop]
        )
        for loop in loops:
            threading.Thread(target=loop, name=loop.__name__, daemon=True).start()
        self._selector.register(self._finished_r, selectors.EVENT_READ, self._finish)

    def _is_over(self) -> bool:
        if not self._workers:
            return True
        return (self.objects.closed or self._creator_gone) and not self.objects.live

    def _busy(self) -> bool:
        return bool(self._leaving) or not self.objects.sweep()

    def _tend(self) -> None:
        """Finish what could not be finished at once."""
        for worker in list(self._leaving):
            self._try_end(worker)
        if time.monotonic() >= self._next_online:
            self._next_online = time.monotonic() + config.OFFLINE_RETRY_S
            self.tables.frames_online(config.BATCH_PAGES)
            # One that another program replaced may have been looked at by somebody at the time.
            for worker in [w for w in self._workers.values() if w.silent]:
                self._try_end(worker)

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
            _log.warning("pyswap: worker %d sent no message and is cut off: %s", worker.pid, error)
            self._lost(worker)
            return
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
            protocol.send(worker.sock, {**reply, "seq": message.get("seq")}, fds)
        except OSError:
            pass  # It is gone; its end of file says so.
        finally:
            for fd in fds:
                os.close(fd)

    def _handle(
        self, worker: _Worker, message: Message, fds: list[int]
    ) -> tuple[Message | None, tuple[int, ...]]:
        op = message.get("op")
        if op == "hello":
            return self._hello(worker, message, fds), ()
        for fd in fds:
            os.close(fd)
        if not worker.attached:
            raise ValueError("the first request must be hello")
        if op == "fork":
            return self._fork(worker)
        if op in ("pin", "pageout"):
            self._serve_later(worker, message, op)
            return None, ()
        handler = getattr(self, f"_do_{op}", None) if isinstance(op, str) else None
        if handler is None:
            raise ValueError(f"no request {op!r}")
        return handler(worker, message), ()

    def _hello(self, worker: _Worker, message: Message, fds: list[int]) -> Message:
        """Attach a process: its userfaultfd, its pidfd, and where it mapped what it inherited."""
        if worker.attached or len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise ValueError("hello comes once, with two descriptors")
        uffd, worker.pidfd = fds
        worker.pid = int(message["pid"])
        self.tables.worker_begin(worker.number, worker.pid, uffd, os.dup(worker.channel.fileno()))
        worker.attached = True
        self._selector.register(worker.pidfd, selectors.EVENT_READ, lambda: self._lost(worker))
        return self._do_inherit(worker, message)

    def _do_inherit(self, worker: _Worker, message: Message) -> Message:
        """Note a child's regions, a message full at a time; what was promised beyond is dropped."""
        lost = [
            int(a)
            for a, number, generation in message["regions"]
            if not self._inherit(worker, int(a), int(number), int(generation))
        ]
        if message["last"]:
            for o, _ in worker.promised.values():
                self.objects.unrefer(o)
            worker.promised.clear()
        return {"lost": lost}

    def _inherit(self, worker: _Worker, address: int, number: int, generation: int) -> bool:
        """Note a region that a child mapped again; False where its object is gone."""
        o, advice = worker.promised.pop(address, (None, 0))
        if o is None or (o.number, o.generation) != (number, generation):
            if o is not None:
                self.objects.unrefer(o)
            # Made by another thread of the parent between its hook and the fork.
            o = self.objects.live.get(number)
            if o is None or o.generation != generation or o.released:
                return False
            self.objects.refer(o)
        try:
            worker.regions[address] = self.objects.map(worker.number, o, address, advice)
        except BaseException:
            self.objects.unrefer(o)
            raise
        return True

    def _fork(self, worker: _Worker) -> tuple[Message, tuple[int, ...]]:
        """Keep a place for a child, with references for all that it will inherit."""
        number = next((n for n in range(1, MAX_WORKERS) if n not in self._workers), None)
        room = (self._setup["sizes"]["frame_count"] - 32) // 4
        if number is None or len(self._workers) >= room:
            raise Error(
                f"the pool has {len(self._workers)} processes; {min(room, MAX_WORKERS)} "
                "are the most for its memory: give it a larger budget or smaller pages"
            )
        sock, child_sock = protocol.pair()
        channel, child_channel = protocol.pair()
        child = _Worker(number, sock, channel)
        for address, region in worker.regions.items():
            self.objects.refer(region.object)
            child.promised[address] = region.object, region.advice
        self._expect(child)
        return {}, (child_sock.detach(), child_channel.detach())

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
                self._leaving.append(worker)
            return
        if worker in self._leaving:
            self._leaving.remove(worker)
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        """Take back everything a process had: it can touch nothing any more."""
        for pin in list(worker.pins):
            self._unpin(worker, pin)
        regions = list(worker.regions.values())
        worker.regions.clear()
        self.objects.unmap(regions)
        for o, _ in worker.promised.values():
            self.objects.unrefer(o)
        if worker.attached:
            self.tables.worker_end(worker.number)
            self._selector.unregister(worker.pidfd)
            os.close(worker.pidfd)
        worker.attached = False
        worker.channel.close()
        worker.sock.close()
        del self._workers[worker.number]
        if worker.number == 0:
            self._creator_gone = True

    # Requests, each named by its op.

    def _do_create(self, worker: _Worker, message: Message) -> Message:
        if self._creator_gone:
            raise PoolClosedError("the pool's creator has ended: it makes no more arrays")
        address = int(message["address"])
        o = self.objects.create(int(message["size"]), str(message["name"]))
        self.objects.refer(o)
        try:
            worker.regions[address] = self.objects.map(worker.number, o, address)
        except BaseException:
            self.objects.unrefer(o)
            raise
        return {"object": o.number, "generation": o.generation, "base": o.base}

    def _do_remove(self, worker: _Worker, message: Message) -> Message:
        region = worker.regions.pop(int(message["address"]), None)
        if region is not None:
            self.objects.unmap([region])
        return {}

    def _do_release(self, worker: _Worker, message: Message) -> Message:
        self.objects.release(self._region(worker, message["address"]).object)
        return {}

    def _do_advise(self, worker: _Worker, message: Message) -> Message:
        advice = message["advice"]
        region = self._region(worker, message["address"])
        if advice in _ADVICE:
            self.objects.advise(region, _ADVICE[advice])
            return {}
        work = {"willneed": self.tables.prefetch, "dontneed": self.tables.cool}.get(advice)
        if work is None:
            raise ValueError(f"no advice {advice!r}")
        for first, count in self._ranges(region, message["ranges"]):
            work(region.object.number, first, count)
        return {}

    def _do_unpin(self, worker: _Worker, message: Message) -> Message:
        if int(message["pin"]) not in worker.pins:
            # Interrupted before it was granted: it goes as soon as it comes.
            worker.cancelled.add(int(message["pin"]))
        self._unpin(worker, int(message["pin"]))
        return {}

    def _do_close(self, worker: _Worker, message: Message) -> Message:
        if worker.number == 0:
            self.objects.closed = True
            self.tables.set_closed()
        return {}

    def _do_bye(self, worker: _Worker, message: Message) -> Message:
        """Leave in good order; the process has unmapped all its regions."""
        if worker.regions:
            raise ValueError("bye with regions left")
        worker.farewell = True
        return {}

    def _do_check(self, worker: _Worker, message: Message) -> Message:
        self.objects.sweep()
        try:
            self.tables.check()
        except AssertionError as error:
            return {"broken": str(error)}
        return {}

    def _do_failpoint(self, worker: _Worker, message: Message) -> Message:
        self.tables.failpoint(
            native.FAILPOINT_NAMES.index(message["name"]),
            native.FAILPOINT_ACTIONS.index(message["action"]),
            int(message["value"]),
            int(message["skip"]),
            int(message["limit"]),
        )
        if message["action"] == "off":
            self.tables.failpoint_release(native.FAILPOINT_NAMES.index(message["name"]))
        return {}

    # Requests that take long run in the service threads.

    def _serve_later(self, worker: _Worker, message: Message, op: str) -> None:
        region = self._region(worker, message["address"])
        ranges = self._ranges(region, message["ranges"])
        pages = sum(count for _, count in ranges)
        if op == "pin":
            self._pinned_pages += self._pin_room(pages)
        work = self._pin_ranges if op == "pin" else self._evict_ranges
        done = self._pinned if op == "pin" else self._evicted

        def finish(result: Any) -> None:
            self._finished.put(lambda: done(worker, message, region, ranges, result))
            os.write(self._finished_w, b"x")

        def run() -> None:
            try:
                finish(work(region, ranges, bool(message.get("write"))))
            except Exception as error:  # noqa: BLE001 (the worker waits for an answer)
                finish(error)

        self._service.submit(run)

    def _finish(self) -> None:
        os.read(self._finished_r, 4096)
        while not self._finished.empty():
            self._finished.get()()

    def _pin_room(self, pages: int) -> int:
        """Return `pages` if so many more may be pinned: the rest must be enough for exchange."""
        sizes = self._setup["sizes"]
        limit = sizes["frame_count"] - 2 * sizes["high_frames"] - len(self._workers)
        if self._pinned_pages + pages > limit:
            raise MemoryError(
                f"{pages} pages do not fit beside {self._pinned_pages} that are pinned: of "
                f"{sizes['frame_count']} frames {limit} may be"
            )
        return pages

    def _pin_ranges(self, region: RegionRecord, ranges: list[tuple[int, int]], write: bool) -> None:
        done: list[tuple[int, int]] = []
        try:
            for first, count in ranges:
                self.tables.pin(region.number, region.generation, first, count, write)
                done.append((first, count))
        except BaseException:
            self._unpin_ranges(region.object, done, write)
            raise

    def _unpin_ranges(self, o: PagedObject, ranges: list[tuple[int, int]], write: bool) -> None:
        for first, count in ranges:
            self.tables.unpin(o.number, o.generation, first, count, write)

    def _pinned(
        self,
        worker: _Worker,
        message: Message,
        region: RegionRecord,
        ranges: list[tuple[int, int]],
        result: Any,
    ) -> None:
        pages = sum(count for _, count in ranges)
        if isinstance(result, Exception):
            self._pinned_pages -= pages
            worker.cancelled.discard(int(message["pin"]))
            self._reply(worker, message, protocol.failure(result))
            return
        if worker.regions.get(region.address) is not region:
            # The worker ended meanwhile, or its array: nobody else would take these pins back.
            self._pinned_pages -= pages
            self._unpin_ranges(region.object, ranges, bool(message.get("write")))
            self._reply(worker, message, protocol.failure(Error("the array is gone")))
            return
        number = int(message["pin"])
        pinned = [(region.object, first, count) for first, count in ranges]
        worker.pins[number] = _Pin(pinned, bool(message.get("write")), pages)
        if number in worker.cancelled:
            worker.cancelled.remove(number)
            self._unpin(worker, number)
        self._reply(worker, message, {})

    def _unpin(self, worker: _Worker, number: int) -> None:
        pin = worker.pins.pop(number, None)
        if pin is None:
            return
        self._pinned_pages -= pin.pages
        for o, first, count in pin.ranges:
            self.tables.unpin(o.number, o.generation, first, count, pin.write)

    def _evict_ranges(self, region: RegionRecord, ranges: list[tuple[int, int]], _: bool) -> int:
        left = 0
        for first, count in ranges:
            left += self.tables.evict(region.object.number, first, count)
        return left

    def _evicted(
        self,
        worker: _Worker,
        message: Message,
        region: RegionRecord,
        ranges: list[tuple[int, int]],
        result: Any,
    ) -> None:
        if isinstance(result, Exception):
            self._reply(worker, message, protocol.failure(result))
        else:
            self._reply(worker, message, {"left": result})

    # Checks.

    @staticmethod
    def _region(worker: _Worker, address: Any) -> RegionRecord:
        region = worker.regions.get(int(address))
        if region is None:
            raise ValueError("no array is mapped there")
        return region

    @staticmethod
    def _ranges(region: RegionRecord, ranges: Any) -> list[tuple[int, int]]:
        checked = [(int(first), int(count)) for first, count in ranges]
        if any(
            first < 0 or count < 1 or first + count > region.object.pages
            for first, count in checked
        ):
            raise ValueError("a range of pages beyond the array")
        return checked


def _has_ended(pidfd: int) -> bool:
    """Whether a process has; select() would not take a descriptor over 1023."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def main() -> None:
    """Run the swapper: the setup is the last argument, as JSON."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # It ends by itself when its workers have; a broadcast signal must not take their data before.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Five descriptors a worker: the usual soft limit of 1024 would not do for MAX_WORKERS.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    Server(json.loads(sys.argv[-1])).run()
    # The loops are daemon threads, in waits that nothing more will end.
    os._exit(0)

"""The swapper process: serves its workers' requests, and runs the threads that move pages.

It is its own session, started by `pyswap.worker` and known by "pyswap.swapper" in its command
line.  It ends by itself when no worker is left, or when creation has ended and no array lives.
"""

from __future__ import annotations

import contextlib
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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from . import config, protocol
from ._native import native
from .errors import Error, PoolClosedError
from .objects import Objects, Promise, RegionRecord
from .protocol import Message

_log = logging.getLogger("pyswap")

MAX_WORKERS = 256
_ADVICE = {"normal": 0, "sequential": 1, "random": 2}


@dataclass
class _Pin:
    """Pages of one region: ranges (first, count) of page indices."""

    region: RegionRecord
    ranges: list[tuple[int, int]]
    write: bool
    pages: int


@dataclass
class _Worker:
    """One attached process, or the place kept for a child that is being forked.

    `promised` has what a child will map, by address.
    """

    number: int
    sock: socket.socket
    channel: socket.socket
    promised: dict[int, Promise] = field(default_factory=dict)
    regions: dict[int, RegionRecord] = field(default_factory=dict)
    pins: dict[int, _Pin] = field(default_factory=dict)
    pinning: set[int] = field(default_factory=set)
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
            {**setup["sizes"], "mappings_limit": _mappings_limit()},
        )
        sizes = setup["sizes"]
        self.objects = Objects(self.tables, sizes["page_bytes"], sizes["page_count"])
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
        with ExitStack() as undo:
            for fd in fds:
                undo.callback(os.close, fd)
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
            self.tables.worker_begin(worker.number, pid, uffd, channel)
            undo.pop_all()
        worker.pid, worker.pidfd, worker.attached = pid, pidfd, True
        return self._do_inherit(worker, message)

    def _do_inherit(self, worker: _Worker, message: Message) -> Message:
        """Note a child's regions, a message full at a time; what was promised beyond is dropped."""
        lost = [
            address
            for address, number, generation in _inherited(message)
            if not self._inherit(worker, address, number, generation)
        ]
        if message.get("last"):
            for promise in worker.promised.values():
                self.objects.unpromise(promise)
            worker.promised.clear()
        return {"lost": lost}

    def _inherit(self, worker: _Worker, address: int, number: int, generation: int) -> bool:
        """Note a region that a child mapped again; False where its object is gone."""
        promise = worker.promised.pop(address, None)
        if promise is not None:
            o = promise.object
            if (o.number, o.generation) == (number, generation):
                self._map(worker, promise, address)
                return True
            self.objects.unpromise(promise)
        # Made by another thread of the parent between its hook and the fork: a private one, which
        # nobody has shared with this child, is not its.
        made = self.objects.live.get(number)
        if made is None or made.generation != generation or made.released or made.private:
            return False
        self.objects.refer(made)
        self._map(worker, Promise(made, 0), address)
        return True

    def _map(self, worker: _Worker, promise: Promise, address: int) -> None:
        """Note a region, over a promise that is taken back where none can be."""
        try:
            worker.regions[address] = self.objects.map(
                worker.number, promise.object, address, promise.advice, promise.clone
            )
        except BaseException:
            self.objects.unpromise(promise)
            raise

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
        try:
            child.promised = self.objects.promise(worker.regions.values())
        except BaseException:
            for end in (sock, child_sock, channel, child_channel):
                end.close()
            raise
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
                # From here on the timer asks: the pidfd would be readable all the time.
                self._selector.unregister(worker.pidfd)
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
        for promise in worker.promised.values():
            self.objects.unpromise(promise)
        if worker.attached:
            self.tables.worker_end(worker.number)
            with contextlib.suppress(KeyError):
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
        address = protocol.count_of(message, "address")
        size = protocol.count_of(message, "size")
        private = bool(message.get("private"))
        o = self.objects.create(size, protocol.text_of(message, "name"), private=private)
        self.objects.refer(o)
        self._map(worker, Promise(o, 0), address)
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
        made = self.objects.snapshot(worker.number, region, target)
        worker.regions[target] = made
        return {"object": made.object.number, "generation": made.object.generation}

    def _do_runs(self, worker: _Worker, message: Message) -> Message:
        """Tell where an array's pages are: (index, pages, page id), a message full at a time."""
        region = self._region(worker, message)
        first = protocol.count_of(message, "first")
        count = min(protocol.count_of(message, "count"), region.object.pages - first)
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

    def _do_unpin(self, worker: _Worker, message: Message) -> Message:
        number = protocol.count_of(message, "pin")
        if number in worker.pinning:
            # Interrupted before it was granted: it goes as soon as it comes.
            worker.cancelled.add(number)
        self._unpin(worker, number)
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

    def _do_failpoint(self, worker: _Worker, message: Message) -> Message:
        which = native.FAILPOINT_NAMES.index(protocol.text_of(message, "name"))
        action = protocol.text_of(message, "action")
        self.tables.failpoint(
            which,
            native.FAILPOINT_ACTIONS.index(action),
            *(protocol.count_of(message, name) for name in ("value", "skip", "limit")),
        )
        if action == "off":
            self.tables.failpoint_release(which)
        return {}

    # Requests that take long run in the service threads.

    def _serve_later(self, worker: _Worker, message: Message, op: str) -> None:
        region = self._region(worker, message)
        ranges = self._ranges(region, message)
        pin = None
        if op == "pin":
            pin = self._pin_begin(worker, message, region, ranges)

        def run() -> None:
            try:
                result = self._pin_pages(pin) if pin else self._evict_pages(region, ranges)
            except Exception as error:  # noqa: BLE001 (the worker waits for an answer)
                result = protocol.failure(error)
            self._finished.put(lambda: self._later_done(worker, message, pin, result))
            # A full pipe has woken the main thread already.
            with suppress(BlockingIOError):
                os.write(self._finished_w, b"x")

        self._service.submit(run)

    def _later_done(
        self, worker: _Worker, message: Message, pin: _Pin | None, reply: Message
    ) -> None:
        if pin is not None:
            reply = self._pin_end(worker, message["pin"], pin, reply)
        self._reply(worker, message, reply)

    def _finish(self) -> None:
        os.read(self._finished_r, 4096)
        while not self._finished.empty():
            self._finished.get()()

    def _pin_begin(
        self,
        worker: _Worker,
        message: Message,
        region: RegionRecord,
        ranges: list[tuple[int, int]],
    ) -> _Pin:
        """Take room for a pin: what is left must be enough to exchange pages."""
        number = protocol.count_of(message, "pin")
        if number in worker.pins or number in worker.pinning:
            raise ValueError(f"pin {number} is there already")
        pin = _Pin(region, ranges, bool(message.get("write")), sum(n for _, n in ranges))
        sizes = self._setup["sizes"]
        limit = sizes["frame_count"] - 2 * sizes["high_frames"] - len(self._workers)
        if self._pinned_pages + pin.pages > limit:
            raise MemoryError(
                f"{pin.pages} pages do not fit beside {self._pinned_pages} that are pinned: of "
                f"{sizes['frame_count']} frames {limit} may be"
            )
        self._pinned_pages += pin.pages
        worker.pinning.add(number)
        return pin

    def _pin_pages(self, pin: _Pin) -> Message:
        """Pin all ranges or none, in a service thread."""
        region = pin.region
        done: list[tuple[int, int]] = []
        try:
            for first, count in pin.ranges:
                self.tables.pin(region.number, region.generation, first, count, pin.write)
                done.append((first, count))
        except BaseException:
            self._unpin_ranges(region, done, pin.write)
            raise
        return {}

    def _unpin_ranges(
        self, region: RegionRecord, ranges: list[tuple[int, int]], write: bool
    ) -> None:
        o = region.object
        for first, count in ranges:
            self.tables.unpin(
                region.number, region.generation, o.number, o.generation, first, count, write
            )

    def _pin_end(self, worker: _Worker, number: int, pin: _Pin, result: Message) -> Message:
        """Note a granted pin; what happened to its worker meanwhile may take it back at once."""
        worker.pinning.remove(number)
        cancelled = number in worker.cancelled
        worker.cancelled.discard(number)
        if "error" in result:
            self._pinned_pages -= pin.pages
            return result
        worker.pins[number] = pin
        gone = worker.regions.get(pin.region.address) is not pin.region
        if cancelled or gone:
            self._unpin(worker, number)
        return protocol.failure(Error("the array is gone")) if gone else result

    def _unpin(self, worker: _Worker, number: int) -> None:
        pin = worker.pins.pop(number, None)
        if pin is None:
            return
        self._pinned_pages -= pin.pages
        self._unpin_ranges(pin.region, pin.ranges, pin.write)

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

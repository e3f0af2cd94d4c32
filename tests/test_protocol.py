"""What if a worker sends rubbish?  The swapper tells it so, or cuts it off, and serves the others.

The rubbish comes from a connection that the swapper made for a forked child: `Line` speaks on it
byte by byte, as no worker of ours would.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import signal
import socket
import struct
import tempfile
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import is_debug_engine

import pyswap
from pyswap import config
from pyswap._native import native

pytestmark = pytest.mark.core

PATIENCE_S = 30

NUMBERS = (-1, 0, 1, 7, 4096, 2**31, 2**32, 2**63, 2**64, 2**100, 10**400)
WRONG: list[Any] = [
    None,
    True,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e300,
    *NUMBERS,
    [[0]],
    [[0, 1, 2]],
    [[-1, 1]],
    [[0, 0]],
    [[0, -1]],
    [[0, 2**64]],
    [[2**63, 2**63]],
    [["a", "b"]],
    [[1.5, 1]],
    [[0, 1]] * 5000,
    "x" * 50_000,
]


def a_place(size: int = 1 << 20) -> int:
    return native.reserve(size)


class Line:
    """A connection to the swapper that nothing checks."""

    def __init__(self, pool: Any) -> None:
        sock_fd, channel_fd = pool._call("fork")["fds"]
        self.sock = socket.socket(fileno=sock_fd)
        self.channel = socket.socket(fileno=channel_fd)
        self.sock.settimeout(PATIENCE_S)
        self.pool = pool
        self.seq = 0
        self.uffd = -1

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, np.array(fds, "i4").tobytes())]
        self.sock.sendmsg([data], rights if fds else [])

    def ask(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Send a request; returns the reply, whose descriptors are closed."""
        self.seq += 1
        self.send(json.dumps({**message, "seq": self.seq}).encode(), fds)
        return self.reply()

    def reply(self) -> dict[str, Any]:
        data, fds, _, _ = socket.recv_fds(self.sock, config.MESSAGE_BYTES, 4)
        for fd in fds:
            os.close(fd)
        assert data, "the swapper ended the connection"
        reply: dict[str, Any] = json.loads(data)
        assert reply["seq"] == self.seq
        return reply

    def hello(self, *, blocking: bool = False) -> None:
        self.uffd, _ = native.open_uffd()
        os.set_blocking(self.uffd, blocking)
        pidfd = os.pidfd_open(os.getpid())
        message = {"op": "hello", "pid": os.getpid(), "regions": []}
        try:
            reply = self.ask(message, (self.uffd, pidfd))
        finally:
            os.close(pidfd)
        assert "error" not in reply, reply

    def array(self, size: int = 65_536) -> int:
        """Make an array and map it, as a worker does; returns its address."""
        address = a_place(size)
        reply = self.ask({"op": "create", "address": address, "size": size, "name": ""})
        assert "error" not in reply, reply
        offset = reply["base"] * self.pool.page_size
        native.map_range(address, size, self.pool._attachment.store_fd, offset, self.uffd)
        return address

    def close(self) -> None:
        if self.uffd >= 0:
            os.close(self.uffd)
        self.sock.close()
        self.channel.close()


@contextlib.contextmanager
def line_to(pool: Any) -> Iterator[Line]:
    line = Line(pool)
    try:
        yield line
    finally:
        line.close()


def in_a_child(pool: Any, work: Callable[[Line], object], *, blocking: bool = False) -> None:
    """Run `work` on an attached connection in a process of its own, whose end ends it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = b"the child ended before its time"
        try:
            with line_to(pool) as line:
                line.hello(blocking=blocking)
                work(line)
                told = b""
        except BaseException as error:  # noqa: BLE001 (the parent fails with it)
            told = f"{type(error).__name__}: {error}".encode()[:4000]
        finally:
            os.write(write, told or b"ok")
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    assert told == b"ok", told.decode(errors="replace")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE_S} s: {what}"
        os.sched_yield()


def descriptors_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def served(pool: Any) -> Iterator[Any]:
    """A pool whose swapper must serve others after the test as before, and keep nothing of it."""
    swapper = pool.swapper_pid
    kept = pool.zeros(50_000, np.int64)
    kept[:] = np.arange(kept.size)
    descriptors, committed = descriptors_of(swapper), pool.stats().committed_bytes
    yield pool
    os.kill(swapper, 0)
    pool.advise(kept, "pageout")
    assert not pool.residency(kept).any()
    assert np.array_equal(kept, np.arange(kept.size))
    until(lambda: pool.stats().workers == 1, "only the creator is attached")
    assert pool.stats().pinned_pages == 0
    # It may have had one more at first: it opens files in passing.
    until(lambda: descriptors_of(swapper) <= descriptors, "the swapper keeps no descriptor")
    assert pool.stats().committed_bytes == committed
    _everything_can_be_pinned_again(pool)


def _everything_can_be_pinned_again(pool: Any) -> None:
    """The swapper's own count of pinned pages is 0 too."""
    bounds = config.bounds(pool.memory // pool.page_size, pool.page_size)
    most = pool.memory // pool.page_size - 2 * bounds.high_frames - pool.stats().workers
    whole = pool.empty((most, pool.page_size), np.uint8)
    with pool.pin(whole):
        assert pool.stats().pinned_pages == most


PACKETS = {
    "nothing": b"",
    "no text": b"\xff\xfe\xfd",
    "no json": b"{'op': 1}",
    "a list": b'["op"]',
    "a null": b"null",
    "half an object": b'{"op": "create", "seq": 1',
    "deep lists": b"[" * 60_000 + b"]" * 60_000,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "a huge number": b'{"op": "bye", "seq": ' + b"9" * 100_000 + b"}",
    "no number": b'{"op": "bye"}',
    "a number that is text": b'{"op": "bye", "seq": "' + "\u20ac".encode() * 40_000 + b'"}',
    "a number that is a list": b'{"op": "bye", "seq": [1]}',
    "two encodings": '{"op": "bye"}'.encode("utf-16") + b"\xff",
}


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS.keys())
def test_does_a_packet_that_is_no_request_cut_off_its_sender_alone(
    served: Any, packet: bytes
) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        with line_to(served) as line, line_to(served) as other:
            line.send(packet, (null, null))
            # Not attached yet, it loses its place at once.
            assert line.sock.recv(1000) == b""
            assert other.ask({"op": "check"})["error"] == "ValueError"
    finally:
        os.close(null)


def test_is_a_packet_longer_than_any_request_refused(served: Any) -> None:
    with line_to(served) as line:
        line.send(json.dumps({"op": "bye", "seq": 1, "x": "y" * config.MESSAGE_BYTES}).encode())
        assert line.sock.recv(1000) == b""


@pytest.mark.parametrize("count", [0, 1, 3, 4, 200])
def test_is_hello_with_another_number_of_descriptors_refused(served: Any, count: int) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        with line_to(served) as line:
            line.send(b'{"op":"hello","pid":1,"regions":[],"seq":1}', (null,) * count)
            data = line.sock.recv(1000)
            # More than fit in a message make it no message.
            assert (b"descriptors" in data) if count <= 4 else data == b""
    finally:
        os.close(null)


@contextlib.contextmanager
def wrong_descriptors() -> Iterator[dict[str, int]]:
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(tempfile.TemporaryFile())
        pair = socket.socketpair()
        for end in pair:
            opened.enter_context(end)
        reader, writer = os.pipe()
        opened.callback(os.close, reader)
        # With its writer gone a pipe is readable for ever, and so would be polled for ever.
        os.close(writer)
        null = os.open(os.devnull, os.O_RDWR)
        opened.callback(os.close, null)
        yield {
            "file": file.fileno(),
            "socket": pair[0].fileno(),
            "pipe": reader,
            "device": null,
        }


def test_is_hello_without_a_userfaultfd_refused(served: Any) -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        with wrong_descriptors() as wrong, line_to(served) as line:
            message = {"op": "hello", "pid": os.getpid(), "regions": []}
            for which, fd in {**wrong, "pidfd": pidfd}.items():
                assert "error" in line.ask(message, (fd, pidfd)), which
            assert "hello" in line.ask({"op": "check"})["text"]
    finally:
        os.close(pidfd)


def test_is_hello_without_a_pidfd_refused(served: Any) -> None:
    uffd, _ = native.open_uffd()
    try:
        with wrong_descriptors() as wrong, line_to(served) as line:
            message = {"op": "hello", "pid": os.getpid(), "regions": []}
            for which, fd in {**wrong, "uffd": uffd}.items():
                assert "error" in line.ask(message, (uffd, fd)), which
            assert "hello" in line.ask({"op": "check"})["text"]
    finally:
        os.close(uffd)


def test_is_a_userfaultfd_that_blocks_made_one_that_does_not(served: Any) -> None:
    """It is always ready: the fault thread that read it would serve nobody else."""

    def work(line: Line) -> None:
        # What it was opened as is the same for everybody who holds it.
        assert not os.get_blocking(line.uffd)

    in_a_child(served, work, blocking=True)


def hello_after(line: Line, **fields: Any) -> dict[str, Any]:
    uffd, _ = native.open_uffd()
    pidfd = os.pidfd_open(os.getpid())
    try:
        message = {"op": "hello", "pid": os.getpid(), "regions": [], **fields}
        return line.ask(message, (uffd, pidfd))
    finally:
        os.close(uffd)
        os.close(pidfd)


def test_does_hello_with_wrong_fields_leave_its_place_as_it_was(served: Any) -> None:
    with line_to(served) as line:
        for value in WRONG:
            if not (type(value) is int and 0 <= value < 2**32):
                assert "error" in hello_after(line, pid=value), value
            if value not in ([], [[0, 1, 2]]):
                assert "error" in hello_after(line, regions=value), value
            assert "error" in hello_after(line, regions=[[0, value, 1.5]])
        assert "hello" in line.ask({"op": "check"})["text"]


def test_is_a_second_hello_refused(served: Any) -> None:
    def work(line: Line) -> None:
        assert "error" in hello_after(line)
        assert "error" not in line.ask({"op": "check"})

    in_a_child(served, work)


def test_may_hello_name_an_array_that_it_was_not_promised_twice(served: Any) -> None:
    made = served.zeros(10_000)
    number, generation, _, _ = served._attachment.regions[native.find(made.ctypes.data)[0]]

    def work(line: Line) -> None:
        uffd, _ = native.open_uffd()
        place = native.reserve(1 << 20)
        regions = [[place, number, generation]] * 3
        pidfd = os.pidfd_open(os.getpid())
        message = {"op": "hello", "pid": os.getpid(), "regions": regions}
        with line_to(served) as another:
            assert "error" in another.ask(message, (uffd, pidfd))

    in_a_child(served, work)


def requests(address: int) -> dict[str, dict[str, Any]]:
    """Every request as it should be, for an array of 16 pages at an address."""
    ranges = [[0, 4], [8, 1]]
    return {
        "create": {"address": a_place(), "size": 65_536, "name": "an array"},
        "remove": {"address": address},
        "release": {"address": address},
        "advise": {"address": address, "ranges": ranges, "advice": "willneed"},
        "pin": {"address": address, "ranges": ranges, "write": True, "pin": 1},
        "pageout": {"address": address, "ranges": ranges},
        "unpin": {"pin": 1},
        "runs": {"address": address, "first": 0, "count": 16},
        "snapshot": {"address": address, "target": a_place()},
        "inherit": {"regions": []},
    }


OPS = sorted(requests(0))


@pytest.mark.parametrize("op", OPS)
def test_is_every_wrong_field_answered(served: Any, op: str) -> None:
    def work(line: Line) -> None:
        for name in requests(0)[op]:
            right = {"op": op, **requests(line.array())[op]}
            without = {key: value for key, value in right.items() if key != name}
            assert "error" in line.ask(without) or name == "write", f"{op} without {name}"
            for value in WRONG:
                reply = line.ask({**right, name: value})
                assert len(json.dumps(reply)) < 5000
                if type(value) is not type(right[name]) and name != "write":
                    assert reply.get("error") == "ValueError", f"{op}, {name}={value!r}: {reply}"

    in_a_child(served, work)


def test_is_an_unknown_request_answered(served: Any) -> None:
    def work(line: Line) -> None:
        for op in [*WRONG, "__init__", "inherit_"]:
            assert line.ask({"op": op})["error"] == "ValueError"

    in_a_child(served, work)


def test_is_every_request_before_hello_refused(served: Any) -> None:
    with line_to(served) as line:
        for op in ["check", "bye", "close", "fork", "inherit", *OPS]:
            reply = line.ask({"op": op, **requests(a_place()).get(op, {})})
            assert reply["error"] == "ValueError"
            assert "hello" in reply["text"]


@pytest.mark.parametrize(
    "where",
    ["on it", "inside it", "around it", "at its end", "unaligned", "kernel", "top", "beyond"],
)
def test_is_an_array_refused_where_none_can_be(served: Any, where: str) -> None:
    def work(line: Line) -> None:
        place = a_place(1 << 22) + (1 << 20)
        create = {"op": "create", "size": 65_536, "name": ""}
        assert "error" not in line.ask({**create, "address": place})
        address, size = {
            "on it": (place, 65_536),
            "inside it": (place + 4096, 1),
            "around it": (place - 8192, 1 << 20),
            "at its end": (place - 8192, 8193),
            "unaligned": (place + (1 << 20) + 1, 65_536),
            "kernel": (2**64 - (1 << 20), 65_536),
            "top": (2**64 - 4096, 65_536),
            "beyond": (1 << 60, 65_536),
        }[where]
        reply = line.ask({**create, "address": address, "size": size})
        assert reply["error"] == "ValueError", reply
        # The one that was there is there still, and its neighbours are free.
        assert "error" not in line.ask({**create, "address": place - 65_536})
        assert "error" not in line.ask({**create, "address": place + 65_536})
        assert line.ask({"op": "pageout", "address": place, "ranges": [[0, 16]]})["left"] == 0

    in_a_child(served, work)


def test_is_a_pin_granted_once_by_its_number(served: Any) -> None:
    def work(line: Line) -> None:
        ranges = [[0, 3], [9, 1]]
        pin = {"op": "pin", "address": line.array(), "ranges": ranges, "write": True, "pin": 7}
        assert "error" not in line.ask(pin)
        assert line.ask(pin)["error"] == "ValueError"
        assert served._control().numbers()["pinned_pages"] == 4
        for _ in range(3):
            line.ask({"op": "unpin", "pin": 7})
        assert served._control().numbers()["pinned_pages"] == 0
        # Taken back before it was asked for is not asked for.
        line.ask({"op": "unpin", "pin": 8})
        assert "error" not in line.ask({**pin, "pin": 8})
        assert served._control().numbers()["pinned_pages"] == 4

    in_a_child(served, work)


def test_does_a_worker_that_reads_no_reply_keep_nobody_waiting(served: Any) -> None:
    def work(line: Line) -> None:
        line.sock.settimeout(None)
        request = json.dumps({"op": "x" * 1000, "seq": 1}).encode()
        for _ in range(20_000):
            line.send(request)

    in_a_child(served, work)


def test_does_a_worker_that_forks_without_end_meet_a_bound(served: Any) -> None:
    def work(line: Line) -> None:
        told = [line.ask({"op": "fork"}).get("error") for _ in range(1000)]
        # Each place ends with the descriptors that nobody kept.
        assert told.count(None) > 0

    in_a_child(served, work)


def test_do_many_processes_meet_the_bound_with_a_clear_error(served: Any) -> None:
    places: list[Line] = []
    try:
        while len(places) < 200:
            places.append(Line(served))
        with pytest.raises(pyswap.Error, match=r"the pool has \d+ processes"):
            places.extend(Line(served) for _ in range(200))
    finally:
        for line in places:
            line.close()


def test_can_a_region_end_while_its_pages_are_being_pinned(served: Any) -> None:
    def work(line: Line) -> None:
        for number in range(300):
            address = line.array(1 << 21)
            pages = [[0, 300], [300, 212]]
            for op in ("pin", "pageout"):
                message = {"op": op, "address": address, "ranges": pages, "pin": number}
                line.send(json.dumps({**message, "seq": 0}).encode())
            # Gone, and its number another's, before or while the pin is granted.
            for message in (
                {"op": "remove", "address": address},
                {"op": "create", "address": address, "size": 1 << 20, "name": ""},
                {"op": "remove", "address": address},
            ):
                line.send(json.dumps({**message, "seq": 0}).encode())
            for _ in range(5):
                json.loads(line.sock.recv(config.MESSAGE_BYTES))
            native.unreserve(address, 1 << 21)

    in_a_child(served, work)


@pytest.mark.parametrize("order", [("sock", "exit"), ("exit",)])
def test_does_a_worker_end_once_however_its_end_is_told(
    served: Any, order: tuple[str, ...]
) -> None:
    """Its connection and its process end while the swapper is stopped, and are told of at once."""
    swapper = served.swapper_pid
    read, write = os.pipe()
    ready, say_ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say_ready, b"x")
        os.read(read, 1)
        if "sock" in order:
            served._attachment._sock.shutdown(socket.SHUT_RDWR)
        os._exit(0)
    try:
        os.read(ready, 1)
        os.kill(swapper, signal.SIGSTOP)
        os.write(write, b"x")
        os.waitpid(child, 0)
    finally:
        os.kill(swapper, signal.SIGCONT)
        for fd in (read, write, ready, say_ready):
            os.close(fd)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kinds = rng.randrange(8 if depth < 3 else 6)
    if kinds == 0:
        return rng.choice(NUMBERS)
    if kinds == 1:
        return rng.choice([-1, 1]) * rng.getrandbits(rng.choice([3, 12, 31, 64, 65, 200]))
    if kinds == 2:
        return rng.choice([None, True, False])
    if kinds == 3:
        return rng.choice([0.0, -1.5, 1e308, float("nan"), float("-inf")])
    if kinds == 4:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(20)))
    if kinds == 5:
        return rng.choice(["willneed", "dontneed", "pageout", "random", "off", "fill_read"])
    if kinds == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(i): random_value(rng, depth + 1) for i in range(rng.randrange(3))}


def random_request(rng: random.Random, addresses: list[int]) -> dict[str, Any]:
    """Mostly right, so that it gets far; wrong in a field or two."""
    if rng.random() < 0.1:
        addresses.append(a_place())
    message = requests(rng.choice(addresses))
    op = rng.choice([*message, "check", "hello", "bye", "fork", "nonsense"])
    fields = {"op": op, **message.get(op, {})}
    for name in list(fields):
        if rng.random() < 0.15:
            fields[name] = random_value(rng)
        elif name != "op" and rng.random() < 0.05:
            del fields[name]
    if rng.random() < 0.1:
        fields["pin"] = rng.randrange(5)
    return fields


def test_does_the_swapper_survive_random_requests(served: Any, seed: int) -> None:
    rng = random.Random(seed)

    def work(line: Line) -> None:
        errors, rights = 0, 0
        addresses = [a_place(), line.array()]
        for _ in range(3000):
            if rng.random() < 0.05:
                addresses.append(line.array())
            fields = random_request(rng, addresses)
            if fields.get("op") == "bye":
                # Granted, it would end the connection: with an array it is refused.
                line.ask({"op": "create", "address": a_place(), "size": 1, "name": ""})
            reply = line.ask(fields)
            errors += "error" in reply
            rights += "error" not in reply
        assert errors > 300
        assert rights > 300

    in_a_child(served, work)


WINDOW = 32
"""Requests under way at once: as many answers as the connection holds."""


def ask_many(line: Line, requests: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Send requests at once; returns the answers by their numbers, each request's one."""
    for fields in requests:
        line.seq += 1
        line.send(json.dumps({**fields, "seq": line.seq}).encode())
    told = {}
    for _ in requests:
        try:
            data, fds, _, _ = socket.recv_fds(line.sock, config.MESSAGE_BYTES, 4)
        except TimeoutError:
            first = line.seq - len(requests) + 1
            silent = [r for i, r in enumerate(requests, first) if i not in told]
            raise AssertionError(f"no answer to {silent}") from None
        for fd in fds:
            os.close(fd)
        assert data, "the swapper ended the connection"
        reply = json.loads(data)
        told[reply["seq"]] = reply
    assert sorted(told) == list(range(line.seq - len(requests) + 1, line.seq + 1))
    return told


def window_of(rng: random.Random, addresses: list[int]) -> list[dict[str, Any]]:
    made = [random_request(rng, addresses) for _ in range(WINDOW)]
    for fields in made:
        # With nothing mapped it may leave; a check waits for quiet.
        if fields.get("op") in ("bye", "check"):
            fields["op"] = "swaps"
    return made


@pytest.mark.long
def test_is_each_of_ninety_thousand_random_requests_answered(served: Any, seed: int) -> None:
    rng = random.Random(seed)
    # The debug build runs this too, more than once; the volume is for the release.
    count = 9_000 if is_debug_engine() else 90_000

    def work(line: Line) -> None:
        errors, rights = 0, 0
        addresses: list[int] = []
        while errors + rights < count:
            if not addresses:
                addresses = [a_place(), line.array()]
            asked = window_of(rng, addresses)
            refused = sum("error" in reply for reply in ask_many(line, asked).values())
            errors, rights = errors + refused, rights + len(asked) - refused
            for fields in asked:
                places = (fields.get("address"), fields.get("target"))
                addresses += [place for place in places if type(place) is int]
            if len(addresses) > 20 * WINDOW:
                places = [place for place in addresses if 0 <= place < 1 << 64]
                for i in range(0, len(places), WINDOW):
                    some = places[i : i + WINDOW]
                    ask_many(line, [{"op": "remove", "address": place} for place in some])
                addresses.clear()
        print(f"{errors} refused, {rights} granted")
        assert min(errors, rights) > count // 10

    in_a_child(served, work)


def test_does_a_pin_that_waits_for_a_stopped_process_keep_others_waiting(served: Any) -> None:
    """As many as there once were threads for such requests, and more."""
    reads, writes = os.pipe()

    def wait_for_a_copy(line: Line) -> None:
        # Nobody reads the channel: as if the process were stopped before its attendant obeys.
        address, target = a_place(65_536), a_place(65_536)
        create = {"op": "create", "address": address, "size": 65_536, "name": "", "private": True}
        assert "error" not in line.ask(create)
        assert "error" not in line.ask({"op": "snapshot", "address": address, "target": target})
        pin = {"op": "pin", "address": address, "ranges": [[0, 1]], "write": True, "pin": 1}
        line.send(json.dumps({**pin, "seq": line.seq + 1}).encode())
        # The order for the copy.
        assert line.channel.recv(4096)
        os.write(writes, b"x")
        assert not select.select([line.sock], [], [], PATIENCE_S)[0], "the pin was answered"

    children = [background(served, wait_for_a_copy) for _ in range(12)]
    try:
        got = b""
        while len(got) < len(children):
            assert select.select([reads], [], [], PATIENCE_S)[0], "a child does not get so far"
            got += os.read(reads, 100)
        mine = served.zeros(100_000)
        with served.pin(mine):
            assert served.residency(mine).all()
        served.advise(mine, "pageout")
        assert not served.residency(mine).any()
        assert all(os.waitpid(child, os.WNOHANG) == (0, 0) for child in children)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(reads)
        os.close(writes)


def background(pool: Any, work: Callable[[Line], object]) -> int:
    """Run `work` on an attached connection in a process that the caller ends; its pid."""
    child = os.fork()
    if child == 0:
        try:
            with line_to(pool) as line:
                line.hello()
                work(line)
        except BaseException:  # noqa: BLE001 - it must not return into pytest.
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def test_does_the_swapper_survive_random_packets(served: Any, seed: int) -> None:
    rng = random.Random(seed)
    texts = [json.dumps({"op": op, "seq": 1, **requests(4096)[op]}).encode() for op in OPS]
    null = os.open(os.devnull, os.O_RDONLY)
    try:
        for _ in range(1000):
            packet = bytearray(rng.choice(texts))
            for _ in range(rng.randrange(4)):
                packet[rng.randrange(len(packet))] = rng.randrange(256)
            del packet[rng.randrange(len(packet) + 1) :]
            with line_to(served) as line:
                line.send(bytes(packet), (null,) * rng.randrange(4))
                # An answer, or the end: not silence.
                line.sock.recv(config.MESSAGE_BYTES)
    finally:
        os.close(null)


# The channel: orders to an attendant, and its answers.

ANSWER = struct.Struct("=QiI")
ORDER = struct.Struct("=IIQQQQ")
"""The head of an order; words to say follow."""
REMAP = 2
COPY_NAMES = [generation << 32 | place for generation in range(8) for place in range(1024)]


def write_to(address: int) -> threading.Thread:
    """Have a thread write a word; it waits in the fault without the GIL."""
    thread = threading.Thread(target=ctypes.memset, args=(address, 0x11, 8), daemon=True)
    thread.start()
    return thread


def shared_with_itself(line: Line, pages: int) -> tuple[int, int]:
    """Make and map a private array of zeros and its snapshot: each write is a copy."""
    size, page = pages * 4096, line.pool.page_size
    address, target = a_place(size), a_place(size)
    reply = line.ask(
        {"op": "create", "address": address, "size": size, "name": "", "private": True}
    )
    offset = reply["base"] * page
    native.map_range(address, size, line.pool._attachment.store_fd, offset, line.uffd)
    assert "error" not in line.ask({"op": "snapshot", "address": address, "target": target})
    native.map_range(target, size, line.pool._attachment.store_fd, offset, line.uffd)
    return address, target


def order_of(line: Line) -> tuple[int, int, int, int]:
    """The next order to map a copy: (address, bytes, offset, name)."""
    line.channel.settimeout(PATIENCE_S)
    kind, _, address, size, offset, name = ORDER.unpack_from(line.channel.recv(4096))
    assert kind == REMAP
    return address, size, offset, name


def unread(channel: socket.socket) -> int:
    """Bytes that were sent and not taken yet."""
    count = bytearray(4)
    fcntl.ioctl(channel, termios.TIOCOUTQ, count)
    return int.from_bytes(count, "little")


def flood(channel: socket.socket, answers: list[bytes]) -> None:
    """Send all, and wait until all were taken."""
    for answer in answers:
        channel.send(answer)
    until(lambda: unread(channel) == 0, "the swapper takes what came")


def copies_one(line: Line, tells: int, goes_on: int) -> None:
    """Have a copy wait for its answer until told; tell its name, and at last that all was right."""
    address, target = shared_with_itself(line, 16)
    thread = write_to(address)
    at, size, offset, name = order_of(line)
    os.write(tells, struct.pack("Q", name))
    assert os.read(goes_on, 1)
    assert thread.is_alive(), "somebody else's answer was taken"
    assert line.pool._control().numbers()["pinned_pages"] == 1
    native.map_range(at, size, line.pool._attachment.store_fd, offset, line.uffd)
    line.channel.send(ANSWER.pack(name, 0, 0))
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "its own answer was not taken"
    assert ctypes.string_at(address, 9) == b"\x11" * 8 + b"\0"
    assert ctypes.string_at(target, 9) == bytes(9)
    os.write(tells, b"all right")


def test_may_a_worker_answer_for_another_ones_copy(served: Any, seed: int) -> None:
    rng = random.Random(seed)
    told, tells = os.pipe()
    goes_on, go_on = os.pipe()
    child = background(served, lambda line: copies_one(line, tells, goes_on))
    os.close(tells)
    try:
        with line_to(served) as forger:
            forger.hello()
            (name,) = struct.unpack("Q", os.read(told, 8))
            names = [*rng.sample(COPY_NAMES, len(COPY_NAMES)), *[rng.getrandbits(64)] * 1000, name]
            flood(forger.channel, [ANSWER.pack(each, rng.choice([0, -1, 5]), 0) for each in names])
            os.write(go_on, b"x")
            assert os.read(told, 100) == b"all right"
    finally:
        for fd in (told, goes_on, go_on):
            os.close(fd)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_is_a_channel_listened_to_that_brings_rubbish(served: Any, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        with line_to(served) as line, line_to(served) as other:
            line.hello()
            other.hello()
            rubbish = rng.randbytes(rng.choice([1, 8, 15, 17, 24, 4000]))
            flood(line.channel, [rubbish])
            line.channel.send(rubbish)
            # Its requests are served, and so are other ones' answers; nobody takes its own.
            assert "error" not in line.ask({"op": "swaps"})
            flood(other.channel, [ANSWER.pack(rng.getrandbits(64), 0, 0)] * 100)
            assert unread(line.channel) > 0

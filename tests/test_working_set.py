"""A working set of several times the budget: every count is right, and the budget is hard.

The tree that counts is `count_in_every_page`. It runs in the test's process, watched by a sampler
outside, and once more as a program of its own (``python test_working_set.py``) inside a memory
control group, so that its whole life is charged there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import PATIENCE_S, Worker, until

import pyswap

MEMORY_BYTES = 16 << 20
PAGE_BYTES = 4096
WORDS = PAGE_BYTES // 8
TIMES_THE_BUDGET = 8
SLACK_BYTES = 32 << 20
AT_ONCE = 4
CHILDREN = 6
COMMON = 0
"""The counter of each page that every process adds to, under a lock."""
OWN = range(1, 1 + AT_ONCE + 1)
"""Counters that one process at a time adds to; the next one takes them over."""


@dataclass
class Counted:
    """What a tree has counted and done."""

    right: bool
    pages: int
    faults: int
    evictions: int
    pages_a_write: float
    array_bytes: int


class Store:
    """The page store as other processes see it: an inode, mapped somewhere."""

    def __init__(self, pool: pyswap.Pool, a: Any) -> None:
        found = os.fstat(pool.fileno())
        self.device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        self.inode = str(found.st_ino)
        self.address = int(a.__array_interface__["data"][0])
        self.nbytes = int(a.nbytes)

    def is_all_mapped_by(self, pid: int) -> bool:
        """Whether one mapping of this inode holds the whole array in a process."""
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            places, modes, _, device, inode = line.split(None, 5)[:5]
            low, high = (int(place, 16) for place in places.split("-"))
            if low <= self.address < high or low < self.address + self.nbytes <= high:
                is_store = (device, inode, modes) == (self.device, self.inode, "rw-s")
                is_whole = low <= self.address and self.address + self.nbytes <= high
                return is_store and is_whole
        return False


def add_to_every_page(held: tuple[Any, Any], counter: int, order: str, seed: int) -> None:
    """Add 1 to a counter of this process and to the common one, in every page of the array."""
    a, lock = held
    pages = np.arange(len(a))
    if order == "random":
        pages = np.random.default_rng(seed).permutation(pages)
    elif order == "backwards":
        pages = pages[::-1]
    for chunk in np.array_split(pages, 1 + len(pages) // 64):
        a[chunk, counter] += 1
        with lock:
            a[chunk, COMMON] += 1


def pages_of(held: tuple[Any, Any]) -> int:
    return len(held[0])


def run_children(a: Any, seed: int, look_at: Callable[[int], None]) -> np.ndarray[Any, Any]:
    """Have processes come and go, a few at a time; returns what each counter must be."""
    rng = np.random.default_rng(seed)
    lock = multiprocessing.get_context("fork").Lock()
    expected = np.zeros(WORDS, np.int64)
    free = list(OWN)
    running: dict[Any, tuple[Worker, int]] = {}
    born = 0
    try:
        while born < CHILDREN or running:
            while born < CHILDREN and len(running) < AT_ONCE:
                child = Worker((a, lock))
                counter = free.pop(int(rng.integers(len(free))))
                running[child.connection] = child, counter
                # Once it answers, it has mapped what it inherited.
                assert child.ask(pages_of) == len(a)
                look_at(child.pid)
                order = "forwards" if born == 2 else "backwards" if born == 3 else "random"
                child.send(add_to_every_page, counter, order, int(rng.integers(1 << 62)))
                born += 1
            ready = wait(list(running), PATIENCE_S)
            assert ready, "no process has finished"
            for connection in ready:
                child, counter = running.pop(connection)
                child.answer()
                assert child.end() == 0
                child.finish()
                expected[[counter, COMMON]] += 1
                free.append(counter)
    finally:
        for child, _ in running.values():
            child.finish()
    return expected


def count_in_every_page(
    pool: pyswap.Pool,
    pages: int,
    seed: int,
    look_at: Callable[[int, Any], None] = lambda pid, a: None,
) -> Counted:
    """Run the tree on an array of so many pages, and compare every counter in it."""
    a = pool.zeros((pages, WORDS), np.int64)
    expected = run_children(a, seed, lambda pid: look_at(pid, a))
    right = all(
        np.array_equal(a[low : low + 256], np.broadcast_to(expected, a[low : low + 256].shape))
        for low in range(0, pages, 256)
    )
    now = pool.stats()
    return Counted(
        right=right,
        pages=pages,
        faults=now.minor_faults + now.major_faults + now.write_faults,
        evictions=now.evictions,
        pages_a_write=now.slot_writes / max(1, now.write_calls),
        array_bytes=a.nbytes,
    )


SAMPLER = """
import json, os, select, sys, time
samples = most = 0
longest = 0.0
before = due = time.monotonic()
print("ready", flush=True)
while not select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
    most = max(most, os.fstat(int(sys.argv[1])).st_blocks * 512)
    now = time.monotonic()
    samples += 1
    longest, before = max(longest, now - before), now
    due = max(due + 0.001, now)
print(json.dumps({"samples": samples, "most_bytes": most, "longest_gap_s": longest}))
"""
"""Looks at the store's size 1,000 times a second until its standard input ends."""


@contextmanager
def sampled(pool: pyswap.Pool) -> Iterator[dict[str, float]]:
    """Sample the store from another process; what it saw is in the dict at the end."""
    fd = pool.fileno()
    seen: dict[str, float] = {}
    command = [sys.executable, "-E", "-S", "-c", SAMPLER, str(fd)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, pass_fds=[fd]) as sampler:
        try:
            assert sampler.stdout is not None
            assert sampler.stdout.readline() == "ready\n"
            yield seen
            told, _ = sampler.communicate(timeout=PATIENCE_S)
        except BaseException:
            sampler.kill()
            raise
    seen.update(json.loads(told))


@pytest.mark.core
def test_is_every_count_right_and_the_budget_never_exceeded(seed: int) -> None:
    pages = TIMES_THE_BUDGET * MEMORY_BYTES // PAGE_BYTES
    looked_at = []
    with pyswap.Pool(MEMORY_BYTES, 2 * pages * PAGE_BYTES, page_size=PAGE_BYTES) as pool:

        def look_at(pid: int, a: Any) -> None:
            assert Store(pool, a).is_all_mapped_by(pid), f"worker {pid} maps something else"
            looked_at.append(pid)

        with sampled(pool) as seen:
            counted = count_in_every_page(pool, pages, seed, look_at)
        pool.check()
    print(counted)
    print(f"{seen['samples']} samples, the longest gap {seen['longest_gap_s'] * 1e3:.1f} ms,")
    print(f"{seen['most_bytes']} bytes at most of {MEMORY_BYTES}")
    assert counted.right
    assert counted.evictions > 100_000
    assert counted.pages_a_write >= 8
    assert len(looked_at) == CHILDREN
    assert seen["samples"] > 1000
    # All but the frames that reclaim keeps free were in use.
    assert 0.9 * MEMORY_BYTES <= seen["most_bytes"] <= MEMORY_BYTES


class MemoryGroup:
    """A memory control group of version 1 or 2 with nobody in it yet."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / f"pyswap-test-{os.getpid()}"
        self.path.mkdir()
        self._is_v1 = (self.path / "memory.limit_in_bytes").exists()

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    def limit(self, nbytes: int) -> None:
        """Bound all memory of the group; what the system may have of swap does not help."""
        if self._is_v1:
            self._write("memory.limit_in_bytes", nbytes)
            with contextlib.suppress(FileNotFoundError):
                self._write("memory.memsw.limit_in_bytes", nbytes)
        else:
            self._write("memory.max", nbytes)
            with contextlib.suppress(FileNotFoundError):
                self._write("memory.swap.max", 0)

    def peak_bytes(self) -> int:
        """Most memory of all kinds that was charged at once, the page cache included."""
        return int(self._read("memory.max_usage_in_bytes" if self._is_v1 else "memory.peak"))

    def events(self) -> dict[str, int]:
        """Return how often the limit was met (``max``), and processes killed (``oom_kill``)."""
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        told = dict(line.split() for line in self._read(name).splitlines())
        met = 0 if self._is_v1 else int(told["max"])
        if self._is_v1:
            # Where swap is accounted, its limit, the same, is looked at first.
            met = sum(int(path.read_text()) for path in self.path.glob("memory.*failcnt"))
        return {"max": met, "oom_kill": int(told["oom_kill"])}

    def run(self, command: list[str], env: dict[str, str]) -> tuple[int, str]:
        """Run a program that is in the group from its first instruction; wait for all it made."""
        enter = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", enter, str(self.path), *command],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            check=False,
            timeout=4 * PATIENCE_S,
        )
        until(lambda: not self._read("cgroup.procs"), "the group is empty")
        return done.returncode, done.stdout

    def remove(self) -> None:
        """End whatever is in the group, and the group."""
        for pid in self._read("cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        until(lambda: not self._read("cgroup.procs"), "the group is empty")
        self.path.rmdir()


def run_in_group(pages: int, seed: int, limit_bytes: int | None) -> tuple[int, Counted | None]:
    """Run the tree in a group of its own; returns its peak memory in bytes and what it counted."""
    from conftest import memcg_parent

    parent = memcg_parent()
    assert parent is not None
    group = MemoryGroup(parent)
    try:
        if limit_bytes is not None:
            group.limit(limit_bytes)
        package = str(Path(pyswap.__file__).parent.parent)
        command = [sys.executable, __file__, "--pages", str(pages), "--seed", str(seed)]
        code, told = group.run(command, {**os.environ, "PYTHONPATH": package})
        events, peak = group.events(), group.peak_bytes()
        print(f"{pages} pages: exit code {code}, peak {peak} of {limit_bytes} bytes, {events}")
        assert events["oom_kill"] == 0, "the kernel killed for memory"
        assert code == 0
        # Not even the page cache had to be shrunk to stay under the limit.
        assert events["max"] == 0, "the tree met its limit"
        assert limit_bytes is None or peak < limit_bytes
        return peak, Counted(**json.loads(told))
    finally:
        group.remove()


def test_does_the_tree_live_in_a_group_of_its_budget(
    seed: int, require: Callable[[str], None]
) -> None:
    require("memcg")
    pages = TIMES_THE_BUDGET * MEMORY_BYTES // PAGE_BYTES
    baseline, _ = run_in_group(0, seed, None)
    limit = MEMORY_BYTES + baseline + SLACK_BYTES
    _, counted = run_in_group(pages, seed, limit)
    print(counted)
    assert counted is not None
    assert counted.right
    assert counted.evictions > 100_000
    assert counted.array_bytes > limit - baseline, "the array is no larger than what was allowed"


def main() -> None:
    """Run the tree as a program, and print what it counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    swap = 2 * TIMES_THE_BUDGET * MEMORY_BYTES
    with pyswap.Pool(MEMORY_BYTES, swap, page_size=PAGE_BYTES) as pool:
        counted = count_in_every_page(pool, options.pages, options.seed)
    print(json.dumps(asdict(counted)))


if __name__ == "__main__":
    main()

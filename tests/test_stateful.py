"""Whatever is done in whatever order, does every process see what plain arrays would show it?

A machine of hypothesis' does things at random in several processes on a small pool.  Every array
has a model that the kernel keeps: that of a shared array is in plain shared memory, that of a
private one in plain private memory, which a fork copies as it is to copy the array.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from workers import Worker, adopt_orphans, until

import pyswap

pytestmark = pytest.mark.core

PAGE = 4096
WORDS = 512
"""64-bit words of a page."""
FRAMES = (128, 256)
"""Between these is the budget."""
PAGES = 160
"""Pages of an array: more than there may be frames."""
SHARED, PRIVATE = 3, 4
"""Arrays there may be at once: in all, and in a process."""
CREW = 4
"""Processes there may be beside the test's."""
PINNED = 12
"""Pages of a process's pin: all that there may be can be granted, with the least of frames."""
ENOUGH_SWAP = 24 << 20
"""Bytes of swap that are always there: for whatever all processes may copy."""
FEW = 24
"""Pages that are written and shared at once: they stay where they are in between."""
AREAS = 4
LANES = 8
"""Processes write at once to words of a page that are so far from each other."""
ADVICE = ("willneed", "dontneed", "sequential", "random", "normal", "pageout")

EXAMPLES, STEPS = 40, 40


class Desk:
    """What a process has: arrays and their models by number, and pins."""

    def __init__(self, pool: pyswap.Pool) -> None:
        self.pool = pool
        self.arrays: dict[int, tuple[Any, npt.NDArray[np.int64]]] = {}
        self.pins: list[tuple[contextlib.ExitStack, Any]] = []
        # Models of all shared arrays, from before the first fork on: every process has them.
        plain = mmap.mmap(-1, SHARED * PAGES * PAGE)
        self.models = np.frombuffer(plain, np.int64).reshape(SHARED, PAGES, WORDS)


# What is done at a desk, in any process; it travels by name.


def new_shared(desk: Desk, number: int, place: int) -> None:
    desk.models[place] = 0
    desk.arrays[number] = desk.pool.zeros((PAGES, WORDS), np.int64), desk.models[place]


def new_private(desk: Desk, number: int) -> None:
    model = np.zeros((PAGES, WORDS), np.int64)
    desk.arrays[number] = desk.pool.zeros(model.shape, np.int64, private=True), model


def take_snapshot(desk: Desk, number: int, of: int) -> None:
    a, model = desk.arrays[of]
    desk.arrays[number] = a.snapshot(), model.copy()


def send(desk: Desk, number: int) -> bytes:
    return pickle.dumps(desk.arrays[number][0])


def receive(desk: Desk, number: int, place: int, sent: bytes) -> None:
    desk.arrays[number] = pickle.loads(sent), desk.models[place]


def delete(desk: Desk, number: int) -> None:
    del desk.arrays[number]


def write(desk: Desk, number: int, pages: slice, words: slice, value: int) -> None:
    """Write a value; zeros, too, of which no slot is made."""
    for each in desk.arrays[number]:
        each[pages, words] = value


def add(desk: Desk, number: int, pages: slice, words: slice, value: int) -> None:
    """Read and write."""
    for each in desk.arrays[number]:
        each[pages, words] += value


def scatter(desk: Desk, number: int, step: int, value: int) -> None:
    """Write a word in every `step`th page, backwards, so that no stream is seen."""
    for page in range(PAGES - 1, -1, -step):
        for each in desk.arrays[number]:
            each[page, page + step] += value


def compare(desk: Desk, number: int, pages: slice) -> None:
    a, model = desk.arrays[number]
    seen, expected = np.array(a[pages]), model[pages]
    different = np.argwhere(seen != expected)
    if len(different):
        page, word = (int(n) for n in different[0])
        where = f"array {number}, pages {pages}: {len(different)} words, the first in page {page}"
        raise AssertionError(
            f"{where}, word {word}: {seen[page, word]}, not {expected[page, word]}"
        )


def compare_all(desk: Desk) -> None:
    for number in desk.arrays:
        compare(desk, number, slice(None))


def advise(desk: Desk, number: int, pages: slice, advice: Any) -> None:
    desk.pool.advise(desk.arrays[number][0][pages], advice)


def pin(desk: Desk, number: int, pages: slice, value: int | None) -> None:
    """Pin pages, and write to them if that is what they are pinned for."""
    a, model = desk.arrays[number]
    block = contextlib.ExitStack()
    block.enter_context(desk.pool.pin(a[pages], writable=value is not None))
    desk.pins.append((block, a[pages]))
    if value is not None:
        a[pages] = model[pages] = value


def unpin(desk: Desk) -> None:
    block, pinned = desk.pins.pop()
    assert desk.pool.residency(pinned).all(), "what is pinned was evicted"
    block.close()


def leave_blocks(desk: Desk) -> None:
    """Come to the end of the blocks that a parent was in: their pins are not this process's."""
    while desk.pins:
        desk.pins.pop()[0].close()


def swap_off(desk: Desk, area: Any) -> None:
    desk.pool.swapoff(area)


def resize(desk: Desk, frames: int) -> None:
    desk.pool.resize(frames * PAGE)


def page_ids(desk: Desk) -> set[int]:
    """The page ids under all of a process's arrays."""
    found: set[int] = set()
    attachment = desk.pool.attachment
    for start in list(attachment.regions):
        for _, count, page in attachment.page_runs(start, 0, PAGES):
            found.update(range(page, page + count))
    return found


class Member:
    """A process, and what the test knows of its desk.

    Parameters
    ----------
    desk
        Of the test's own process.
    worker
        None if it is that.
    like
        Who forked it.
    """

    def __init__(
        self, desk: Desk, worker: Worker | None = None, like: Member | None = None
    ) -> None:
        self._desk, self.worker = desk, worker
        self.places: dict[int, int] = dict(like.places) if like else {}
        """Where the models of its shared arrays are, by number."""
        self.private = set(like.private) if like else set()
        self.is_pinning = False

    @property
    def arrays(self) -> list[int]:
        return sorted({*self.places, *self.private})

    def ask(self, do: Callable[..., Any], *args: Any) -> Any:
        return self.worker.ask(do, *args) if self.worker else do(self._desk, *args)

    def fork(self) -> Member:
        """Fork a process that has what this one has."""
        worker = self.worker.fork() if self.worker else Worker(self._desk)
        child = Member(self._desk, worker, self)
        child.ask(leave_blocks)
        return child


def ranges(most: int = PAGES) -> st.SearchStrategy[slice]:
    """Neighbouring pages, at most so many."""
    return st.builds(
        lambda low, count: slice(low, min(low + count, PAGES)),
        st.integers(0, PAGES - 1),
        st.integers(1, most),
    )


PICKS = st.integers(0, (1 << 16) - 1)
"""Which of what there is then."""
WORD_RANGES = st.sampled_from(
    [slice(None), slice(0, 1), slice(WORDS - 1, WORDS), slice(3, WORDS, 64), slice(100, 400)]
)
VALUES = st.integers(0, 1 << 40)
DEEDS = st.sampled_from(["write", "scatter", "read", "pageout", "rest"])


def pick(of: Any, n: int) -> Any:
    found = list(of)
    return found[n % len(found)]


class Machine(RuleBasedStateMachine):
    """A small pool, and processes that come and go."""

    folder: ClassVar[Path]
    totals: ClassVar[dict[str, int]]

    def __init__(self) -> None:
        super().__init__()
        made = pyswap.Pool(FRAMES[0] * PAGE, ENOUGH_SWAP, page_size=PAGE, swap_path=self.folder)
        self.pool = made
        self.adopting = contextlib.ExitStack()
        self.adopting.enter_context(adopt_orphans())
        self.desk = Desk(made)
        self.members = [Member(self.desk)]
        self.numbers = itertools.count()

    # What there is.

    def has_room(self) -> bool:
        return len(self.members) <= CREW

    def has_workers(self) -> bool:
        return len(self.members) > 1

    def free_places(self) -> list[int]:
        taken = {place for member in self.members for place in member.places.values()}
        return [place for place in range(SHARED) if place not in taken]

    def with_array(self, who: int, kind: str = "arrays") -> tuple[Member, list[int]]:
        """A process that has an array of a kind, and those that it has."""
        having = [m for m in self.members if getattr(m, kind)]
        member = pick(having, who)
        return member, sorted(getattr(member, kind))

    def has_array(self, kind: str = "arrays") -> bool:
        return any(getattr(m, kind) for m in self.members)

    # Arrays come and go.

    @initialize(pages=ranges(), value=VALUES)
    def begin(self, pages: slice, value: int) -> None:
        self.make_shared(0)
        self.make_private(0)
        for number in self.members[0].arrays:
            self.members[0].ask(write, number, pages, slice(None), value)

    @precondition(lambda self: self.free_places())
    @rule(who=PICKS)
    def make_shared(self, who: int) -> None:
        member, number, place = pick(self.members, who), next(self.numbers), self.free_places()[0]
        member.ask(new_shared, number, place)
        member.places[number] = place

    @rule(who=PICKS)
    def make_private(self, who: int) -> None:
        member, number = pick(self.members, who), next(self.numbers)
        if len(member.private) < PRIVATE:
            member.ask(new_private, number)
            member.private.add(number)

    @precondition(lambda self: self.has_array("private"))
    @rule(who=PICKS, which=PICKS, pages=ranges(FEW), pinned=st.booleans())
    def snapshot(self, who: int, which: int, pages: slice, pinned: bool) -> None:
        """Take one of pages that were written right before, and write to them right after."""
        member, arrays = self.with_array(who, "private")
        of, number = pick(arrays, which), next(self.numbers)
        if len(arrays) < PRIVATE:
            member.ask(add, of, pages, slice(None), 1)
            if pinned:
                self.pin_pages(member, of, pages, 2)
            member.ask(take_snapshot, number, of)
            member.private.add(number)
            member.ask(add, of, pages, slice(None), 1)
            member.ask(compare, number, pages)

    @precondition(lambda self: self.has_array("places"))
    @rule(who=PICKS, to=PICKS, which=PICKS)
    def send(self, who: int, to: int, which: int) -> None:
        sender, arrays = self.with_array(who, "places")
        number, receiver = pick(arrays, which), pick(self.members, to)
        if number not in receiver.places:
            place = sender.places[number]
            receiver.ask(receive, number, place, sender.ask(send, number))
            receiver.places[number] = place

    @precondition(lambda self: self.has_array())
    @rule(who=PICKS, which=PICKS)
    def delete(self, who: int, which: int) -> None:
        member, arrays = self.with_array(who)
        number = pick(arrays, which)
        member.ask(delete, number)
        member.places.pop(number, None)
        member.private.discard(number)

    # They are used.

    @precondition(lambda self: self.has_array())
    @rule(
        who=PICKS,
        which=PICKS,
        how=st.sampled_from([write, add]),
        pages=ranges(),
        words=WORD_RANGES,
        value=VALUES,
    )
    def write(self, who: int, which: int, how: Any, pages: slice, words: slice, value: int) -> None:
        member, arrays = self.with_array(who)
        member.ask(how, pick(arrays, which), pages, words, value)

    @precondition(lambda self: self.has_array())
    @rule(who=PICKS, which=PICKS, step=st.integers(1, 9), value=VALUES)
    def scatter(self, who: int, which: int, step: int, value: int) -> None:
        member, arrays = self.with_array(who)
        member.ask(scatter, pick(arrays, which), step, value)

    @precondition(lambda self: self.has_array())
    @rule(who=PICKS, which=PICKS, pages=ranges())
    def read(self, who: int, which: int, pages: slice) -> None:
        member, arrays = self.with_array(who)
        member.ask(compare, pick(arrays, which), pages)

    @rule(who=PICKS)
    def read_all(self, who: int) -> None:
        pick(self.members, who).ask(compare_all)

    @precondition(lambda self: self.has_array())
    @rule(who=PICKS, which=PICKS, pages=ranges(), advice=st.sampled_from([*ADVICE, "pageout"]))
    def advise(self, who: int, which: int, pages: slice, advice: str) -> None:
        member, arrays = self.with_array(who)
        member.ask(advise, pick(arrays, which), pages, advice)

    @precondition(lambda self: self.has_array())
    @rule(who=PICKS, which=PICKS, pages=ranges(PINNED), value=VALUES | st.none())
    def pin(self, who: int, which: int, pages: slice, value: int | None) -> None:
        member, arrays = self.with_array(who)
        self.pin_pages(member, pick(arrays, which), pages, value)

    @staticmethod
    def pin_pages(member: Member, number: int, pages: slice, value: int | None) -> None:
        """Pin pages, unless the process has a pin; the first ones of many."""
        if not member.is_pinning:
            few = slice(pages.start, min(pages.stop, pages.start + PINNED))
            member.ask(pin, number, few, value)
            member.is_pinning = True

    @precondition(lambda self: any(m.is_pinning for m in self.members))
    @rule(who=PICKS)
    def unpin(self, who: int) -> None:
        member = pick([m for m in self.members if m.is_pinning], who)
        member.ask(unpin)
        member.is_pinning = False

    # Processes come and go, and work at once.

    @precondition(has_room)
    @rule(who=PICKS, which=PICKS, pages=ranges(FEW), first=st.booleans(), pinned=st.booleans())
    def fork(self, who: int, which: int, pages: slice, first: bool, pinned: bool) -> None:
        """Fork one that has just written to pages, which either writes to right after."""
        member = pick(self.members, who)
        number = pick(sorted(member.private), which) if member.private else None
        if number is not None:
            member.ask(add, number, pages, slice(None), 1)
            if pinned:
                self.pin_pages(member, number, pages, 2)
        child = member.fork()
        self.members.append(child)
        if number is not None:
            one, other = (member, child) if first else (child, member)
            one.ask(add, number, pages, slice(None), 1)
            other.ask(compare, number, pages)

    @precondition(has_workers)
    @rule(who=PICKS)
    def end(self, who: int) -> None:
        worker = self.part(pick(self.members[1:], who))
        try:
            assert worker.end() == 0
        finally:
            worker.finish()

    @precondition(has_workers)
    @rule(who=PICKS, deed=DEEDS, after=st.integers(0, 200))
    def kill(self, who: int, deed: str, after: int) -> None:
        """Kill one after some faults of what it does to its own arrays, or when it has done it."""
        member = pick(self.members[1:], who)
        worker = self.part(member)
        try:
            before = faults(self.pool)
            if self.tell(member, deed, member.private, slice(None)):
                ready = worker.connection.poll
                until(lambda: ready() or faults(self.pool) >= before + after, "it is at it")
                if ready():
                    worker.answer()
            worker.kill()
        finally:
            worker.finish()

    @rule(deeds=st.lists(DEEDS, min_size=CREW + 1, max_size=CREW + 1), forks=st.booleans())
    def work_at_once(self, deeds: list[str], forks: bool) -> None:
        busy = []
        for lane, (member, deed) in enumerate(zip(self.members, deeds, strict=False)):
            if member.worker and self.tell(member, deed, member.arrays, slice(lane, WORDS, LANES)):
                busy.append(member)
        if forks and self.has_room():
            self.members.append(self.members[0].fork())
        self.do(self.members[0], deeds[0], self.members[0].arrays, slice(0, WORDS, LANES))
        for member in busy:
            member.worker.answer()

    def part(self, member: Member) -> Worker:
        self.members.remove(member)
        assert member.worker
        return member.worker

    def tell(self, member: Member, deed: str, arrays: Any, words: slice) -> bool:
        """Have a worker do something, and do not wait for it."""
        call = self.call_of(member, deed, arrays, words)
        if call and member.worker:
            member.worker.send(*call)
        return call is not None

    def do(self, member: Member, deed: str, arrays: Any, words: slice) -> None:
        call = self.call_of(member, deed, arrays, words)
        if call:
            member.ask(*call)

    @staticmethod
    def call_of(member: Member, deed: str, arrays: Any, words: slice) -> tuple[Any, ...] | None:
        """What others may do at once: in shared arrays it writes its words, and reads no others."""
        private = sorted(member.private)
        if deed == "write" and arrays:
            return add, max(arrays), slice(None), words, 1
        if deed == "scatter" and private:
            return scatter, private[-1], 3, 1
        if deed == "read" and private:
            return compare, private[0], slice(None)
        if deed == "pageout" and arrays:
            return advise, min(arrays), slice(None), "pageout"
        return None

    # The pool changes.

    def swap_bytes_without(self, area: Any) -> int:
        return sum(each.size for each in self.pool.swaps() if each.number != area.number)

    @precondition(lambda self: len(self.pool.swaps()) < AREAS)
    @rule(size=st.sampled_from([1 << 20, ENOUGH_SWAP]), priority=st.integers(-1, 1))
    def swapon(self, size: int, priority: int) -> None:
        self.pool.swapon(self.folder, size, priority)

    @rule(who=PICKS, which=PICKS)
    def swapoff(self, who: int, which: int) -> None:
        area = pick(self.pool.swaps(), which)
        if self.swap_bytes_without(area) >= ENOUGH_SWAP:
            pick(self.members, who).ask(swap_off, area)
            assert area.number not in [each.number for each in self.pool.swaps()]

    @rule(who=PICKS, frames=st.integers(*FRAMES))
    def resize(self, who: int, frames: int) -> None:
        pick(self.members, who).ask(resize, frames)
        assert self.pool.memory == frames * PAGE

    # What is always true.

    @invariant()
    def is_within_budget(self) -> None:
        assert os.fstat(self.pool.fileno()).st_blocks * 512 <= self.pool.memory

    @invariant()
    def has_every_frame_its_state(self) -> None:
        until(self.adds_up, "the frames add up")

    def adds_up(self) -> bool:
        """Whether they do; what is read ahead may be under way for longer than a check waits."""
        try:
            self.pool.check()
        except AssertionError as error:
            print(error)
            return False
        return True

    @rule()
    def is_every_page_accounted_for(self) -> None:
        """Every page that some process has is committed once, and no other is."""
        pages = len(set().union(*(member.ask(page_ids) for member in self.members)))

        def is_right() -> bool:
            now = self.pool.stats()
            return (now.workers, now.committed_bytes) == (len(self.members), pages * PAGE)

        until(is_right, f"{len(self.members)} processes and {pages} pages are what there is")

    def teardown(self) -> None:
        try:
            # Where a step has failed, that is what is to be told.
            if sys.exc_info()[0] is None:
                self.come_to_an_end()
        finally:
            now = self.pool.stats()
            for name in ("evictions", "cow_copies"):
                self.totals[name] += getattr(now, name)
            self.totals["faults"] += faults(self.pool)
            for member in self.members[1:]:
                self.part(member).finish()
            self.desk.pins.clear()
            self.desk.arrays.clear()
            gc.collect()
            self.pool.close()
            self.adopting.close()

    def come_to_an_end(self) -> None:
        """See that all is right, and that nothing is left when everybody has gone."""
        for member in self.members:
            member.ask(compare_all)
        while self.has_workers():
            self.end(0)
        self.is_every_page_accounted_for()
        self.members[0].ask(leave_blocks)
        self.desk.arrays.clear()
        gc.collect()
        until(self.is_empty, "frames, slots, pins and all that was committed are back")
        self.has_every_frame_its_state()

    def is_empty(self) -> bool:
        now = self.pool.stats()
        left = (now.workers - 1, now.pinned_pages, now.dirty_pages, now.in_transit_bytes)
        used = (now.committed_bytes, now.swap_used_bytes)
        return not any(left + used) and now.free_frames * PAGE == now.memory_bytes


def faults(pool: pyswap.Pool) -> int:
    now = pool.stats()
    return now.minor_faults + now.major_faults + now.write_faults


def test_does_every_process_see_what_plain_arrays_would_show(folder: Path) -> None:
    given = os.environ.get("PYSWAP_SEED")
    Machine.folder = folder
    Machine.totals = dict.fromkeys(("faults", "evictions", "cow_copies"), 0)
    told = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=not given,
        database=None,
        deadline=None,
        # No shrinking: what hangs takes a minute to fail each time.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    # Without a seed it is the same every time.
    run_state_machine_as_test(seed(int(given, 0))(Machine) if given else Machine, settings=told)
    print(", ".join(f"{count} {name}" for name, count in Machine.totals.items()))
    assert all(Machine.totals.values())
    assert not list(folder.iterdir())

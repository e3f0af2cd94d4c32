"""Are page ids given out once, aligned, and joined again when they come back?

The model is a set of taken ids.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyswap.extents import Extents

COUNT = 1000
ALIGN = 8
USABLE = COUNT // ALIGN * ALIGN


def rounded(pages: int) -> int:
    return -(-pages // ALIGN) * ALIGN


class ExtentsAgainstASet(RuleBasedStateMachine):
    """Takes and gives back at random."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(COUNT, ALIGN)
        self.held: list[tuple[int, int]] = []
        self.taken: set[int] = set()

    def has_room_for(self, pages: int) -> bool:
        run = 0
        for page in range(0, USABLE, ALIGN):
            run = 0 if page in self.taken else run + ALIGN
            if run >= rounded(pages):
                return True
        return False

    @rule(pages=st.integers(1, 300))
    def take(self, pages: int) -> None:
        if not self.has_room_for(pages):
            with pytest.raises(MemoryError, match=str(pages)):
                self.extents.take(pages)
            return
        first = self.extents.take(pages)
        ids = set(range(first, first + rounded(pages)))
        assert first % ALIGN == 0
        assert first >= 0
        assert max(ids) < USABLE
        assert not ids & self.taken
        self.taken |= ids
        self.held.append((first, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        first, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.extents.give_back(first, pages)
        self.taken -= set(range(first, first + rounded(pages)))

    @invariant()
    def are_free_neighbours_joined(self) -> None:
        free = self.extents.free
        ids = {page for first, count in free for page in range(first, first + count)}
        assert ids == set(range(USABLE)) - self.taken
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(free))


TestExtentsAgainstASet = ExtentsAgainstASet.TestCase
TestExtentsAgainstASet.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, database=None, print_blob=True
)


def test_is_the_whole_one_run_again_when_all_came_back() -> None:
    extents = Extents(COUNT, ALIGN)
    held = [(extents.take(pages), pages) for pages in (1, 9, 100, 8, 3, 250)]
    for first, pages in held[::2] + held[1::2]:
        extents.give_back(first, pages)
    assert extents.take(USABLE) == 0


def test_is_the_lowest_run_that_fits_taken_first() -> None:
    extents = Extents(COUNT, ALIGN)
    first, _, third = (extents.take(16) for _ in range(3))
    extents.give_back(third, 16)
    extents.give_back(first, 16)
    assert extents.take(16) == first

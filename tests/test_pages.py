"""Which pages does a view overlap?  Asked of every byte of every item, one by one."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from pyswap.pages import overlapped_pages, row_bytes, runs

pytestmark = pytest.mark.core

RANDOM = settings(max_examples=400, deadline=None, database=None, print_blob=True)

ITEMS = ["u1", "i4", "f8", "c16", "S7", "V40", [("x", "u1"), ("y", "f8"), ("z", "V30")]]


def address_of(view: npt.NDArray[Any]) -> int:
    return int(view.__array_interface__["data"][0])


def pages_byte_by_byte(view: npt.NDArray[Any], start: int, page_bytes: int) -> list[int]:
    """Visit every byte of every item."""
    found = set()
    for index in np.ndindex(view.shape):
        steps = zip(index, view.strides, strict=True)
        item = address_of(view) - start + sum(i * stride for i, stride in steps)
        found |= {byte // page_bytes for byte in range(item, item + view.itemsize)}
    return sorted(found)


@st.composite
def slices(draw: st.DrawFn, length: int) -> slice:
    step = draw(st.sampled_from([1, 1, 2, 3, 7, -1, -2, -5]))
    first = draw(st.none() | st.integers(-length, length))
    last = draw(st.none() | st.integers(-length, length))
    return slice(first, last, step)


@st.composite
def views(draw: st.DrawFn) -> tuple[npt.NDArray[Any], int]:
    """A view made as NumPy's users make them, and the address where its memory starts."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    kind = np.dtype(draw(st.sampled_from(ITEMS)))
    whole = np.empty(shape, kind, order=draw(st.sampled_from("CF")))
    lead = draw(st.integers(0, 200))
    view: Any = whole
    if kind.names and draw(st.booleans()):
        view = view[draw(st.sampled_from(kind.names))]
    view = view[tuple(draw(slices(n)) for n in view.shape)] if shape else view
    view = view.transpose(draw(st.permutations(range(view.ndim))))
    if view.ndim and draw(st.booleans()):
        view = np.broadcast_to(view, (3, *view.shape))
    return view, address_of(whole) - lead


@RANDOM
@given(views(), st.sampled_from([16, 32, 64, 256, 4096]))
def test_does_a_view_overlap_the_pages_of_its_bytes(
    made: tuple[npt.NDArray[Any], int], page_bytes: int
) -> None:
    view, start = made
    found = overlapped_pages(view, start, page_bytes)
    assert found.tolist() == pages_byte_by_byte(view, start, page_bytes)
    assert found.dtype == np.int64


@RANDOM
@given(st.data())
def test_do_strides_of_any_kind_give_the_pages_of_their_bytes(data: st.DataObject) -> None:
    memory = np.zeros(20_000, np.uint8)
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    strides = [data.draw(st.integers(-400, 400)) for _ in shape]
    view = as_strided(memory[10_000:].view("u8"), shape, strides)
    page_bytes = data.draw(st.sampled_from([16, 64, 128, 512]))
    start = address_of(memory)
    found = overlapped_pages(view, start, page_bytes).tolist()
    assert found == pages_byte_by_byte(view, start, page_bytes)


@pytest.mark.parametrize("make", ["a[3:3]", "a[:, 0:0]", "a[::-1][9:]", "a[0:0, 0:0]"])
def test_does_an_empty_view_overlap_nothing(make: str) -> None:
    a = np.zeros((8, 8))
    view = eval(make, {"a": a})
    assert view.size == 0
    assert overlapped_pages(view, address_of(a), 64).tolist() == []


def test_does_an_item_across_a_boundary_overlap_both_pages() -> None:
    a = np.zeros(4, "V100")
    assert overlapped_pages(a[1:2], address_of(a), 128).tolist() == [0, 1]
    assert overlapped_pages(a[1:2], address_of(a) - 28, 128).tolist() == [1]


def test_is_a_huge_view_answered_without_visiting_its_items() -> None:
    # 2^40 items: only arithmetic can answer.
    a = np.zeros(1, np.uint8)
    view = as_strided(a, (1 << 20, 1 << 20), (1 << 20, 1))
    found = overlapped_pages(view, address_of(a), 1 << 21)
    assert found.tolist() == list(range(1 << 19))


@RANDOM
@given(st.sets(st.integers(0, 60)), st.integers(1, 40))
def test_do_runs_join_exactly_the_pages_they_were_made_of(pages: set[int], limit: int) -> None:
    ascending = sorted(pages)
    found = runs(np.array(ascending, np.int64), limit)
    covered = [page for first, count in found for page in range(first, first + count)]
    breaks = sum(b - a > 1 for a, b in itertools.pairwise(ascending))
    if ascending and breaks + 1 > limit:
        assert found == [(ascending[0], ascending[-1] - ascending[0] + 1)]
    else:
        assert covered == ascending
        assert len(found) == (breaks + 1 if ascending else 0)
    assert all(type(n) is int for pair in found for n in pair)


@pytest.mark.parametrize(
    ("shape", "itemsize", "order", "expected"),
    [
        ((5000, 5000), 8, "C", 40000),
        ((300, 5000), 8, "F", 0),
        ((5000, 300), 8, "F", 40000),
        ((20, 1024), 8, "C", 8192),
        ((20, 1023), 8, "C", 0),
        ((100, 200, 300), 8, "C", 200 * 300 * 8),
        ((100, 2000, 300), 8, "F", 100 * 2000 * 8),
        ((10, 2000, 2), 8, "C", 32000),
        ((1 << 20,), 8, "C", 0),
        ((), 8, "C", 0),
        ((0, 5000), 8, "C", 40000),
        ((5000, 0), 8, "C", 0),
    ],
)
def test_how_far_apart_are_the_rows_of_a_new_array(
    shape: tuple[int, ...], itemsize: int, order: Literal["C", "F"], expected: int
) -> None:
    found = row_bytes(shape, itemsize, order, 4096)
    assert found == expected
    if found and 0 not in shape:
        assert found in np.empty(shape, f"V{itemsize}", order).strides

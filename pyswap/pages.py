"""Where an array lies on pages: which ones a view's bytes overlap, and how far apart rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["overlapped_pages", "row_bytes", "runs"]

LEAST_ROW_PAGES = 2
"""Rows that are closer to each other are as good as neighbours."""


def row_bytes(
    shape: Sequence[int], itemsize: int, order: Literal["C", "F"], page_bytes: int
) -> int:
    """Compute how far apart the rows of a new array are: its first stride of two pages or more.

    That is what a block of it, or a column, is followed by. 0: it has no such rows.
    """
    stride = itemsize
    lengths = shape[::-1] if order == "C" else shape
    for n in lengths[:-1]:
        stride *= n
        if stride >= LEAST_ROW_PAGES * page_bytes:
            return stride
    return 0


def overlapped_pages(
    view: npt.NDArray[np.generic], start: int, page_bytes: int
) -> npt.NDArray[np.int64]:
    """Find the pages that a view's bytes overlap.

    Parameters
    ----------
    view : ndarray
        Any shape, strides and dtype.
    start : int
        The address of the region's first page.
    page_bytes : int
        Bytes of a page.

    Returns
    -------
    ndarray of int64, shape (n,)
        Page indices from `start`, ascending, each once.
    """
    if view.size == 0:
        return np.empty(0, np.int64)
    first, block, outer = _blocks(view, page_bytes)
    offsets = np.array([first - start], np.int64)
    for stride, count in outer:
        offsets = np.add.outer(offsets, np.arange(count, dtype=np.int64) * stride).ravel()
    low = offsets // page_bytes
    high = (offsets + block - 1) // page_bytes
    if len(outer) == 0:
        return np.arange(low[0], high[0] + 1, dtype=np.int64)
    # +1 where a block's pages begin, -1 behind their end: the running sum is positive on its pages.
    base = low.min()
    steps = np.zeros(int(high.max() - base) + 2, np.int64)
    np.add.at(steps, low - base, 1)
    np.add.at(steps, high - base + 1, -1)
    found: npt.NDArray[np.int64] = np.flatnonzero(np.cumsum(steps) > 0) + base
    return found


def runs(pages: npt.NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Join ascending pages into runs (first, count); more than `limit` become one run over all."""
    if len(pages) == 0:
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    if len(breaks) + 1 > limit:
        return [(int(pages[0]), int(pages[-1] - pages[0]) + 1)]
    firsts = pages[np.concatenate(([0], breaks))]
    counts = np.diff(np.concatenate(([0], breaks, [len(pages)])))
    return [(int(f), int(n)) for f, n in zip(firsts, counts, strict=True)]


def _blocks(
    view: npt.NDArray[np.generic], page_bytes: int
) -> tuple[int, int, list[tuple[int, int]]]:
    """The lowest address, bytes of a block without a page's gap, (stride, count) of repeats."""
    first = int(view.__array_interface__["data"][0])
    steps = []
    for stride, count in zip(view.strides, view.shape, strict=True):
        if stride < 0:
            first += stride * (count - 1)
        if count > 1 and stride:
            steps.append((abs(stride), count))
    block = view.itemsize
    outer: list[tuple[int, int]] = []
    for stride, count in sorted(steps):
        # A gap shorter than a page holds no page of its own.
        if not outer and stride - block < page_bytes:
            block += stride * (count - 1)
        else:
            outer.append((stride, count))
    return first, block, outer

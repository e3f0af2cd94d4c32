"""Runs of page ids: which are given to an object, and which are free."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

__all__ = ["Extents"]


class Extents:
    """First-fit allocator of runs of page ids.

    Not for use from several threads at once.

    Parameters
    ----------
    count : int
        Page ids there are.
    align : int
        Every run starts at a multiple of this and ends before the next.

    Attributes
    ----------
    free : list of tuple of int
        The first page id and the length of each run that nobody has, in order.
    """

    def __init__(self, count: int, align: int) -> None:
        self._align = align
        self.free: list[tuple[int, int]] = [(0, count // align * align)]

    def take(self, pages: int) -> int:
        """Give out a run of `pages` page ids and return the first.

        Raises
        ------
        MemoryError
            If no free run is so long.
        """
        wanted = self._rounded(pages)
        for i, (first, count) in enumerate(self.free):
            if count >= wanted:
                if count == wanted:
                    del self.free[i]
                else:
                    self.free[i] = (first + wanted, count - wanted)
                return first
        raise MemoryError(f"no run of {pages} page ids is free in the page store")

    def reserve(self, first: int, pages: int) -> None:
        """Take a certain run, of which every page id is free."""
        count = self._rounded(pages)
        i = bisect_right(self.free, (first, 1 << 64)) - 1
        start, length = self.free.pop(i)
        if first + count < start + length:
            self.free.insert(i, (first + count, start + length - first - count))
        if start < first:
            self.free.insert(i, (start, first - start))

    def give_back(self, first: int, pages: int) -> None:
        """Take back a run that `take` gave out, and join it with its free neighbours."""
        count = self._rounded(pages)
        i = bisect_left(self.free, (first, 0))
        if i < len(self.free) and self.free[i][0] == first + count:
            count += self.free.pop(i)[1]
        if i and sum(self.free[i - 1]) == first:
            first, before = self.free.pop(i - 1)
            count += before
        insort(self.free, (first, count))

    def _rounded(self, pages: int) -> int:
        return -(-pages // self._align) * self._align

"""Physical frames, as the kernel tells root of them: the same number is the same memory."""

from __future__ import annotations

import struct
from typing import Any

PAGE_BYTES = 4096
_ENTRY_BYTES = 8
_PRESENT = 1 << 63
_NUMBER = (1 << 55) - 1


def frames_of(a: Any) -> list[int]:
    """Return the physical frame of each page of a contiguous array, in this process.

    Every page is read first; the array has to fit into memory.
    """
    a.sum()
    pages = a.nbytes // PAGE_BYTES
    address = a.__array_interface__["data"][0]
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(address // PAGE_BYTES * _ENTRY_BYTES)
        entries = struct.unpack(f"{pages}Q", table.read(pages * _ENTRY_BYTES))
    assert all(entry & _PRESENT for entry in entries)
    numbers = [entry & _NUMBER for entry in entries]
    assert all(numbers), "the kernel tells frames to root only"
    return numbers

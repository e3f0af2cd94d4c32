"""Sizes as people write them: text to bytes, and bytes to text."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import SupportsIndex

__all__ = ["ADDRESS_SPACE_BYTES", "format_size", "is_bool", "parse_size"]

ADDRESS_SPACE_BYTES = 1 << 47
"""What one process can address (x86-64 and aarch64, 4-level page tables)."""

_LETTERS = "kmgtp"
_LONGEST_TEXT = 64
_SIZE = re.compile(r"\s*([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)


def _unit_table() -> dict[str, int]:
    """Return the bytes of each unit, by its lower-case name."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate(_LETTERS, start=1):
        for binary in (letter, letter + "i", letter + "ib"):
            units[binary] = 1024**power
        units[letter + "b"] = 1000**power
    return units


_UNITS = _unit_table()


def parse_size(value: SupportsIndex | str, *, what: str) -> int:
    """Convert a size as people write it to bytes.

    Parameters
    ----------
    value : int or str
        Bytes as any integer (NumPy's too, but no bool), or a number with a unit: ``"256 MiB"``,
        ``"1.5 GiB"``, ``"64k"``. Single letters K, M, G, T, P and KiB, MiB, ... are powers of
        1024; KB, MB, ... are powers of 1000; B or nothing is bytes. Case does not matter. A
        fraction of a byte is dropped.
    what : str
        What the size is of; error messages begin with it.

    Returns
    -------
    int
        Bytes, from 0 to below `ADDRESS_SPACE_BYTES`.

    Raises
    ------
    TypeError
        If `value` is neither an integer nor a string.
    ValueError
        If `value` is negative, cannot be read, or does not fit in the address space.
    """
    size = _parse_text(value, what) if isinstance(value, str) else _parse_integer(value, what)
    if size < 0:
        raise ValueError(f"{what} must not be negative, but is {_shown(value)}")
    if size >= ADDRESS_SPACE_BYTES:
        limit = format_size(ADDRESS_SPACE_BYTES)
        raise ValueError(f"{what} of {_shown(value)} does not fit in the address space of {limit}")
    return size


def format_size(size_bytes: int) -> str:
    """Write a size for people: ``"256.0 MiB"``, ``"512 B"``.

    Parameters
    ----------
    size_bytes : int
        Bytes, at least 0.

    Returns
    -------
    str
        One decimal and the largest binary unit, up to PiB, that leaves at least 1 before it.
    """
    if size_bytes < 1024:
        return f"{size_bytes} B"
    number = size_bytes / 1024
    power = 0
    # Compared as rounded, so that one byte less than a MiB is not "1024.0 KiB".
    while round(number, 1) >= 1024 and power < len(_LETTERS) - 1:
        number /= 1024
        power += 1
    return f"{number:.1f} {_LETTERS[power].upper()}iB"


def is_bool(value: object) -> bool:
    """Tell whether `value` is Python's or NumPy's truth value, which count as integers too."""
    of_numpy = getattr(getattr(value, "dtype", None), "kind", "") == "b"
    return isinstance(value, bool) or (of_numpy and getattr(value, "shape", None) == ())


def _parse_integer(value: object, what: str) -> int:
    if not is_bool(value):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    kind = type(value).__name__
    raise TypeError(f'{what} must be an int of bytes or a string such as "256 MiB", not {kind}')


def _parse_text(text: str, what: str) -> int:
    # The bound keeps Python's own limit on the digits of an int out of the messages.
    match = _SIZE.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f'{what} must be a size such as "256 MiB" or "2 GB", not {_shown(text)}')
    size = Fraction(match[2]) * unit
    return -max(1, int(size)) if match[1] == "-" and size else int(size)


def _shown(value: object) -> str:
    """Show `value` in a message: neither a long text nor a huge int may fill a screen."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_TEXT else value[:_LONGEST_TEXT] + "...")
    number = operator.index(value)  # type: ignore[arg-type]
    return str(number) if number.bit_length() <= 128 else f"an int of {number.bit_length()} bits"

"""Arrays in files: NumPy's .npy header, and the members of an .npz archive."""

from __future__ import annotations

import ast
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ArrayHeader",
    "Progress",
    "check_room",
    "copy_into",
    "is_plain",
    "opened",
    "read_header",
]

Progress = Callable[[int, int], object]
"""Called with the bytes done and all there are, after each piece."""

MAX_HEADER_BYTES = 10_000
"""NumPy's own bound: a longer header may crash the parser."""
COPY_PIECE_BYTES = 1 << 20
"""Bytes that are read at once from what is not simply a file."""


@dataclass(frozen=True)
class ArrayHeader:
    """What a .npy file says of its array.

    Attributes
    ----------
    shape, dtype
        As NumPy's.
    fortran : bool
        Whether the items are in Fortran order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of the items, which follow the header."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> ArrayHeader:
    """Read the header of a .npy file, up to its items.

    Raises
    ------
    ValueError
        If it is none, or its array has Python objects, which are loaded by pickle only.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, kind = np.lib.format.read_array_header_1_0(stream, MAX_HEADER_BYTES)
    elif version == (2, 0):
        shape, fortran, kind = np.lib.format.read_array_header_2_0(stream, MAX_HEADER_BYTES)
    elif version == (3, 0):
        shape, fortran, kind = _read_header_3(stream)
    else:
        raise ValueError(f"only versions 1.0, 2.0 and 3.0 of .npy can be read, not {version}")
    if kind.hasobject:
        raise ValueError(f"an array of dtype {kind} holds Python objects, which cannot be loaded")
    return ArrayHeader(shape, kind, fortran)


def _read_header_3(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of version 3.0, whose field names are UTF-8; NumPy has no function for it."""
    size = int.from_bytes(stream.read(4), "little")
    text = stream.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        told = ast.literal_eval(text.decode("utf-8"))
        shape, fortran = told["shape"], told["fortran_order"]
        kind = np.lib.format.descr_to_dtype(told["descr"])
    except (SyntaxError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"the header cannot be read: {error}") from None
    is_shape = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not is_shape or not isinstance(fortran, bool):
        raise ValueError("the header has no shape or no order")
    return shape, fortran, kind


def is_plain(stream: IO[bytes]) -> bool:
    """Tell whether a stream is simply a file's bytes.

    What decompresses has the descriptor of the file that it reads, at another position.
    """
    return isinstance(getattr(stream, "raw", stream), io.FileIO)


def check_room(stream: IO[bytes], header: ArrayHeader) -> None:
    """Raise ValueError where a file holds less than the header that was read from it says."""
    if not is_plain(stream):
        return
    left = os.fstat(stream.fileno()).st_size - stream.tell()
    if left < header.size_bytes:
        raise ValueError(
            f"the file has {left} of the {header.size_bytes} bytes that its header tells of"
        )


def copy_into(target: npt.NDArray[np.uint8], stream: IO[bytes], progress: Progress | None) -> None:
    """Read a stream into an array, through memory that any stream can write to."""
    done = 0
    while done < target.size:
        piece = stream.read(min(COPY_PIECE_BYTES, target.size - done))
        if not piece:
            raise ValueError(f"the file ends {target.size - done} bytes before its array does")
        target[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
        if progress is not None:
            progress(done, target.size)
    # At its end an archive compares the checksum.
    if isinstance(stream, zipfile.ZipExtFile):
        stream.read(1)


@contextmanager
def opened(file: Any, member: str | None) -> Iterator[IO[bytes]]:
    """Open an array's file, or the member of an archive, at its header.

    Parameters
    ----------
    file : path or file object
        A .npy file, or an archive of such.
    member : str, optional
        The member's name, with or without ".npy".

    Raises
    ------
    ValueError
        If the file is an archive and no member is named, or the reverse.
    KeyError
        If the archive has no such member.
    """
    if not hasattr(file, "read"):
        with open(os.fspath(file), "rb") as stream, opened(stream, member) as found:
            yield found
        return
    begin = file.tell()
    is_archive = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    file.seek(begin)
    if is_archive != (member is not None):
        reason = "is an archive: name its member" if is_archive else "is no archive with members"
        raise ValueError(f"{getattr(file, 'name', 'the file')} {reason}")
    if member is None:
        yield file
        return
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        name = member if member in names else f"{member}.npy"
        if name not in names:
            there = ", ".join(each.removesuffix(".npy") for each in names)
            raise KeyError(f"the archive has no member {member!r}, but {there}")
        with archive.open(name) as inner:
            yield inner

"""The exceptions of pyswap's own; everything else it raises is Python's or NumPy's.

Each of them is also the built-in exception that a caller would guess, so code that knows nothing
of pyswap handles them rightly.
"""

from __future__ import annotations

__all__ = ["Error", "GoneError", "PoolClosedError", "SwapFullError", "SwapIOError"]


class Error(Exception):
    """The base of every exception that only pyswap raises."""


class PoolClosedError(Error, ValueError):
    """A closed pool was asked for something new.

    Raised by making an array in a pool, or attaching to one, after `close()`, after the end of
    its `with` block or after the exit of its creator. Arrays that live already stay right. It is
    a ValueError, as the use of a closed file is.
    """


class GoneError(Error):
    """An array that a pickle or a name refers to has been freed.

    Raised by loading a pickle, or attaching by name, when the object's last reference in the
    last process has ended, or when it was released. Of a pool that is no more, see
    `PoolClosedError`.
    """


class SwapFullError(Error, MemoryError):
    """Frames and swap areas together cannot hold what is asked for.

    Raised when space is committed: by making an array that does not fit beside those that are
    there, and by taking away a swap area whose pages have no other place.
    """


class SwapIOError(Error, OSError):
    """A swap area could not be read or written, or gave back other bytes than were written.

    Raised where a Python call waits for the transfer itself, with the `errno` of the failure.
    """

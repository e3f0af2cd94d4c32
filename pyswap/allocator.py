"""`numpy_memory`: NumPy's own arrays in a pool's memory, from a size on.

NumPy asks a memory handler for the data of every array (NEP 49). The handler that is used where
nobody set another is replaced, once, by ours (`pyswap._allocator`), which takes what is large from
an arena of the pool and hands all else to the one before. A handler that is set the official way
is a context variable, which threads that start later do not inherit: so the default changes.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from . import _allocator, config, shim
from ._native import native
from .errors import Error
from .pool import Pool
from .sizes import parse_size

if TYPE_CHECKING:
    from typing_extensions import Self

    from .worker import Attachment

__all__ = ["numpy_memory"]

_log = logging.getLogger("pyswap")

_TESTED = ((1, 26), (3, 0))
"""NumPy from the first version on, below the second, has the handler that `_allocator` knows."""


NO, YES, NEVER = 0, 1, 2
"""What `_allocator` is answered."""


def _capacity(attachment: Attachment) -> int:
    """Bytes of all frames and slots of a pool."""
    assert attachment.control is not None
    numbers = attachment.control.numbers()
    pages = int(numbers["memory_pages"]) + int(numbers["slot_count"])
    return pages * attachment.settings.page_size


class _Lines:
    """Each pool's line to its swapper in this process, by the token of the pool."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}

    def of(self, attachment: Attachment) -> int:
        """Return the line, opened at first."""
        line = self.open.get(attachment.token)
        if line is None:
            line = self.open[attachment.token] = attachment.open_line()
        return line

    def close(self, token: int) -> None:
        """Close a pool's line; whoever used it must have another by then."""
        line = self.open.pop(token, None)
        if line is not None:
            os.close(line)


class _House:
    """What `_allocator` asks for where it cannot go on alone, with the GIL held."""

    def __init__(self) -> None:
        self.installed: list[numpy_memory] = []
        self.regions: dict[int, tuple[native.Region, int]] = {}  # by place; the pool's token
        self.lines = _Lines()
        self._grows_in: int | None = None
        self._complained = False

    def grow(self, size: int) -> int:
        """Have an arena more, with room for `size` bytes: YES; NO: there is none; or NEVER."""
        thread = threading.get_ident()
        if not self.installed or self._grows_in == thread:
            return NO
        attachment = self.installed[-1].attachment
        if attachment.caller == thread:
            # Called from garbage that was collected in the middle of a request of this thread.
            return NO
        if not attachment.settings.overcommit and size > _capacity(attachment):
            return NEVER
        self._grows_in = thread
        try:
            self.add_arena(attachment, size)
        except MemoryError:
            return NEVER
        except (Error, OSError) as error:
            if not self._complained:
                self._complained = True
                _log.warning(
                    "pyswap: NumPy's arrays are in ordinary memory from here on: %s", str(error)
                )
            return NO
        finally:
            self._grows_in = None
        return YES

    def add_arena(self, attachment: Attachment, size: int) -> None:
        """Make an arena of a pool: as long as its frames and swap, or as one array needs."""
        page = attachment.settings.page_size
        length = max(_capacity(attachment), -(-size // page) * page)
        if length >= config.STORE_BYTES:
            raise MemoryError(f"an array of {size} bytes is more than a pool can address")
        label = f"pool {attachment.settings.name!r}, NumPy's arrays"
        region = attachment.new_region(length, label, sparse=True)
        shift = page.bit_length() - 1
        line = self.lines.of(attachment)
        place = _allocator.arena_add(
            region.address, length, shift, attachment.token, line, attachment.mapper()
        )
        self.regions[place] = region, attachment.token

    def reopen(self, token: int) -> bool:
        """Have another line where one has ended: its swapper did, and another has taken over."""
        without = "pyswap: NumPy's arrays are in ordinary memory from here on: %s"
        return self._renew(token, logging.WARNING, without)

    def settle(self, token: int) -> bool:
        """Have another line, since something was freed that could not be told over the one before.

        Where there will be none, the pool has ended, or ends, and its memory with it.
        """
        without = "pyswap: what NumPy freed stays in the pool until it ends: %s"
        return self._renew(token, logging.DEBUG, without)

    def _renew(self, token: int, level: int, without: str) -> bool:
        attachment = self._attachment(token)
        if attachment is None or attachment.caller == threading.get_ident():
            # In the middle of a request of this thread: the next block tells.
            return False
        try:
            line = attachment.open_line()
            _allocator.arenas_line(token, line)
            self.lines.close(token)
            self.lines.open[token] = line
        except (Error, OSError) as error:
            _log.log(level, without, str(error))
            return False
        return True

    def spent(self, place: int) -> bool:
        """Give back an arena that is empty and of no more use."""
        if not _allocator.arena_remove(place):
            return False
        _, token = self.regions.pop(place)
        if not self.has_arena(token):
            self.lines.close(token)
        self.end_shim()
        return True

    def has_arena(self, token: int) -> bool:
        """Whether an arena of a pool is left."""
        return any(token == whose for _, whose in self.regions.values())

    def switch(self) -> None:
        """Have blocks come from the pool that was installed last, and give back what is spent."""
        if self.installed:
            top = self.installed[-1]
            _allocator.activate(top.attachment.token, top.threshold)
        else:
            _allocator.activate(0, 0)
        for place in _allocator.arenas_spent():
            self.spent(place)
        self.end_shim()

    def end_shim(self) -> None:
        """Let system calls go straight again, where no array needs more."""
        if not self.installed and not self.regions:
            shim.end()

    def after_fork_in_child(self) -> None:
        """Open lines of this process: what was inherited can be freed, and new arenas are made."""
        for token in list(self.lines.open):
            self.lines.close(token)
            attachment = self._attachment(token)
            if attachment is None or attachment.is_left():
                continue
            try:
                _allocator.arenas_line(token, self.lines.of(attachment))
            except (Error, OSError) as error:
                _log.error("pyswap: what NumPy frees in this process stays: %s", str(error))
        self._grows_in = None
        _allocator.free_deferred()
        self.switch()

    def _attachment(self, token: int) -> Attachment | None:
        from .worker import attachment_of

        return attachment_of(token)


_house = _House()


def _after_in_parent() -> None:
    _allocator.fork_end(False)
    _allocator.free_deferred()


def _after_in_child() -> None:
    _allocator.fork_end(True)
    _house.after_fork_in_child()


class numpy_memory:  # noqa: N801 (it is used as a function is: `with numpy_memory(pool):`)
    """Have NumPy make its arrays in a pool's memory, from a size on: temporaries and results too.

    As a context manager it holds inside the ``with`` block, in every thread of this process and in
    the children that it forks; `install` makes it hold until `uninstall`, or the process's end.

    Parameters
    ----------
    pool : Pool
        Whose memory, budget and swap.
    threshold : int or str, optional
        Arrays of so many bytes or more are paged, in whole pages; smaller ones are made as before.

    Raises
    ------
    ValueError, TypeError
        If `threshold` makes no sense, or `pool` is none.
    pyswap.Error
        If this version of NumPy is not known to work.
    PoolClosedError
        If the pool makes no more arrays.

    Notes
    -----
    The arrays are plain ndarrays, private to their process: after a fork each has its own, and what
    is not written stays shared, in memory and in swap. What is freed gives its memory and swap
    back at once. Where frames and swap have no room, NumPy raises MemoryError. Arrays may outlive
    the block and the pool. A `numpy.ndarray.resize` grows in place, or else moves pages, which
    stay in memory or in swap as they are; what a fork has shared, or a pin holds, is copied.
    """

    def __init__(self, pool: Pool, threshold: int | str = "1 MiB") -> None:
        if not isinstance(pool, Pool):
            raise TypeError(f"a Pool is needed, not {type(pool).__name__}")
        self.threshold = parse_size(threshold, what="threshold")
        if self.threshold < 1:
            raise ValueError(f"threshold must be at least 1 byte, not {self.threshold}")
        self.attachment = pool._attachment

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()

    def install(self) -> None:
        """Let it hold from here on; what was installed before holds again after `uninstall`."""
        _hook()
        if not _house.has_arena(self.attachment.token):
            _house.add_arena(self.attachment, 1)
        shim.begin()
        _house.installed.append(self)
        _house.switch()
        try:
            _check_hook(self.threshold)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """End it; arrays that live stay where they are."""
        if self in _house.installed:
            _house.installed.remove(self)
            _house.switch()


def _hook() -> None:
    """Put our handler in the default one's place, if this NumPy is one that is known."""
    version = tuple(int(n) for n in np.__version__.split(".")[:2])
    if not _TESTED[0] <= version < _TESTED[1]:
        raise Error(
            f"NumPy {np.__version__} is not known here: its memory handler may be another; "
            "1.26 and 2 are"
        )
    if _house in _hooked:
        return
    try:
        _allocator.hook(_house)
    except ImportError as error:
        raise Error(f"NumPy {np.__version__}: {error}") from None
    os.register_at_fork(
        before=_allocator.fork_begin,
        after_in_parent=_after_in_parent,
        after_in_child=_after_in_child,
    )
    _hooked.append(_house)


_hooked: list[_House] = []


def _check_hook(threshold: int) -> None:
    """See to it that an array that a thread makes is in a pool's memory."""
    found: list[bool] = []

    def look() -> None:
        # A full pool has no room, which is no fault of NumPy's.
        with suppress(MemoryError):
            found.append(owns(np.empty(threshold, np.uint8)))

    thread = threading.Thread(target=look, name="pyswap-check")
    thread.start()
    thread.join()
    if found == [False]:
        raise Error(f"NumPy {np.__version__} does not ask the memory handler that was set")


def owns(a: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bool:
    """Whether an array's memory is a pool's."""
    return bool(native.owns(a.__array_interface__["data"][0]))

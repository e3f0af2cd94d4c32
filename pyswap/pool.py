"""`Pool`: one memory budget and its swap, and the arrays in it."""

from __future__ import annotations

import base64
import itertools
import operator
import os
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from . import config
from ._native import native
from .address import Address
from .areas import SwapArea
from .errors import Error, PoolClosedError, SwapFullError
from .files import Progress, check_room, copy_into, is_plain, opened, read_header
from .joining import attachment_for
from .objects import Backing
from .paged import PIN_PIECE_BYTES, PagedArray, paged, paged_like
from .pages import overlapped_pages, row_bytes, runs
from .segments import open_swap
from .settings import resolve, resolve_area, resolve_memory
from .stats import Stats
from .worker import Attachment, attachment_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Pool", "engine_mode", "pool_of"]

Advice = Literal["willneed", "dontneed", "sequential", "random", "normal", "pageout"]
_ADVICE = ("willneed", "dontneed", "sequential", "random", "normal", "pageout")

NAME_LENGTH = 48
"""Characters of an array's name that messages show."""
LABEL_LENGTH = 1000
"""Characters of an array's name by which it is found."""

_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()
_pin_numbers = itertools.count(1)


class Pool:
    """A memory budget shared by this process and those it forks, with swap behind it.

    Parameters
    ----------
    memory : int, str or float
        The budget: bytes; a string such as ``"256 MiB"``, ``"2G"`` (GiB) or ``"2 GB"`` (10^9
        bytes); or a fraction in (0, 1] of what the cgroup or the machine has available, the
        smaller. Pages of arrays in memory never take more, at any instant, in all processes
        together.
    swap : int or str, optional
        Bytes of swap; 0 for none. By default four times the budget, or half of what the disk has
        free, where that is less.
    swap_path : path, optional
        A folder, or a file that does not exist yet; it has no name once the pool is made. By
        default ``$PYSWAP_DIR``, else the temporary folder, or /var/tmp where that is a tmpfs.
    page_size : int or str, optional
        Bytes of a page, a power of two from 4 KiB to 2 MiB; 4 KiB by default.
    name : str, optional
        For messages.
    overcommit : bool, optional
        Allow arrays that frames and swap together could not hold if they were all written.

    Raises
    ------
    ValueError, TypeError
        If an argument makes no sense here: which one, and why, is in the text.
    OSError
        If the swap file cannot be made; ENOSPC where the disk has too little room.
    pyswap.Error
        If this kernel or container lacks what a pool needs.

    Notes
    -----
    The pool may be used from several threads. A forked child uses the same pool; `close` and the
    end of a ``with`` block in a child end the child's own use.
    """

    def __init__(
        self,
        memory: str | float,
        swap: int | str | None = None,
        *,
        swap_path: str | os.PathLike[str] | None = None,
        page_size: int | str | None = None,
        name: str | None = None,
        overcommit: bool = False,
    ) -> None:
        self._begin(Attachment(resolve(memory, swap, swap_path, page_size, name, overcommit)))

    def _begin(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._settings = attachment.settings
        self._closed_in = os.getpid() if attachment.leaving else None
        self._array_numbers = itertools.count(1)
        _pools[attachment.token] = self

    def __repr__(self) -> str:
        state = "closed" if self._closed_in == os.getpid() else "open"
        sizes = f"{self.memory} bytes in pages of {self.page_size}"
        return f"<pyswap.Pool {self.name!r}: {sizes}, {state}>"

    def __reduce__(self) -> Any:
        return _pool_there, (self.address(),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Facts.

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._settings.name

    @property
    def memory(self) -> int:
        """The budget in bytes: whole pages; see `resize`."""
        control = self._attachment.control
        if control is None:
            return self._settings.memory_bytes
        return int(control.numbers()["memory_pages"]) * self.page_size

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self._settings.page_size

    @property
    def attachment(self) -> Attachment:
        """This process's part in the pool: for the library itself."""
        return self._attachment

    def address(self) -> tuple[Any, ...]:
        """Return all that a process of this user needs to attach, the pool's secret included."""
        return tuple(self._attachment.address)

    @property
    def swapper_pid(self) -> int:
        """The process id of the swapper."""
        return int(self._control().numbers()["swapper_pid"])

    def fileno(self) -> int:
        """Return the page store's descriptor: its ``st_blocks * 512`` bytes are in use."""
        self._control()
        return self._attachment.store_fd

    def stats(self) -> Stats:
        """Return the pool's numbers now.

        Raises
        ------
        PoolClosedError
            If this process no longer uses the pool.
        """
        control = self._control()
        metadata_bytes = os.fstat(self._attachment.control_fd).st_blocks * 512
        return Stats.of(control.numbers(), metadata_bytes, len(control.workers()))

    def check(self) -> None:
        """Check the frame table against itself and the store; the pool must be idle.

        Raises
        ------
        AssertionError
            If frames by state do not add up, or the store holds other than the frames' bytes.
        """
        broken = self._call("check").get("broken")
        if broken:
            raise AssertionError(broken)

    def resize(self, memory: str | float) -> None:
        """Change the budget while processes work.

        Parameters
        ----------
        memory : int, str or float
            As for `Pool`.

        Raises
        ------
        ValueError, TypeError
            If `memory` makes no sense, or is too little for the processes there are.
        SwapFullError
            If arrays have more pages than the new budget and swap can hold.
        MemoryError
            If pinned pages leave too little, or pages could not be evicted in time; the budget is
            then as before.

        Notes
        -----
        A lower budget holds when the call returns; until then memory never exceeds the old one.
        Interrupted, the call leaves it to the swapper to go on. A higher budget than /dev/shm has
        room for is not reached: the pool goes on with the frames for which there is memory.
        """
        self._call("resize", frames=resolve_memory(self._settings, memory))

    # Swap areas.

    def swapon(self, path: str | os.PathLike[str], size: int | str, priority: int = 0) -> SwapArea:
        """Add a swap area.

        Parameters
        ----------
        path : path
            A folder, or a file that does not exist yet; it has no name once it is made.
        size : int or str
            Bytes of it, or a string such as ``"4 GiB"``.
        priority : int, optional
            Areas of the highest priority are filled first, those of an equal one in turn. The
            pool's first area has 0.

        Raises
        ------
        ValueError, TypeError, OSError
            As `Pool` does for `swap` and `swap_path`, and for more areas than a pool may have.
        """
        wanted = resolve_area(self._settings, path, size)
        rank = operator.index(priority)
        if not -(1 << 31) <= rank < 1 << 31:
            raise ValueError(f"priority must be an integer of 32 bits, not {rank}")
        fd, _ = open_swap(wanted)
        try:
            made = self._call(
                "swapon",
                fds=(fd,),
                path=str(wanted.swap_path),
                size=wanted.swap_bytes,
                priority=rank,
            )
        finally:
            os.close(fd)
        return next(area for area in self.swaps() if area.number == made["area"])

    def swaps(self) -> tuple[SwapArea, ...]:
        """Return the swap areas as they are now, in the order in which they were added."""
        return tuple(SwapArea(**area) for area in self._call("swaps")["areas"])

    def swapoff(self, area: SwapArea, progress: Callable[[int, int], object] | None = None) -> None:
        """Take a swap area away, while the arrays are in use.

        Its pages go into memory, and from there to other areas; those that were shared stay so.

        Parameters
        ----------
        area : SwapArea
            What `swapon` or `swaps` returned.
        progress : callable, optional
            Called now and then with the pages done and all there were at the beginning.

        Raises
        ------
        SwapFullError
            If memory and the other areas cannot hold the pages; nothing has changed then.
        ValueError
            If the area is off already, or another process is taking it off.

        Notes
        -----
        Interrupted, or ended by an exception of `progress`, it leaves the area on, with the pages
        that are still in it.
        """
        if not isinstance(area, SwapArea):
            raise TypeError(f"a swap area is needed, not {type(area).__name__}")
        # What the first call refuses has changed nothing, and may be what another thread is doing.
        refusals: tuple[type[Exception], ...] = (ValueError, SwapFullError)
        try:
            total = int(self._call("swapoff", area=area.number)["total"])
            refusals = ()
            while True:
                left = int(self._call("drain", area=area.number)["left"])
                if progress is not None:
                    progress(max(0, total - left), total)
                if left == 0:
                    return
        except BaseException as error:
            if not isinstance(error, refusals):
                with suppress(Error):
                    self._call("swapoff_cancel")
            raise

    # Arrays.

    def empty(
        self,
        shape: Any,
        dtype: npt.DTypeLike = float,
        order: Literal["C", "F"] = "C",
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of zeros, as `numpy.empty` (whose bytes may be anything) does.

        Parameters
        ----------
        shape, dtype, order
            As in NumPy.
        name : str, optional
            For messages, which show its beginning.
        private : bool, optional
            Copied on write after fork: a child sees the array as it was, and what either writes
            from then on is its own. Only pages that are written are copied, and only then; the
            others stay shared, in memory and in swap. By default an array is shared: every
            process sees every write.

        Raises
        ------
        SwapFullError
            If frames and swap cannot hold it beside the other arrays.
        PoolClosedError
            After `close`.
        TypeError
            If the dtype holds Python objects: their addresses mean nothing to other processes.
        """
        kind = _with_length(np.dtype(dtype))
        if kind.hasobject:
            raise TypeError(f"dtype {kind} holds Python objects, which cannot be shared or swapped")
        laid_out = _order(order, "CF")
        self._check_new(name)
        dimensions = _dimensions(shape)
        size = kind.itemsize
        for n in dimensions:
            size *= n
        layout: Literal["C", "F"] = "F" if laid_out == "F" else "C"
        row = row_bytes(dimensions, kind.itemsize, layout, self.page_size)
        region = self._new_region(size, name, private=bool(private), row_bytes=row)
        made = paged(region, dimensions, kind, layout)
        return self._named(made, name)

    def _named(self, a: PagedArray, name: str | None) -> PagedArray:
        """Have an array found by its name, as it lies in memory now."""
        if name is not None:
            start, _ = self._region_of(a)
            if start not in self._attachment.private:
                layout = base64.b64encode(pickle.dumps(layout_of(a, start), 4)).decode()
                label = name[:LABEL_LENGTH]
                self._call("name", address=start, label=label, layout=layout)
            self._attachment.labels[start] = name
        return a

    def name_of(self, a: npt.NDArray[Any]) -> str | None:
        """Return the name that an array was made with; see `PagedArray.name`."""
        return self._attachment.labels.get(self._region_of(a)[0])

    def _new_region(self, size: int, name: str | None, **kind: Any) -> native.Region:
        if size >= config.STORE_BYTES:
            raise ValueError(
                f"an array of {size} bytes is over the {config.STORE_BYTES} that a pool can address"
            )
        label = (name or f"array {next(self._array_numbers)}")[:NAME_LENGTH]
        return self._attachment.new_region(size, f"pool {self.name!r}, {label}", **kind)

    def _check_new(self, name: str | None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        if self._closed_in == os.getpid():
            raise PoolClosedError(f"pool {self.name!r} is closed: it makes no more arrays")

    def zeros(
        self,
        shape: Any,
        dtype: npt.DTypeLike = float,
        order: Literal["C", "F"] = "C",
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of zeros; a page takes memory when it is touched; see `empty`."""
        return self.empty(shape, dtype, order, name=name, private=private)

    def ones(
        self,
        shape: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["C", "F"] = "C",
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of ones; see `empty`."""
        kind = float if dtype is None else dtype
        return self.full(shape, 1, kind, order, name=name, private=private)

    def full(
        self,
        shape: Any,
        fill_value: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["C", "F"] = "C",
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array full of `fill_value`; see `empty`."""
        kind = np.asarray(fill_value).dtype if dtype is None else dtype
        made = self.empty(shape, kind, order, name=name, private=private)
        np.copyto(made, fill_value, casting="unsafe")
        return made

    def array(
        self,
        object: Any,  # noqa: A002 (NumPy's name)
        dtype: npt.DTypeLike | None = None,
        *,
        copy: bool | None = True,
        order: Literal["K", "A", "C", "F"] = "K",
        subok: bool = False,
        ndmin: int = 0,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array with the values of `object`, as `numpy.array` does; see `empty`.

        With ``copy=None`` an array of this pool that fits already is returned as it is; with
        ``copy=False`` it is a ValueError if there is none.
        """
        # A length, a unit or a shape may follow from the values, gathered in memory for that.
        gathered = not isinstance(object, np.ndarray) or _follows_values(dtype)
        source = np.asarray(object, dtype) if gathered else object
        kind = source.dtype if gathered or dtype is None else np.dtype(dtype)
        laid_out = _order(order, "KACF")
        fits = source.dtype == kind and _is_in(source, laid_out)
        if not copy and fits and self._has(object, private):
            return _at_least(object, ndmin)
        if copy is False:
            raise ValueError(
                "copy=False, but the values are not in this pool with that dtype, order and sharing"
            )
        made = self._empty_in_order(source.shape, kind, _layout(source, laid_out), name, private)
        np.copyto(made, source, casting="unsafe")
        return self._named(_at_least(made, ndmin), name)

    def asarray(
        self,
        a: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["K", "A", "C", "F"] | None = None,
        *,
        copy: bool | None = None,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return `a` if it is this pool's and fits, else a new array of its values."""
        laid_out = _order(order, "KACF")
        return self.array(a, dtype, copy=copy, order=laid_out, name=name, private=private)

    def empty_like(
        self,
        prototype: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["K", "A", "C", "F"] = "K",
        subok: bool = True,
        shape: Any = None,
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of zeros, shaped as `prototype`; see `empty`."""
        source = np.asanyarray(prototype)
        kind = source.dtype if dtype is None else np.dtype(dtype)
        dimensions = source.shape if shape is None else _dimensions(shape)
        laid_out = _order(order, "KACF")
        if len(dimensions) != source.ndim:
            fortran = laid_out == "F" or (laid_out == "A" and source.flags.fnc)
            letter: Literal["C", "F"] = "F" if fortran else "C"
            return self.empty(dimensions, kind, letter, name=name, private=private)
        return self._empty_in_order(dimensions, kind, _layout(source, laid_out), name, private)

    def zeros_like(
        self,
        a: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["K", "A", "C", "F"] = "K",
        subok: bool = True,
        shape: Any = None,
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of zeros, shaped as `a`; see `empty`."""
        return self.empty_like(a, dtype, order, subok, shape, name=name, private=private)

    def ones_like(
        self,
        a: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["K", "A", "C", "F"] = "K",
        subok: bool = True,
        shape: Any = None,
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array of ones, shaped as `a`; see `empty`."""
        return self.full_like(a, 1, dtype, order, subok, shape, name=name, private=private)

    def full_like(
        self,
        a: Any,
        fill_value: Any,
        dtype: npt.DTypeLike | None = None,
        order: Literal["K", "A", "C", "F"] = "K",
        subok: bool = True,
        shape: Any = None,
        *,
        name: str | None = None,
        private: bool = False,
    ) -> PagedArray:
        """Return a new array full of `fill_value`, shaped as `a`; see `empty`."""
        made = self.empty_like(a, dtype, order, subok, shape, name=name, private=private)
        np.copyto(made, fill_value, casting="unsafe")
        return made

    def fromfile(
        self,
        file: Any,
        dtype: npt.DTypeLike = float,
        count: int = -1,
        offset: int = 0,
        *,
        name: str | None = None,
        private: bool = False,
        progress: Progress | None = None,
    ) -> PagedArray:
        """Return a new one-dimensional array with the binary contents of a file.

        Parameters
        ----------
        file : path or file object
            A file object must have a descriptor; its position moves past what was read.
        dtype : dtype
            Of the items.
        count : int
            Items to read; -1 for all there are.
        offset : int
            Bytes to skip from the beginning, or from the file object's position.
        name, private
            See `empty`.
        progress : callable, optional
            Called after each piece with the bytes that were read and all there are to read.

        Raises
        ------
        EOFError
            If there are fewer than `count` items.
        ValueError
            If `offset` or `count` is negative, or `file` is no regular file and `count` is -1.

        Notes
        -----
        The file is read straight into pinned pieces of the array, so that it works where the
        kernel may not fault pages in (user-mode-only userfaultfd), and no other copy is made.
        """
        if isinstance(file, (str, bytes, os.PathLike)):
            with open(file, "rb", buffering=0) as raw:
                more: Any = {"name": name, "private": private, "progress": progress}
                return self.fromfile(raw, dtype, count, offset, **more)
        kind = np.dtype(dtype)
        if kind.itemsize == 0:
            raise ValueError(f"items of dtype {kind} have no bytes")
        if offset < 0 or count < -1:
            raise ValueError(f"offset {offset} and count {count} must not be negative")
        position = file.tell() + offset
        left = max(0, os.fstat(file.fileno()).st_size - position)
        items = left // kind.itemsize if count < 0 else count
        if items * kind.itemsize > left:
            raise EOFError(
                f"{items} items of {kind.itemsize} bytes were asked for, but {left} bytes are left"
            )
        made = self.empty(items, kind, name=name, private=private)
        file.seek(position)
        self._fill(made.reshape(-1).view(np.uint8), file, progress)
        return made

    def load(
        self,
        file: Any,
        member: str | None = None,
        *,
        name: str | None = None,
        private: bool = False,
        progress: Progress | None = None,
    ) -> PagedArray:
        """Return a new array with what `numpy.save` or `numpy.savez` has put into a file.

        Parameters
        ----------
        file : path or file object
            A .npy file or an .npz archive; a file object's position moves past the array.
        member : str, optional
            The array's name in an archive.
        name, private
            See `empty`.
        progress : callable, optional
            Called after each piece with the bytes that were read and all there are to read.

        Raises
        ------
        ValueError
            If the file is no .npy file or holds less than its header says, if its array has Python
            objects, and if a member is named where there is none or none where there are.
        KeyError
            If the archive has no such member.
        zipfile.BadZipFile
            If an archive is damaged.

        Notes
        -----
        The array is never in memory as a whole: a file is read straight into pinned pieces of
        it, a member of an archive through a small buffer. See `open_npy` for reading on demand.
        """
        with opened(file, member) as stream:
            header = read_header(stream)
            check_room(stream, header)
            order: Literal["C", "F"] = "F" if header.fortran else "C"
            made = self.empty(header.shape, header.dtype, order, name=name, private=private)
            if header.size_bytes:
                target = (made.T if header.fortran else made).reshape(-1).view(np.uint8)
                self._fill(target, stream, progress)
            return made

    def open_npy(
        self,
        path: str | os.PathLike[str],
        mode: Literal["r", "c"] = "r",
        *,
        name: str | None = None,
    ) -> PagedArray:
        """Return an array whose pages are read from a .npy file when they are touched.

        Parameters
        ----------
        path : path
            A .npy file, which is never written to.
        mode : str
            "r": the array cannot be written to, and takes no swap. "c": what is written goes to
            swap, and is seen by all processes that share the array.
        name : str, optional
            For messages, which show its beginning.

        Raises
        ------
        ValueError
            If the file is no .npy file or holds less than its header says, or there is no such
            mode.
        SwapFullError
            With "c", if frames and swap cannot hold all of it beside the other arrays.
        PoolClosedError
            After `close`.

        Notes
        -----
        The file must stay as it is while the array lives. One that is changed or cut meanwhile is
        an error, never wrong bytes or zeros: a page that is read from it from then on is a line on
        stderr and SIGBUS in the process that touched it, and an OSError in what pins it. A file
        that takes its name does not matter. Whether it changed is seen by its size and time.
        """
        if mode not in ("r", "c"):
            raise ValueError(f"mode must be 'r' or 'c', not {mode!r}")
        self._check_new(name)
        with open(path, "rb") as file:
            # Before the header is read, so that no change goes unseen.
            stamp = native.stamp_of(file.fileno())
            header = read_header(file)
            check_room(file, header)
            backing = Backing(file.fileno(), mode == "r", file.tell(), stamp)
            if header.size_bytes:
                order: Literal["C", "F"] = "F" if header.fortran else "C"
                row = row_bytes(header.shape, header.dtype.itemsize, order, self.page_size)
                region = self._new_region(header.size_bytes, name, backing=backing, row_bytes=row)
                return self._named(paged(region, header.shape, header.dtype, order), name)
        made = self.empty(header.shape, header.dtype, name=name)
        made.flags.writeable = mode == "c"
        return made

    def _fill(
        self, target: npt.NDArray[np.uint8], stream: IO[bytes], progress: Progress | None
    ) -> None:
        """Read bytes from a stream: straight into the array where they are simply a file's."""
        if not is_plain(stream):
            copy_into(target, stream, progress)
            return
        position = stream.tell()
        self._read_into(stream.fileno(), position, target, progress)
        stream.seek(position + target.size)

    def _read_into(
        self, fd: int, position: int, target: npt.NDArray[np.uint8], progress: Progress | None
    ) -> None:
        piece_bytes = max(self.page_size, min(PIN_PIECE_BYTES, self.memory // 4))
        done = 0
        while done < target.size:
            piece = target[done : done + piece_bytes]
            with self.pin(piece, writable=True):
                n = os.preadv(fd, [piece.data], position + done)
            if n == 0:
                raise EOFError(f"the file ended {target.size - done} bytes early while it was read")
            done += n
            if progress is not None:
                progress(done, target.size)

    def release(self, a: npt.NDArray[Any]) -> None:
        """End an array for every process now.

        Later touches of it, in any process, are one line on stderr and SIGBUS.

        Raises
        ------
        ValueError
            If the memory of `a` is not this pool's, or is private: such an array is this
            process's own, and ends with its last name.
        """
        self._call("release", address=self._region_of(a)[0])

    def snapshot(self, a: npt.NDArray[Any]) -> PagedArray:
        """Return a clone of a private array; see `PagedArray.snapshot`."""
        start, _ = self._region_of(a)
        if start not in self._attachment.private:
            raise TypeError(
                "a shared array has no snapshots, since every process sees every write to it: "
                "make it with private=True, or copy it"
            )
        return paged_like(self._attachment.snapshot(start), a, start)

    def drop_transit(self, older_than_s: float = 0.0) -> int:
        """Drop the references of pickles that nobody has loaded for so many seconds.

        A pickle of an array keeps it alive until it is loaded once, or the pool is closed: this
        is for those that were lost. `Stats.in_transit_bytes` tells how much they keep.

        Returns
        -------
        int
            How many were dropped. Loading one of them is a `GoneError` once nothing else has the
            array.
        """
        age_s = float(older_than_s)
        if not 0 <= age_s < 1e9:
            raise ValueError(f"older_than_s must be from 0 to 1e9 seconds, not {older_than_s!r}")
        return int(self._call("drop_transit", older_than_ns=int(age_s * 1e9))["dropped"])

    # Pages.

    def residency(self, a: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Tell which pages of a view are resident.

        Returns
        -------
        ndarray of bool, shape (pages,)
            One for each page that the view's bytes overlap, in address order.

        Raises
        ------
        ValueError
            If the memory of `a` is not this pool's.
        """
        start, pages = self._pages_of(a)
        if not len(pages):
            return np.zeros(0, np.bool_)
        out = np.zeros(len(pages), np.uint8)
        done = 0
        for first, count in runs(pages, len(pages)):
            for _, n, page in self._attachment.page_runs(start, first, count):
                self._control().residency(page, n, out[done : done + n])
                done += n
        return out.view(np.bool_)

    def advise(self, a: npt.NDArray[Any], advice: Advice) -> None:
        """Say how a view's pages will be used.

        Parameters
        ----------
        a : ndarray
            Any view of an array of this pool.
        advice : str
            "willneed": read it ahead, as far as frames are free. "dontneed": evict it first, when
            memory is needed; no byte changes. "pageout": evict it now; what is pinned or being
            written to stays. "sequential", "random", "normal": how faults of the whole array feed
            readahead from now on, in this process and in those it forks later.

        Raises
        ------
        ValueError
            If the memory of `a` is not this pool's, or there is no such advice.
        """
        if advice not in _ADVICE:
            raise ValueError(f"advice must be one of {', '.join(_ADVICE)}, not {advice!r}")
        start, ranges = self._ranges_of(a)
        if not ranges:
            return
        if advice == "pageout":
            self._call("pageout", address=start, ranges=ranges)
        else:
            self._call("advise", address=start, ranges=ranges, advice=advice)

    @contextmanager
    def pin(self, a: npt.NDArray[Any], writable: bool | None = None) -> Iterator[None]:
        """Keep a view's pages resident, and mapped in this process, inside the ``with`` block.

        Parameters
        ----------
        a : ndarray
            Any view of an array of this pool.
        writable : bool, optional
            Whether the block writes to them, or has the kernel write to them; by default whether
            `a` is writeable.

        Raises
        ------
        MemoryError
            If so many pages cannot be pinned beside those that are.
        ValueError
            If the memory of `a` is not this pool's.
        """
        start, ranges = self._ranges_of(a)
        write = bool(a.flags.writeable) if writable is None else bool(writable)
        if not ranges:
            yield
            return
        number = next(_pin_numbers)
        granted = False
        try:
            self._call("pin", address=start, ranges=ranges, write=write, pin=number)
            granted = True
            yield
        except (MemoryError, ValueError, OSError, Error):
            if granted:
                self._unpin(number)
            granted = False
            raise
        except BaseException:
            # Interrupted while it waited, the pin may still be granted: this takes it back.
            self._unpin(number)
            granted = False
            raise
        finally:
            if granted:
                self._unpin(number)

    def _unpin(self, number: int) -> None:
        self._call("unpin", pin=number)

    # Ending.

    def close(self) -> None:
        """End the making of arrays; those that live, in any process, stay right until their end.

        In a forked child it ends the child's own use. Closing twice does nothing.
        """
        if self._closed_in != os.getpid():
            self._closed_in = os.getpid()
            self._attachment.close()

    # Helpers.

    def _control(self) -> native.Control:
        control = self._attachment.control
        if control is None or self._attachment.is_left():
            raise PoolClosedError(f"pool {self.name!r} is closed in this process")
        return control

    def _call(self, op: str, **fields: Any) -> dict[str, Any]:
        return self._attachment.call(op, **fields)

    def _has(self, a: object, private: bool) -> bool:
        if not isinstance(a, PagedArray):
            return False
        found = native.find(np.asarray(a).__array_interface__["data"][0])
        if found is None or found[2] != self._attachment.token:
            return False
        return (found[0] in self._attachment.private) == private

    def _region_of(self, a: npt.NDArray[Any]) -> tuple[int, int]:
        """Address and bytes of the region that a view lies in."""
        if not isinstance(a, np.ndarray):
            raise TypeError(f"an array is needed, not {type(a).__name__}")
        found = native.find(a.__array_interface__["data"][0])
        if found is None and a.size == 0:
            # An empty view may point behind the region; the array that it is a view of does not.
            base = a.base
            while isinstance(base, np.ndarray) and found is None:
                found = native.find(base.__array_interface__["data"][0])
                base = base.base
        if found is None:
            raise ValueError("this memory is no pool's: it was not made by a pyswap.Pool")
        if found[2] != self._attachment.token:
            raise ValueError(f"this memory is another pool's, not {self.name!r}'s")
        return found[0], found[1]

    def _pages_of(self, a: npt.NDArray[Any]) -> tuple[int, npt.NDArray[np.int64]]:
        """The address of a view's region, and the indices of the pages that the view overlaps."""
        start, size = self._region_of(a)
        pages = overlapped_pages(a, start, self.page_size)
        if len(pages) and not 0 <= pages[0] <= pages[-1] < size // self.page_size:
            raise ValueError("this view reaches beyond the array whose memory it is")
        return start, pages

    def _ranges_of(self, a: npt.NDArray[Any]) -> tuple[int, list[tuple[int, int]]]:
        start, pages = self._pages_of(a)
        return start, runs(pages, config.REQUEST_RANGES)

    def _empty_in_order(
        self,
        shape: tuple[int, ...],
        kind: np.dtype[Any],
        axes: tuple[int, ...] | None,
        name: str | None,
        private: bool,
    ) -> PagedArray:
        """An array whose axes lie in memory in the given order, slowest first; None is C order."""
        if axes is None:
            return self.empty(shape, kind, name=name, private=private)
        made = self.empty([shape[i] for i in axes], kind, name=name, private=private)
        if len(shape) < 2:
            return made
        # The axes of a dtype that is an array itself come last, and stay there.
        turned = made.transpose([*np.argsort(axes), *range(len(shape), made.ndim)])
        return self._named(turned, name)


def _dimensions(shape: Any) -> tuple[int, ...]:
    """A shape as NumPy takes it: an int or a sequence of them."""
    dimensions: tuple[int, ...]
    try:
        dimensions = (operator.index(shape),)
    except TypeError:
        dimensions = tuple(operator.index(n) for n in shape)
    if any(n < 0 for n in dimensions):
        raise ValueError("negative dimensions are not allowed")
    return dimensions


def _order(order: object, allowed: str) -> Any:
    """NumPy's letter for an order: of any case, and None for the first that is allowed."""
    if order is None:
        return allowed[0]
    if not isinstance(order, str):
        raise TypeError(f"order must be a str, not {type(order).__name__}")
    if order.upper() not in [*allowed]:
        raise ValueError(f"order must be one of {', '.join(allowed)}, not {order!r}")
    return order.upper()


def _with_length(kind: np.dtype[Any]) -> np.dtype[Any]:
    """A dtype of text without a length as one of a character, which NumPy makes of it."""
    return np.empty(0, kind).dtype if kind.kind in "SU" and kind.itemsize == 0 else kind


def _follows_values(dtype: npt.DTypeLike | None) -> bool:
    """Whether what NumPy makes of a dtype follows from the values: a length, a unit, more axes."""
    if dtype is None:
        return False
    kind: Any = np.dtype(dtype)
    if kind.kind in "mM":
        return np.datetime_data(kind)[0] == "generic"
    return bool(kind.subdtype is not None or kind.itemsize == 0)


def _is_in(a: npt.NDArray[Any], order: str) -> bool:
    """Whether an array is in a memory order already; what keeps an order (K, A) takes any."""
    if order == "C":
        return a.flags.c_contiguous
    return order != "F" or a.flags.f_contiguous


def _layout(source: npt.NDArray[Any], order: str) -> tuple[int, ...] | None:
    """The axes as NumPy's `order` wants them in memory, slowest first; None is C order."""
    flags = source.flags
    if order == "F" or (order in "AK" and flags.f_contiguous and not flags.c_contiguous):
        return tuple(reversed(range(source.ndim)))
    if order in "CA" or flags.c_contiguous:
        return None
    return tuple(sorted(range(source.ndim), key=lambda i: -abs(source.strides[i])))


def _at_least(a: PagedArray, ndmin: int) -> PagedArray:
    return a.reshape((1,) * (ndmin - a.ndim) + a.shape) if a.ndim < ndmin else a


def pool_at(attachment: Attachment) -> Pool:
    """Return a pool that this process has a part in."""
    # Arrays outlive the pool object that made them.
    pool = _pools.get(attachment.token)
    if pool is None:
        pool = Pool.__new__(Pool)
        pool._begin(attachment)
    return pool


def layout_of(a: npt.NDArray[Any], start: int) -> tuple[Any, ...]:
    """Describe how a view lies in the region that begins at `start`."""
    offset = a.__array_interface__["data"][0] - start
    return offset, a.shape, a.strides, a.dtype, bool(a.flags.writeable)


def _pool_there(address: tuple[Any, ...]) -> Pool:
    """Make the pool that a pickle refers to."""
    return pool_at(attachment_for(Address(*address)))


def pool_of(a: npt.NDArray[Any]) -> Pool:
    """Return the pool whose memory an array is.

    Raises
    ------
    ValueError
        If it is no pool's.
    """
    found = native.find(a.__array_interface__["data"][0])
    attachment = attachment_of(found[2]) if found else None
    if attachment is None:
        raise ValueError("this memory is no pool's: it was not made by a pyswap.Pool")
    return pool_at(attachment)


def engine_mode() -> str:
    """Tell how faults are delivered here: "userfaultfd" or "userfaultfd, user mode only"."""
    fd, user_only = native.open_uffd()
    os.close(fd)
    return "userfaultfd, user mode only" if user_only else "userfaultfd"

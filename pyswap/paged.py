"""`PagedArray`: an ndarray whose memory is a pool's, and only where it is.

The rule: what shares the pool's memory (a slice, a transpose, a reshaped view) is a
`PagedArray`; what NumPy puts in fresh memory (a sum, a copy, ``a[a > 0]``) is a plain ndarray
or a scalar. Five mechanisms keep it:

1. `PagedArray.__array_finalize__` sees every new object of the class. One outside the pool's
   memory stops being a `PagedArray` there and then; nothing gets past it.
2. `PagedArray.__array_wrap__` leaves the results of ufuncs as they are: plain.
3. `PagedArray.__array_function__` runs NumPy's functions on plain views of the same memory and
   gives the class back to results that are views.
4. The methods named in `_METHODS` do the same.
5. `PagedArray.__getitem__` makes the copies of fancy indexing plain.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, SupportsIndex, cast

import numpy as np

from ._native import native

if TYPE_CHECKING:
    from .pool import Pool

__all__ = ["PIN_PIECE_BYTES", "PagedArray", "paged", "paged_like"]

PIN_PIECE_BYTES = 4 << 20
"""Most bytes of an array that one step of `PagedArray.tofile` pins, or copies."""

_Array = np.ndarray[Any, np.dtype[Any]]

# The methods of ndarray whose result NumPy makes of our class even in fresh memory, but for
# those that ask `__array_wrap__`. `ravel`, `reshape` and `astype` answer with a view or a copy.
# fmt: off
_METHODS = (
    "__copy__", "__deepcopy__", "argmax", "argmin", "argpartition", "argsort", "astype",
    "byteswap", "choose", "compress", "copy", "dot", "flatten", "ravel", "repeat", "reshape",
    "take",
)
# fmt: on

# `flat` belongs here because slices of a flat iterator are copies, of the class it iterates.
_ATTRIBUTES = ("flat", "imag")

# These look at the class they are given: `save` writes through `tofile`, `array_repr` names it.
_SEE_THE_CLASS = frozenset({np.save, np.array_repr})

_NUMPY_1 = int(np.__version__.partition(".")[0]) < 2
_getitem = np.ndarray.__getitem__
_view = np.ndarray.view


class _FileLike(Protocol):
    def fileno(self) -> int: ...
    def flush(self) -> object: ...
    def tell(self) -> int: ...
    def seek(self, position: int, /) -> object: ...


class _PlainCopy(_Array):
    """What NumPy made in a `PagedArray`'s likeness, outside the pool, where it asked nobody.

    ``np.array(a, subok=True)`` is the common case. An object cannot be turned into an exact
    ndarray, so it becomes this: an ndarray in all but name, whose results are plain.
    """

    __slots__ = ()

    def __array_wrap__(
        self, array: Any, context: Any = None, return_scalar: bool = _NUMPY_1
    ) -> Any:
        return _wrap(array, return_scalar)

    def __array_prepare__(self, array: Any, context: Any = None) -> Any:
        return array

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return np.asarray(self).__reduce_ex__(protocol)


class PagedArray(_Array):
    """An ndarray in a pool's memory: made by `pyswap.Pool`, never by calling the class.

    It is used as any ndarray is. Views of it are `PagedArray` too; whatever lives in memory of
    its own (results of ufuncs and reductions, ``copy``, ``astype``, fancy indexing) is a plain
    ndarray or a scalar, and ``np.asarray(a)`` is a plain view without a copy. A pickle of it is a
    reference: what loads it, in any process of this user, is the same memory. (A private array, and
    ``np.asarray(a)``, pickle by value.) It deep-copies by value, as a plain ndarray.

    Raises
    ------
    TypeError
        When the class is called, and when memory that is no pool's is viewed as one.
    """

    __slots__ = ()

    def __new__(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raise TypeError: the pool makes its arrays."""
        raise TypeError(
            f"{cls.__name__} cannot be made directly: arrays come from a pool (pool.zeros, "
            "pool.empty, pool.array)"
        )

    def __array_finalize__(self, template: _Array | None) -> None:
        if type(self.base) is PagedArray or _is_paged(self):
            return
        if isinstance(template, PagedArray):
            self.__class__ = _PlainCopy  # type: ignore[assignment]
            return
        # An array of no bytes has no address to be known by; its maker gave it a buffer.
        if template is None and self.nbytes == 0 and not self.flags.owndata:
            return
        raise TypeError(f"a {type(self).__name__} is memory of a pool, and this memory is not")

    def __array_wrap__(
        self, array: Any, context: Any = None, return_scalar: bool = _NUMPY_1
    ) -> Any:
        return _wrap(array, return_scalar)

    def __array_prepare__(self, array: Any, context: Any = None) -> Any:
        # Asked by NumPy 1 only, before a ufunc writes: its default makes the output of our class.
        return array

    def __array_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Iterable[Any],
        kwargs: Any,
    ) -> Any:
        if any(_dispatches_itself(kind) for kind in types):
            return NotImplemented
        # NumPy's own body of `func`; the makers that came here by `like=` have none apart.
        implementation = getattr(func, "_implementation", func)
        if func in _SEE_THE_CLASS:
            return implementation(*args, **kwargs)
        lent: dict[int, tuple[_Array, PagedArray]] = {}
        plain_args = tuple([_lend(value, lent) for value in args])
        plain_kwargs = {name: _lend(value, lent) for name, value in kwargs.items()}
        result = implementation(*plain_args, **plain_kwargs)
        return result if kwargs.get("subok") is False else _take_back(result, lent)

    def __getitem__(self, index: Any) -> Any:
        found = _getitem(self, index)
        if type(found) is _PlainCopy:
            return _as_plain(found)
        return found

    def __reduce__(self) -> Any:
        return self.__reduce_ex__(2)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        from .reference import reduce_array

        by_value = _view(self, np.ndarray)
        return reduce_array(self) or by_value.__reduce_ex__(protocol)

    @property
    def name(self) -> str | None:
        """The name it was made with, as in ``pyswap.attach("pool/name")``; None without one."""
        return _pool_of(self).name_of(self)

    def snapshot(self) -> PagedArray:
        """Return a clone of a private array, or of a view of one, as it is now.

        No data is copied: the pages are shared, in memory and in swap, until one side writes to
        one. What is pinned now is copied at once.

        Returns
        -------
        PagedArray
            Of the same shape, dtype, strides and writeable flag, in memory of its own.

        Raises
        ------
        TypeError
            If the array is shared: every process sees every write to it.
        MemoryError
            If this process has too many snapshots of the array.
        """
        return _pool_of(self).snapshot(self)

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:  # noqa: A002 (NumPy's name)
        """Write the array in C order, as `numpy.ndarray.tofile` does.

        Binary output goes out in pieces of at most `PIN_PIECE_BYTES` bytes, each pinned while
        the kernel reads it, so that this works where the kernel cannot bring a page in by
        itself; an array that is not C-contiguous goes through a buffer of that size.

        Parameters
        ----------
        fid : file object with a descriptor, str, bytes or os.PathLike
            A file object is flushed, written from its position on, and left at the end of what
            was written; a path is created or truncated.
        sep : str
            Empty for binary output; else the text between items.
        format : str
            Format of each item of text output.

        Raises
        ------
        OSError
            When the file cannot be opened or written; what was written before stays.
        """
        if sep:
            # Text is made item by item in this process, so the kernel reads none of our pages.
            _view(self, np.ndarray).tofile(fid, sep, format)
        elif hasattr(fid, "fileno"):
            with _descriptor_of(fid) as descriptor:
                _write_array(self, descriptor)
        else:
            with open(os.fspath(fid), "wb", buffering=0) as file:
                _write_array(self, file.fileno())


def paged(
    region: Any, shape: tuple[int, ...], dtype: np.dtype[Any], order: Literal["C", "F"]
) -> PagedArray:
    """Make an array over a region's buffer, which it keeps alive."""
    make = cast(Callable[..., PagedArray], np.ndarray.__new__)
    return make(PagedArray, shape, dtype, buffer=region, order=order)


def paged_like(region: Any, a: _Array, start: int) -> PagedArray:
    """Make an array over a region's buffer that lies in it as `a` lies behind `start`."""
    make = cast(Callable[..., PagedArray], np.ndarray.__new__)
    offset = a.__array_interface__["data"][0] - start
    made = make(PagedArray, a.shape, a.dtype, buffer=region, offset=offset, strides=a.strides)
    made.flags.writeable = a.flags.writeable
    return made


def _is_paged(a: _Array) -> bool:
    """Whether the memory of `a` is a live region of one of this process's pools."""
    owner: _Array = a
    base: Any = a.base
    while base is not None:
        # A view of a PagedArray needs no look at its address, which for an empty view (`a[n:]`)
        # may be one past the region's end.
        if isinstance(base, PagedArray):
            return True
        if not isinstance(base, np.ndarray):
            break
        owner, base = base, base.base
    if owner.flags.owndata:
        return False
    return bool(native.owns(a.__array_interface__["data"][0]))


def _pool_of(a: PagedArray) -> Pool:
    from .pool import pool_of

    return pool_of(a)


def _wrap(array: Any, return_scalar: bool) -> Any:
    """Hand over a ufunc's result, or the scalar in it where NumPy wants one, or a view."""
    # A few methods (`squeeze`) make a plain view and ask here for its class.
    settled = _settle(array)
    if return_scalar and type(settled) is np.ndarray and settled.ndim == 0:
        return settled[()]
    return settled


def _as_plain(copied: _PlainCopy) -> _Array:
    """Return the exact ndarray behind what fancy indexing made."""
    base = copied.base
    # NumPy makes the copy as a plain array first; handing that over keeps its `owndata`.
    if type(base) is np.ndarray and base.shape == copied.shape and base.strides == copied.strides:
        return base
    return copied.view(np.ndarray)


def _settle(result: Any) -> Any:
    """Return `result`, as a `PagedArray` if it is a plain view of a pool's memory."""
    if type(result) is np.ndarray and result.base is not None and _is_paged(result):
        return _view(result, PagedArray)
    return result


def _dispatches_itself(kind: type) -> bool:
    """Whether `kind` answers NumPy's functions in its own way and must be asked first."""
    if issubclass(kind, PagedArray):
        return False
    return getattr(kind, "__array_function__", None) is not np.ndarray.__array_function__


def _lend(value: Any, lent: dict[int, tuple[_Array, PagedArray]]) -> Any:
    """Return `value` with a plain view, noted in `lent`, for each `PagedArray` in it."""
    if isinstance(value, PagedArray):
        plain = _view(value, np.ndarray)
        lent[id(plain)] = (plain, value)
        return plain
    if type(value) is list:
        return [_lend(item, lent) for item in value]
    if type(value) is tuple:
        return tuple([_lend(item, lent) for item in value])
    return value


def _take_back(result: Any, lent: dict[int, tuple[_Array, PagedArray]]) -> Any:
    """Return `result` with the class given back to what was lent and to views of it."""
    if isinstance(result, np.ndarray):
        pair = lent.get(id(result))
        return _settle(result) if pair is None else pair[1]
    if type(result) is list:
        return [_take_back(item, lent) for item in result]
    if isinstance(result, tuple):
        items = [_take_back(item, lent) for item in result]
        # A named tuple is made of its fields one by one; a plain one of a sequence.
        return type(result)(*items) if hasattr(result, "_fields") else tuple(items)
    return result


def _on_plain(name: str) -> Callable[..., Any]:
    """Make ndarray's method `name` run on a plain view; a result that is a view is ours."""
    method = getattr(np.ndarray, name)

    @functools.wraps(method)
    def run(self: PagedArray, *args: Any, **kwargs: Any) -> Any:
        plain = _view(self, np.ndarray)
        result = method(plain, *args, **kwargs)
        return self if result is plain else _settle(result)

    return run


def _attribute_on_plain(name: str) -> property:
    """Make ndarray's attribute `name` read from a plain view."""
    attribute = getattr(np.ndarray, name)

    def read(self: PagedArray) -> Any:
        return _settle(attribute.__get__(_view(self, np.ndarray)))

    return property(read, attribute.__set__, doc=attribute.__doc__)


for _name in _METHODS:
    setattr(PagedArray, _name, _on_plain(_name))
for _name in _ATTRIBUTES:
    setattr(PagedArray, _name, _attribute_on_plain(_name))


@contextmanager
def _descriptor_of(file: _FileLike) -> Iterator[int]:
    """Give the descriptor of `file` at the file's position; the file follows at the end."""
    file.flush()
    descriptor = file.fileno()
    try:
        position = file.tell()
    except OSError:
        # A pipe or a socket has no position.
        yield descriptor
        return
    os.lseek(descriptor, position, os.SEEK_SET)
    try:
        yield descriptor
    finally:
        file.seek(os.lseek(descriptor, 0, os.SEEK_CUR))


def _write_array(a: PagedArray, descriptor: int) -> None:
    """Write the items of `a` in C order, pinned or copied a piece at a time."""
    if a.nbytes == 0:
        return
    pool = _pool_of(a)
    piece_bytes = max(min(PIN_PIECE_BYTES, pool.memory // 4), pool.page_size)
    if not a.flags.c_contiguous:
        for copied in _copies_in_c_order(a, piece_bytes):
            _write_all(descriptor, copied)
        return
    flat = a.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, piece_bytes):
        piece = flat[start : start + piece_bytes]
        with ExitStack() as pinned:
            try:
                pinned.enter_context(pool.pin(piece, writable=False))
            except MemoryError:
                # Others hold too many pins. A private copy is as safe from eviction.
                piece = piece.copy()
            _write_all(descriptor, piece)


def _copies_in_c_order(a: _Array, piece_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of `a` in C order, at most `piece_bytes` but at least an item a time."""
    chunks = np.nditer(
        np.asarray(a),
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=["readonly"],
        order="C",
        buffersize=max(piece_bytes // a.itemsize, 1),
    )
    with chunks:
        chunk: Any
        for chunk in chunks:
            yield chunk.tobytes()


def _write_all(descriptor: int, piece: Any) -> None:
    """Write all bytes of `piece`, however few of them one call takes."""
    left = memoryview(piece)
    while left:
        written = os.write(descriptor, left)
        if written == 0:
            raise OSError(errno.EIO, f"the file takes no more: {len(left)} bytes not written")
        left = left[written:]

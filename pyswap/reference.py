"""Arrays by reference: what a pickle of a `PagedArray` holds, and what `attach` finds by a name.

A pickle has the pool's address and secret, the object's number and generation, and how the view
lies in it; no data. Whoever may read the pickle and is of the same user may attach with it. In
the swapper it counts as a reference to the object, until somebody loads it.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from . import config, registry
from ._native import native
from .address import Address
from .errors import GoneError
from .joining import attachment_for
from .paged import PagedArray
from .pool import LABEL_LENGTH, Pool, layout_of, pool_at
from .sizes import format_size
from .worker import attachment_of

__all__ = ["attach", "load", "reduce_array"]


def attach(name: str) -> Pool | PagedArray:
    """Attach to a pool of this user, or to an array in one, by name.

    Parameters
    ----------
    name : str
        A pool's name, or a pool's and an array's with a slash between: ``"pool/array"``.

    Returns
    -------
    Pool or PagedArray
        The pool, whose `close` here ends this process's use only; or the array as its maker made
        it, in memory that is the same in all processes.

    Raises
    ------
    PoolClosedError
        If there is no such pool, or it is closed.
    GoneError
        If the pool has no array of that name.
    Error
        If several are called so, or the pool cannot be reached from here.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    pool_name, slash, label = name.partition("/")
    attachment = attachment_for(registry.find_pool(pool_name))
    if not slash:
        return pool_at(attachment)
    rows = attachment.call("named", label=label[:LABEL_LENGTH])["arrays"]
    if not rows or not label:
        raise GoneError(f"pool {pool_name!r} has no array {label!r}, or it is gone")
    if len(rows) > 1:
        raise ValueError(f"pool {pool_name!r} has several arrays {label!r}")
    number, generation, mapped, layout = rows[0]
    region = attachment.object_region(number, generation, mapped)
    return _view(region, *pickle.loads(base64.b64decode(layout)))


def load(
    address: tuple[Any, ...], number: int, generation: int, mapped: int, *layout: Any
) -> PagedArray:
    """Make the array that a pickle refers to; see `attach` for what it raises."""
    attachment = attachment_for(Address(*address))
    region = attachment.object_region(number, generation, mapped, loaded=True)
    return _view(region, *layout)


def reduce_array(a: PagedArray) -> tuple[Any, ...] | None:
    """Return what pickles an array by reference; None for what is pickled by value."""
    found = native.find(a.__array_interface__["data"][0]) if a.nbytes else None
    attachment = attachment_of(found[2]) if found else None
    if found is None or attachment is None:
        return None
    start = found[0]
    if start in attachment.private:
        if a.nbytes > config.PICKLE_BYTES:
            raise TypeError(
                f"a private array of {format_size(a.nbytes)} is each process's own and would be "
                f"pickled by value, which is done up to {format_size(config.PICKLE_BYTES)}: use "
                "snapshot() and fork, or a shared array, which is pickled by reference"
            )
        return None
    number, generation, _, mapped = attachment.regions[start]
    attachment.call("send", address=start)
    return load, (tuple(attachment.address), number, generation, mapped, *layout_of(a, start))


def _view(
    region: native.Region,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
    writeable: bool,
) -> PagedArray:
    make = cast(Callable[..., PagedArray], np.ndarray.__new__)
    made = make(PagedArray, shape, dtype, buffer=region, offset=offset, strides=strides)
    made.flags.writeable = writeable
    return made

"""The default pool: what `pyswap.zeros` and the other constructors of the module make arrays in.

It is made on first use, by what `configure` was told or the environment says. Its address is put
into the environment, and to what `multiprocessing` tells the processes that it starts, which may
come from a server that ran before: children, however they are started, use their ancestor's.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import process
from typing import Any, Concatenate, ParamSpec, TypeVar

from .address import Address
from .errors import PoolClosedError
from .joining import attachment_for
from .pool import Pool, pool_at
from .settings import resolve

__all__ = [
    "array",
    "asarray",
    "configure",
    "default_pool",
    "empty",
    "empty_like",
    "fromfile",
    "full",
    "full_like",
    "load",
    "ones",
    "ones_like",
    "open_npy",
    "zeros",
    "zeros_like",
]

_log = logging.getLogger("pyswap")

POOL, MEMORY, SWAP = "PYSWAP_POOL", "PYSWAP_MEMORY", "PYSWAP_SWAP"
RUN = "PYSWAP_RUN"
"""Set where `python -m pyswap run` has given the program its budget; see `run`."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_lock = threading.RLock()
_pool: Pool | None = None
_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def default_pool() -> Pool:
    """Return the default pool: an ancestor's, or else one that is made now.

    Its memory is ``$PYSWAP_MEMORY``, by default half of what the cgroup or the machine has free;
    its swap ``$PYSWAP_SWAP``, in ``$PYSWAP_DIR``; see `Pool`. What `configure` was given comes
    before all of these.

    Raises
    ------
    ValueError, OSError, Error
        As `Pool` does, and where an ancestor's pool cannot be reached from here.
    """
    global _pool
    with _lock:
        if _pool is None:
            _pool = _ancestors() or _made()
        return _pool


def configure(*args: Any, **kwargs: Any) -> None:
    """Say what the default pool is made with: the arguments of `Pool`.

    Of a program under ``python -m pyswap run`` that was said there: this does nothing.

    Raises
    ------
    RuntimeError
        If it is in use already, in this process or in an ancestor.
    TypeError, ValueError, OSError
        As `Pool` does; what was said before holds then.
    """
    global _arguments
    if os.environ.get(RUN):
        _log.info("pyswap: configure() does nothing under `run`, which has made the pool")
        return
    with _lock:
        if _pool is not None or _ancestors() is not None:
            raise RuntimeError(
                "the default pool is in use already: call pyswap.configure() before the first "
                "array is made, in the first process, or resize the pool"
            )
        given = inspect.signature(Pool).bind(*args, **kwargs)
        resolve(*given.args, **given.kwargs)
        _arguments = args, kwargs


def _made() -> Pool:
    if _arguments is None:
        pool = Pool(_memory(os.environ.get(MEMORY, "0.5")), os.environ.get(SWAP))
    else:
        args, kwargs = _arguments
        pool = Pool(*args, **kwargs)
    _tell_children(json.dumps(pool.address()))
    return pool


def _tell_children(address: str) -> None:
    # Only processes of this user can read a process's environment.
    os.environ[POOL] = address
    # Every Process object copies these from the process that makes it.
    _told_by_parent()[POOL] = address


def _told_by_parent() -> dict[str, Any]:
    """What multiprocessing hands down: the only way to a child of a server that ran before."""
    told: dict[str, Any] = process.current_process()._config  # type: ignore[attr-defined]
    return told


def _addresses() -> Iterator[str]:
    """An ancestor's pools, as it told of them: the latest first."""
    for given in (_told_by_parent().get(POOL), os.environ.get(POOL)):
        if given:
            yield given


def _memory(given: str) -> str | float:
    """A size, or a share such as 0.5."""
    try:
        share = float(given)
    except ValueError:
        return given
    return share if 0 < share <= 1 and not given.strip().isdigit() else given


def _ancestors() -> Pool | None:
    """Attach to the pool that an ancestor has told of."""
    for given in _addresses():
        try:
            address = Address(*json.loads(given))
        except (ValueError, TypeError):
            raise ValueError(f"{POOL} in the environment is no pool's address: unset it") from None
        try:
            pool = pool_at(attachment_for(address))
        except PoolClosedError as error:
            _log.info("pyswap: the pool of this process's ancestor has ended: %s", str(error))
            continue
        _tell_children(given)
        return pool
    return None


def _in_default_pool(method: Callable[Concatenate[Pool, _P], _R]) -> Callable[_P, _R]:
    """Make a function of one of `Pool`'s constructors."""

    @functools.wraps(method)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return method(default_pool(), *args, **kwargs)

    return make


empty = _in_default_pool(Pool.empty)
zeros = _in_default_pool(Pool.zeros)
ones = _in_default_pool(Pool.ones)
full = _in_default_pool(Pool.full)
array = _in_default_pool(Pool.array)
asarray = _in_default_pool(Pool.asarray)
empty_like = _in_default_pool(Pool.empty_like)
zeros_like = _in_default_pool(Pool.zeros_like)
ones_like = _in_default_pool(Pool.ones_like)
full_like = _in_default_pool(Pool.full_like)
fromfile = _in_default_pool(Pool.fromfile)
load = _in_default_pool(Pool.load)
open_npy = _in_default_pool(Pool.open_npy)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)

"""Swap, as a library: NumPy arrays larger than memory, shared by workers under one budget.

>>> import pyswap
>>> with pyswap.Pool("256 MiB", swap="4 GiB") as pool:
...     a = pool.zeros((20_000, 20_000))
...     a[0] = 1.0

What is named here is loaded when it is first used: the swapper imports this package without NumPy.
"""

from __future__ import annotations

import importlib
import sys
import sysconfig
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocator import numpy_memory as numpy_memory
    from .areas import SwapArea as SwapArea
    from .default import array as array
    from .default import asarray as asarray
    from .default import configure as configure
    from .default import default_pool as default_pool
    from .default import empty as empty
    from .default import empty_like as empty_like
    from .default import fromfile as fromfile
    from .default import full as full
    from .default import full_like as full_like
    from .default import load as load
    from .default import ones as ones
    from .default import ones_like as ones_like
    from .default import open_npy as open_npy
    from .default import zeros as zeros
    from .default import zeros_like as zeros_like
    from .errors import Error as Error
    from .errors import GoneError as GoneError
    from .errors import PoolClosedError as PoolClosedError
    from .errors import SwapFullError as SwapFullError
    from .errors import SwapIOError as SwapIOError
    from .paged import PagedArray as PagedArray
    from .pool import Pool as Pool
    from .pool import engine_mode as engine_mode
    from .reference import attach as attach
    from .shared_memory import ShareableList as ShareableList
    from .shared_memory import SharedMemory as SharedMemory
    from .stats import Stats as Stats

__version__ = "0.1.0"

_HOMES = {
    "PagedArray": "paged",
    "Error": "errors",
    "GoneError": "errors",
    "PoolClosedError": "errors",
    "SwapFullError": "errors",
    "SwapIOError": "errors",
    "Pool": "pool",
    "engine_mode": "pool",
    "attach": "reference",
    "ShareableList": "shared_memory",
    "SharedMemory": "shared_memory",
    "array": "default",
    "asarray": "default",
    "configure": "default",
    "default_pool": "default",
    "empty": "default",
    "empty_like": "default",
    "fromfile": "default",
    "full": "default",
    "full_like": "default",
    "load": "default",
    "ones": "default",
    "ones_like": "default",
    "open_npy": "default",
    "zeros": "default",
    "zeros_like": "default",
    "Stats": "stats",
    "SwapArea": "areas",
    "numpy_memory": "allocator",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 (names, each of which __getattr__ answers)

if sys.platform != "linux":
    raise ImportError("pyswap needs Linux: it is built on userfaultfd")
if sys.implementation.name != "cpython":
    raise ImportError("pyswap needs CPython: its core is a CPython extension")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    raise ImportError("pyswap is not tested on free-threaded builds of Python, and refuses them")


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'pyswap' has no attribute {name!r}")
    # It refuses sub-interpreters, and so before NumPy is loaded in one.
    importlib.import_module("pyswap._native")
    value = getattr(importlib.import_module(f"pyswap.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

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
    from .array import PagedArray as PagedArray
    from .errors import Error as Error
    from .errors import GoneError as GoneError
    from .errors import PoolClosedError as PoolClosedError
    from .errors import SwapFullError as SwapFullError
    from .errors import SwapIOError as SwapIOError
    from .pool import Pool as Pool
    from .pool import engine_mode as engine_mode
    from .stats import Stats as Stats

__version__ = "0.1.0"

_HOMES = {
    "PagedArray": "array",
    "Error": "errors",
    "GoneError": "errors",
    "PoolClosedError": "errors",
    "SwapFullError": "errors",
    "SwapIOError": "errors",
    "Pool": "pool",
    "engine_mode": "pool",
    "Stats": "stats",
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

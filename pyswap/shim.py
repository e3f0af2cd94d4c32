"""The shim (`_shim.c`): system calls on arrays' memory that work where the kernel may not fault."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path

from ._native import native

__all__ = ["begin", "end", "library"]

_loaded: list[ctypes.CDLL] = []


def library() -> Path:
    """Return the shared object, which LD_PRELOAD takes."""
    # A library, not a module: it is found as one, and not imported.
    found = importlib.util.find_spec("pyswap._shim")
    if found is None or found.origin is None:
        raise ImportError("pyswap._shim is not there: was pyswap built whole?")
    return Path(found.origin)


def begin() -> None:
    """Have I/O calls of all libraries loaded now work on arrays' memory, whoever this user is.

    Where the shim was preloaded it is every library, those loaded later too.
    """
    fd, user_only = native.open_uffd()
    os.close(fd)
    shim = ctypes.CDLL(str(library()))
    _loaded[:] = [shim]
    shim.pyswap_shim_begin(ctypes.c_void_p(native.overlaps_function()), ctypes.c_int(user_only))
    if not shim.pyswap_shim_is_preloaded():
        shim.pyswap_shim_hook()


def end() -> None:
    """Have I/O calls go straight on again."""
    for shim in _loaded:
        shim.pyswap_shim_begin(None, 0)

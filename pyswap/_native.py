"""The native module in use: the release build, or with PYSWAP_ENGINE=debug the debug build."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _fast as native
elif os.environ.get("PYSWAP_ENGINE") == "debug":
    from . import _fast_debug as native
else:
    from . import _fast as native

__all__ = ["native"]

"""How a swapper was started: its limits, its environment, and what else it has from its parent."""

from __future__ import annotations

import os
import resource
from typing import Any

__all__ = ["birth"]

RESOURCES = 16
PROCESSORS = 1024


def birth() -> dict[str, Any]:
    """Tell how this process was started, for `native.Swapper.set_birth`."""
    limits = [n & (1 << 64) - 1 for i in range(RESOURCES) for n in resource.getrlimit(i)]
    processors = [0] * (PROCESSORS // 64)
    for n in os.sched_getaffinity(0):
        if n < PROCESSORS:
            processors[n // 64] |= 1 << n % 64
    mask = os.umask(0o077)
    os.umask(mask)
    return {
        "limits": limits,
        "processors": processors,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "mask": mask,
        "environment": [name + b"=" + value for name, value in os.environb.items()],
    }

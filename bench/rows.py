"""The rows of the table: which workload, against whom, and what ratio is the target."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .kernels import KERNELS
from .limits import LIMITS
from .peers import PEERS
from .plan import Plan
from .workloads import WORKLOADS

__all__ = [
    "SUBJECTS",
    "Failures",
    "Measured",
    "Results",
    "Row",
    "Run",
    "Target",
    "peers_of",
    "rows",
]

Run = dict[str, Any]
Results = dict[str, dict[str, list[Run]]]
"""The runs, by workload and by peer."""
Failures = dict[str, dict[str, list[str]]]
"""Why runs failed, by workload and by peer."""

_KERNEL_SWAP = ("kernel-swap-3", "kernel-swap-5")

_FORKS = "100 forked children, each reads 1 %"
_WRITES = "100 forked children, each writes 1 %"

SUBJECTS: dict[str, tuple[str, ...]] = {
    "kernels": ("pyswap", "numpy-4k", "numpy", "memory-copy"),
    **dict.fromkeys(WORKLOADS, ("pyswap", *_KERNEL_SWAP, "memmap", "numpy-4k")),
    # A file's private pages are anonymous memory, which has nowhere to go without swap.
    "copy-storm": ("pyswap", *_KERNEL_SWAP, "numpy-4k"),
    "sequential-modify-compressible": ("pyswap", "memopro"),
    "random-read-1-compressible": ("pyswap", "memopro"),
    "forks-read": ("pyswap", "numpy-4k", "numpy"),
    "forks-write": ("pyswap", "numpy-4k", "numpy"),
    "minor-fault": ("pyswap", "userfaultfd"),
    "scale": ("pyswap",),
}
"""What is measured, and on which peers, in the order of a round."""

for _name, _more in (
    ("sequential-read", ("device-read", "device-read-small")),
    ("sequential-fill", ("device-write", "device-write-small")),
    ("sequential-modify", ("memopro",)),
    ("random-read-1", ("pyswap-64k", "memopro", "device-4k-1")),
    ("random-read-4", ("device-4k-8",)),
    ("column-major", ("pyswap-64k",)),
):
    SUBJECTS[_name] += _more


@dataclass(frozen=True)
class Measured:
    """Runs of one peer: the median, and the least and the most."""

    median: float
    least: float
    most: float
    unit: str


@dataclass(frozen=True)
class Target:
    """A row to be met.

    Attributes
    ----------
    workload, title : str
        What is run; how the row is called.
    against : tuple of str
        Peers; where there are several, the one that does best.
    bound : float
        The least ratio of rates, or the greatest of times or values.
    unit : str
        "bytes", "operations", "columns", "calls" or "children" a second, "nanoseconds", or a
        value's own.
    take : callable
        The measured number of one run, a rate unless the unit says otherwise.
    """

    workload: str
    title: str
    against: tuple[str, ...]
    bound: float
    unit: str
    take: Callable[[Run], float]

    @property
    def is_least(self) -> bool:
        """Whether the ratio must be at least the bound, and not at most."""
        return self.unit in ("bytes", "operations", "columns", "calls", "children")


@dataclass(frozen=True)
class Row:
    """A row of the table; `bound` and `is_met` are None where it is shown and not counted."""

    title: str
    against: str
    ours: Measured | None
    theirs: Measured | None
    ratio: float | None
    bound: float | None = None
    is_least: bool = True
    is_met: bool | None = None


def _rate(run: Run) -> float:
    return float(run["rate"])


def _nanoseconds(run: Run) -> float:
    return float(run["nanoseconds"])


def _calls(kernel: str) -> Callable[[Run], float]:
    return lambda run: 1.0 / float(run["kernels"][kernel])


def _times(where: str, cost: str) -> Callable[[Run], float]:
    return lambda run: float(run[where][cost] / run["alone"][cost])


def _targets(plan: Plan) -> Iterator[Target]:
    """The counted rows; a plan's array size is what values are relative to."""
    for kernel in KERNELS:
        yield Target("kernels", f"{kernel}, resident", ("numpy-4k",), 0.98, "calls", _calls(kernel))
    for name, against, bound in (
        ("sequential-read", ("device-read",), 0.85),
        ("sequential-read", ("kernel-swap-3",), 2.0),
        ("sequential-read", ("kernel-swap-5",), 1.2),
        ("sequential-fill", _KERNEL_SWAP, 1.7),
        ("sequential-fill", ("device-write",), 0.8),
        ("sequential-modify", _KERNEL_SWAP, 1.8),
        ("random-read-1", _KERNEL_SWAP, 1.0),
        ("random-read-4", _KERNEL_SWAP, 1.0),
        ("random-mixed-4", _KERNEL_SWAP, 1.0),
        ("zipf-4", _KERNEL_SWAP, 1.2),
        ("scan-4", _KERNEL_SWAP, 2.5),
        ("copy-storm", _KERNEL_SWAP, 1.2),
        ("column-major", _KERNEL_SWAP, 1.3),
        ("matmul", _KERNEL_SWAP, 1.3),
        ("matmul", ("memmap",), 1.3),
        ("sort", _KERNEL_SWAP, 1.3),
        ("sort", ("memmap",), 1.3),
        ("pagerank", _KERNEL_SWAP, 1.3),
        ("pagerank", ("memmap",), 1.3),
    ):
        workload = WORKLOADS[name]
        yield Target(name, workload.title, against, bound, workload.unit, _rate)

    def reads_per_array(run: Run) -> float:
        return float(run["counters"]["slot_reads"] * run["totals"]["page_size"] / plan.array_bytes)

    def metadata_percent(run: Run) -> float:
        return float(100 * run["totals"]["metadata_bytes"] / plan.array_bytes)

    yield Target("scan-4", "the same, slot reads", (), 1.3, "x the array", reads_per_array)
    yield Target("forks-read", _FORKS, ("numpy-4k",), 5.0, "children", _rate)
    yield Target(
        "minor-fault", "one minor fault", ("userfaultfd",), 1.3, "nanoseconds", _nanoseconds
    )
    yield Target("sequential-read", "metadata", (), 0.25, "% of the array", metadata_percent)
    for where, what in (("workers", "64 workers, one active"), ("space", "1,024x address space")):
        for cost, event in (("fault_us", "fault"), ("evict_us", "eviction")):
            title = f"CPU time per {event}, {what}"
            yield Target("scale", title, (), 1.5, "x that of 1 and 1x", _times(where, cost))
    yield Target(
        "scale", "each further mapper of an evicted page", (), 3.0, "us", lambda r: r["mapper_us"]
    )


def _measured(runs: list[Run], take: Callable[[Run], float], unit: str) -> Measured | None:
    if not runs:
        return None
    values = [take(run) for run in runs]
    return Measured(statistics.median(values), min(values), max(values), unit)


def _title(peer: str) -> str:
    return LIMITS[peer].title if peer in LIMITS else PEERS[peer].title


def _failed(failures: Failures, workload: str, peer: str) -> str:
    count = len(failures.get(workload, {}).get(peer, []))
    return f" ({count} failed)" if count else ""


def _row(results: Results, failures: Failures, target: Target) -> Row | None:
    runs = results.get(target.workload, {})
    ours = _measured(runs.get("pyswap", []), target.take, target.unit)
    failed = failures.get(target.workload, {})
    if ours is None:
        least = target.is_least
        is_tried = "pyswap" in failed
        return (
            Row(target.title, "", None, None, None, target.bound, least, False)
            if is_tried
            else None
        )
    if not target.against:
        is_met = ours.median <= target.bound
        return Row(target.title, "", ours, None, None, target.bound, False, is_met)
    told = [(p, _measured(runs.get(p, []), target.take, target.unit)) for p in target.against]
    there = [(peer, measured) for peer, measured in told if measured is not None]
    if not there:
        # Nobody to be compared with: a row that is not met, if it was tried.
        whom = ", ".join(f"{_title(p)} (all failed)" for p in target.against if p in failed)
        least = target.is_least
        return (
            Row(target.title, whom, ours, None, None, target.bound, least, False) if whom else None
        )
    peer, theirs = max(there, key=lambda pair: pair[1].median)
    ratio = ours.median / theirs.median
    is_met = ratio >= target.bound if target.is_least else ratio <= target.bound
    whom = _title(peer) + _failed(failures, target.workload, peer)
    return Row(target.title, whom, ours, theirs, ratio, target.bound, target.is_least, is_met)


def _shown(results: Results, workload: str, title: str, take: Any, unit: str) -> Iterator[Row]:
    """Rows against everyone, which do not count."""
    runs = results.get(workload, {})
    ours = _measured(runs.get("pyswap", []), take, unit)
    others = [peer for peer in runs if peer != "pyswap"]
    if ours and not others:
        yield Row(title, "", ours, None, None)
    for peer in others:
        if peer in LIMITS and LIMITS[peer].unit != unit:
            continue
        theirs = _measured(runs[peer], take, unit)
        ratio = ours.median / theirs.median if ours and theirs else None
        yield Row(title, _title(peer), ours, theirs, ratio)


def rows(results: Results, failures: Failures, plan: Plan) -> tuple[list[Row], list[Row]]:
    """Make the rows of all that was measured.

    Parameters
    ----------
    results : dict
        The runs that worked.
    failures : dict
        Those that did not; a row says how many.
    plan : Plan
        For the array's size.

    Returns
    -------
    tuple of two lists of Row
        Those that count, and those that are shown besides.
    """
    counted = [row for row in (_row(results, failures, target) for target in _targets(plan)) if row]
    have = {(row.title, row.against) for row in counted}
    shown: list[Row] = []
    for kernel in KERNELS:
        runs = {p: r for p, r in results.get("kernels", {}).items() if p not in LIMITS}
        shown += _shown(
            {"kernels": runs}, "kernels", f"{kernel}, resident", _calls(kernel), "calls"
        )
    copies = _measured(results.get("kernels", {}).get("memory-copy", []), _rate, "bytes")
    if copies is not None:
        shown.append(Row("limits", _title("memory-copy"), None, copies, None))
    for workload in WORKLOADS.values():
        shown += _shown(results, workload.name, workload.title, _rate, workload.unit)
    for name, title in (("forks-read", _FORKS), ("forks-write", _WRITES)):
        shown += _shown(results, name, title, _rate, "children")
    for cost, title in (("fault_us", "fault"), ("evict_us", "eviction")):
        shown += _shown(
            results, "scale", f"CPU time per {title}", lambda run, c=cost: run["alone"][c], "us"
        )
    return counted, [row for row in shown if (row.title, row.against) not in have]


def peers_of(subject: str, chosen: tuple[str, ...]) -> list[str]:
    """Return the peers that a subject is measured on, of those chosen; all where none is.

    A chosen variant of pyswap is measured on every subject but the one that makes its own pools.
    """
    extra = [] if subject == "scale" else [peer for peer in chosen if peer.startswith("pyswap-")]
    able = dict.fromkeys([*SUBJECTS[subject], *extra])
    return [peer for peer in able if not chosen or peer in chosen]

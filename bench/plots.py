"""The plots: throughput over time for each workload, and every ratio in parts of its target."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .rows import Results, Row, Run
from .workloads import WORKLOADS

__all__ = ["draw"]

_BINS = 60
_ACROSS = 3
_MET, _MISSED = "#2b8a57", "#c2452d"


def _median_run(runs: list[Run]) -> Run:
    middle = statistics.median_low([run["rate"] for run in runs])
    return next(run for run in runs if run["rate"] == middle)


def _throughput(run: Run) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Units a second of all processes together, in equal bins of time."""
    edges = np.linspace(0.0, run["elapsed_s"], _BINS + 1)
    done = np.zeros_like(edges)
    for curve in run["points"]:
        times, units = np.array(curve).T
        done += np.interp(edges, times, units)
    return (edges[1:] + edges[:-1]) / 2, np.diff(done) / np.diff(edges)


def _draw_time(axes: Any, workload: str, runs: dict[str, list[Run]]) -> None:
    unit = WORKLOADS[workload].unit
    scale = 1e9 if unit == "bytes" else 1.0
    for peer, of_peer in runs.items():
        if "points" in of_peer[0]:
            times, rates = _throughput(_median_run(of_peer))
            axes.plot(times, rates / scale, label=peer, linewidth=2 if peer == "pyswap" else 1)
    axes.set_title(WORKLOADS[workload].title)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GB/s" if unit == "bytes" else f"{unit}/s")
    axes.set_yscale("log")
    axes.legend(fontsize="small")


def _draw_ratios(axes: Any, rows: list[Row]) -> None:
    # Where less is better, the ratio is turned round: to the right is always better.
    ordered = [row for row in rows if row.ratio is not None and row.bound is not None][::-1]
    for i, row in enumerate(ordered):
        ratio, bound = float(row.ratio or 0), float(row.bound or 0)
        good = ratio / bound if row.is_least else bound / ratio
        axes.barh(i, good, color=_MET if row.is_met else _MISSED)
    axes.set_yticks(range(len(ordered)), [f"{row.title} / {row.against}" for row in ordered])
    axes.tick_params(axis="y", labelsize="small")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("reached, in parts of the target")


def draw(folder: Path, stem: str, results: Results, counted: list[Row]) -> list[Path]:
    """Draw throughput over time and what is reached of each target, and return the PNG files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    timed = {name: runs for name, runs in results.items() if name in WORKLOADS}
    if timed:
        lines = -(-len(timed) // _ACROSS)
        size = (6.0 * _ACROSS, 4.0 * lines)
        figure, grid = plt.subplots(lines, _ACROSS, figsize=size, layout="constrained")
        for axes in grid.flat[len(timed) :]:
            axes.set_axis_off()
        for axes, (name, runs) in zip(grid.flat, timed.items(), strict=False):
            _draw_time(axes, name, runs)
        made.append(folder / f"{stem}-throughput.png")
        figure.savefig(made[-1], dpi=100)
        plt.close(figure)
    if any(row.ratio is not None for row in counted):
        height = 1.5 + 0.3 * len(counted)
        figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
        _draw_ratios(axes, counted)
        made.append(folder / f"{stem}-targets.png")
        figure.savefig(made[-1], dpi=100)
        plt.close(figure)
    return made

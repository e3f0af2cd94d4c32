"""Ask eight what-ifs of one array larger than memory, in eight forked children at once.

The array has the area of every cell of the land mask of `global-land-mask` (km2; 0 is sea), four
times as large as the memory budget, and is private: copied on write after fork. Each child lets
the sea take a band of latitudes, a twentieth of the array, adds up the land that is left, and
says so; none sees another's flood. Only the pages that a child writes are copied; the others are
shared, in memory and in swap. Eight full copies would be eight times the array.

Run `python examples/what_if.py --help` for the options. Reading order: `ask` is the whole job.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from continents import cell_areas, mask_file, mib, open_member
from numpy.typing import NDArray

import pyswap

CHILDREN = 8
SHARE = 20
"""Each child changes one of so many parts."""
BLOCK_ROWS = 64


@dataclass(frozen=True)
class Answer:
    """What a child found: the latitudes it flooded, and the land lost and left, in km2."""

    south: float
    north: float
    lost_km2: float
    left_km2: float


@dataclass(frozen=True)
class Asked:
    """Every child's answer, and what the asking cost: the pool's numbers before and after."""

    total_km2: float
    answers: list[Answer]
    seconds: float
    before: pyswap.Stats
    during: pyswap.Stats


def load_areas(source: Path, every: int, pool: pyswap.Pool) -> tuple[NDArray[np.float32], NDArray]:  # type: ignore[type-arg]
    """Make the private array of areas, and return it with the latitude of each row's northern edge.

    Parameters
    ----------
    source : Path
        An npz file with members `mask` (bool, True is sea) and `lat` (degrees, north to south).
    every : int
        Take every n-th row and column.
    pool : pyswap.Pool
        Where the array goes.
    """
    with np.load(source) as members:
        north = members["lat"][::every]
    with open_member(source, "mask") as (stream, (rows, columns)):
        areas = pool.zeros((rows // every, columns // every), np.float32, private=True)
        per_row = cell_areas(north, columns // every).astype(np.float32)
        for start in range(0, rows, every * BLOCK_ROWS):
            count = min(every * BLOCK_ROWS, rows - start)
            sea = np.frombuffer(stream.read(count * columns), np.bool_).reshape(count, columns)
            first = start // every
            block = areas[first : first + len(sea[::every])]
            np.multiply(
                per_row[first : first + len(block), None], ~sea[::every, ::every], out=block
            )
    return areas, north


def land(areas: NDArray[np.float32]) -> float:
    """Add up the land, a block of rows at a time."""
    blocks = range(0, len(areas), BLOCK_ROWS)
    return float(sum(areas[i : i + BLOCK_ROWS].sum(dtype=np.float64) for i in blocks))


def flood(areas: NDArray[np.float32], north: NDArray[np.float64], child: int) -> Answer:
    """Let the sea take a band of rows, in this process's array only."""
    height = len(areas) // SHARE
    # Bands from the far north to the far south, apart from each other.
    first = (child + 1) * len(areas) // (CHILDREN + 2)
    band = areas[first : first + height]
    lost = land(band)
    band[:] = 0
    return Answer(float(north[first + height]), float(north[first]), lost, land(areas))


def answer(
    areas: NDArray[np.float32], north: NDArray[np.float64], child: int, pipe: Connection
) -> None:
    """Send a child's answer, and keep its array until the parent has looked at the pool."""
    pipe.send(flood(areas, north, child))
    pipe.recv()


def ask(pool: pyswap.Pool, source: Path, every: int) -> Asked:
    """Fork the children, one what-if each, and gather their answers."""
    areas, north = load_areas(source, every, pool)
    total = land(areas)
    before, started = pool.stats(), time.perf_counter()
    fork = multiprocessing.get_context("fork")
    pipes, children = [], []
    for number in range(CHILDREN):
        here, there = fork.Pipe()
        child = fork.Process(target=answer, args=(areas, north, number, there), daemon=True)
        child.start()
        there.close()
        pipes.append(here)
        children.append(child)
    answers = [pipe.recv() for pipe in pipes]
    seconds, during = time.perf_counter() - started, pool.stats()
    for pipe in pipes:
        pipe.send(None)
    for child in children:
        child.join()
    if land(areas) != total:
        raise AssertionError("a child's flood reached the parent's array")
    return Asked(total, answers, seconds, before, during)


def report(asked: Asked, array_bytes: int) -> None:
    """Print every answer, and the cost beside that of eight copies."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="what if the sea took it?")
    for name in ("latitudes", "lost, km2", "left, km2"):
        table.add_column(name, justify="right")
    for each in asked.answers:
        table.add_row(
            f"{each.south:.1f} to {each.north:.1f}",
            f"{each.lost_km2:,.0f}",
            f"{each.left_km2:,.0f}",
        )
    console.print(table)
    page = asked.before.page_size
    copies = (asked.during.cow_copies - asked.before.cow_copies) * page
    written = (asked.during.slot_writes - asked.before.slot_writes) * page
    read = (asked.during.slot_reads - asked.before.slot_reads) * page
    console.print(
        f"land: {asked.total_km2:,.0f} km2, and as much in the parent's array afterwards\n"
        f"memory: {mib(asked.before.memory_bytes)} for parent and {CHILDREN} children, "
        f"an array of {mib(array_bytes)}; {asked.seconds:.1f} s\n"
        f"copies: {mib(copies)}, where {CHILDREN} full copies are {mib(CHILDREN * array_bytes)}\n"
        f"swap traffic: {mib(written)} written, {mib(read)} read, where every child reads "
        f"{mib(array_bytes)}, {mib(CHILDREN * array_bytes)} in all",
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--every", type=int, default=2, help="take every n-th cell each way (default: 2)")
    add("--mask", type=Path, help="npz file with `mask` and `lat` (default: global-land-mask's)")
    add("--swap-path", help="folder or new file for swap (default: the library's choice)")
    add("--page-size", type=int, help="bytes (default: the library's choice)")
    options = parser.parse_args(arguments)
    source = options.mask or mask_file()
    with open_member(source, "mask") as (_, (rows, columns)):
        array_bytes = (rows // options.every) * (columns // options.every) * 4
    with pyswap.Pool(
        array_bytes // 4,
        2 * array_bytes,
        swap_path=options.swap_path,
        page_size=options.page_size,
    ) as pool:
        report(ask(pool, source, options.every), array_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure the landmasses of the Earth with arrays larger than memory.

The GLOBE land mask of the package `global-land-mask` (30 arc seconds: 21,600 x 43,200 cells) is
streamed from its zip member into a paged array (890 MiB); four forked workers label bands of it
into another (3.5 GiB); labels are joined across seams and the date line, numbered by area, drawn.
Everything runs under one memory budget (256 MiB): no cell is kept anywhere but in the pool.

Run `python examples/continents.py --help` for the options. Reading order: `survey` is the whole
job; above it stand the steps in the order in which it takes them, below it what people see.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import scipy.ndimage  # type: ignore[import-untyped]
import scipy.sparse  # type: ignore[import-untyped]
import scipy.sparse.csgraph  # type: ignore[import-untyped]
from numpy.typing import NDArray

import pyswap

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess

    from matplotlib.axes import Axes
    from rich.console import Console, Group
    from typing_extensions import Self

EARTH_RADIUS_KM = 6371.0
EARTH_SURFACE_KM2 = 4.0 * math.pi * EARTH_RADIUS_KM**2
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)
MIB = 1 << 20

PIECE_BYTES = 1 * MIB
SAMPLE_SECONDS = 0.01
SAMPLES_PER_RECORD = 10
RECORDS_LIMIT = 8192
PLAIN_LINE_SECONDS = 5.0
MAP_WIDTH_PIXELS = 1800
TOP = 10
PHASES = {
    "read": "read the mask",
    "label": "label the bands",
    "join": "join the labels",
    "number": "number by area",
    "draw": "draw the pictures",
}
MAP_NAME = "landmasses.png"
CHART_NAME = "memory.png"

# A point inside each landmass that might be among the largest: (name, latitude, longitude).
PLACES = (
    ("Eurasia", 60.0, 90.0),
    ("Africa", 12.0, 20.0),
    ("North America", 45.0, -100.0),
    ("South America", -10.0, -55.0),
    ("Antarctica", -80.0, 30.0),
    ("Australia", -25.0, 134.0),
    ("Greenland", 72.0, -40.0),
    ("New Guinea", -5.5, 142.0),
    ("Borneo", 1.0, 114.0),
    ("Madagascar", -19.5, 46.5),
    ("Baffin Island", 68.5, -71.0),
    ("Sumatra", -0.5, 102.0),
    ("Honshu", 36.5, 138.5),
    ("Great Britain", 52.5, -1.5),
    ("Victoria Island", 71.0, -110.0),
    ("Ellesmere Island", 80.5, -76.0),
    ("Sulawesi", -2.2, 120.5),
    ("South Island", -44.0, 170.5),
    ("Java", -7.2, 109.0),
    ("Iceland", 65.0, -18.5),
    ("Tierra del Fuego", -54.2, -68.5),
    ("Svalbard", 78.5, 16.5),
)
CONTINENTS = frozenset(name for name, _, _ in PLACES[:6])


@dataclass(frozen=True)
class Plan:
    """What a survey does.

    Parameters
    ----------
    source : Path
        An npz file with members `mask` (bool, rows x columns, True is sea) and `lat` (degrees, the
        northern edge of each row, north to south).
    every : int
        Take every n-th row and column; must divide both. 1 is the whole mask.
    workers : int
        Forked workers; each labels one band of rows.
    block_rows : int
        Rows that a worker labels at once. It bounds what scipy allocates.
    output : Path or None
        The folder for the two pictures; None draws nothing.
    """

    source: Path
    every: int = 1
    workers: int = 4
    block_rows: int = 64
    output: Path | None = None


@dataclass(frozen=True)
class Ground:
    """What parent and workers share by fork: the pool, its arrays, and counters of rows done.

    `land` is bool and `labels` int32, both rows x columns; `cell_km2` is the area of one cell in
    each row; `done` has one counter per worker and the parent's at its end.
    """

    pool: pyswap.Pool
    land: NDArray[np.bool_]
    labels: NDArray[np.int32]
    cell_km2: NDArray[np.float64]
    done: NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """What labelling the rows `start` to `stop` found.

    Labels run from 1 to `len(km2) - 1`; `km2` is the area of each; `keys` are pairs of labels that
    touch (see `touching`); `cells` counts the cells with a label.
    """

    start: int
    stop: int
    km2: NDArray[np.float64]
    keys: NDArray[np.int64]
    cells: int


@dataclass(frozen=True)
class Landmasses:
    """Landmasses, numbered 1, 2, 3 ... by falling area.

    `km2[n]` is the area of landmass n, and `km2[0]` is 0; `places` lists (name, landmass, latitude,
    longitude) of the points of `PLACES` that are land.
    """

    km2: NDArray[np.float64]
    places: list[tuple[str, int, float, float]]

    def __len__(self) -> int:
        return len(self.km2) - 1

    @property
    def share(self) -> float:
        """The share of the Earth's surface that is land."""
        return float(self.km2.sum()) / EARTH_SURFACE_KM2

    def name(self, number: int) -> str:
        """Return the continents on a landmass, or else the first known place, or its number."""
        names = [place[0] for place in self.places if place[1] == number]
        continents = [name for name in names if name in CONTINENTS]
        return " and ".join(continents or names[:1]) or f"no. {number}"

    def largest(self) -> list[tuple[int, str, float]]:
        """Return number, name and area in km2 of the `TOP` largest."""
        numbers = range(1, min(TOP, len(self)) + 1)
        return [(number, self.name(number), float(self.km2[number])) for number in numbers]


@dataclass(frozen=True)
class Survey:
    """What a survey found: `labels` is 0 for sea, else the number of the landmass.

    `peaks` is the largest anonymous memory in bytes of each process; `records` is how it went.
    """

    labels: NDArray[np.int32]
    landmasses: Landmasses
    peaks: dict[str, int]
    records: list[Record]
    seconds: float


# Step 1: the mask, streamed into a paged array.


def mask_file() -> Path:
    """Return the path of the mask that `global-land-mask` ships.

    The package is not imported, because importing it loads the whole mask.

    Raises
    ------
    FileNotFoundError
        The package is not installed.
    """
    spec = importlib.util.find_spec("global_land_mask")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package global-land-mask is not installed")
    return Path(spec.origin).parent / "globe_combined_mask_compressed.npz"


@contextmanager
def open_member(source: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open an array of bool in an npz file as a stream; yield it at its first cell, with the shape.

    Raises
    ------
    ValueError
        The member is not a C-ordered array of bool.
    """
    with zipfile.ZipFile(source) as archive, archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read_header(stream)
        if is_fortran or dtype != np.bool_:
            raise ValueError(f"{source}: {name} is not a C-ordered array of bool")
        yield stream, shape


def mask_shape(plan: Plan) -> tuple[int, int]:
    """Return rows and columns of the cells that the plan takes.

    Raises
    ------
    ValueError
        The mask is not two-dimensional, `plan.every` does not divide its sides, or there are more
        workers than rows.
    """
    with open_member(plan.source, "mask") as (_, shape):
        if len(shape) != 2:
            raise ValueError(f"{plan.source}: a mask has two dimensions, this one {len(shape)}")
        if any(side % plan.every for side in shape):
            raise ValueError(f"a step of {plan.every} does not divide a mask of shape {shape}")
    rows, columns = shape[0] // plan.every, shape[1] // plan.every
    if plan.workers > rows:
        raise ValueError(f"{plan.workers} workers are too many for {rows} rows")
    return rows, columns


def load_land(plan: Plan, ground: Ground) -> int:
    """Stream the mask into `ground.land`, inverted, and return the number of land cells.

    Raises
    ------
    ValueError
        The stream ends too early.
    """
    cells = 0
    with open_member(plan.source, "mask") as (stream, (rows, columns)):
        step = plan.every * max(1, PIECE_BYTES // (columns * plan.every))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            raw = stream.read((stop - start) * columns)
            if len(raw) < (stop - start) * columns:
                raise ValueError(f"{plan.source}: the mask ends within rows {start} to {stop}")
            sea = np.frombuffer(raw, dtype=np.bool_).reshape(-1, columns)
            sea = sea[:: plan.every, :: plan.every]
            first = start // plan.every
            np.logical_not(sea, out=ground.land[first : first + len(sea)])
            cells += sea.size - int(np.count_nonzero(sea))
            ground.done[-1] += len(sea)
    return cells


def cell_areas(north_edges: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
    """Return the area in km2 of one cell of each row, on a sphere.

    Parameters
    ----------
    north_edges : array of shape (rows,)
        Latitude of each row's northern edge in degrees, evenly spaced and falling.
    columns : int
        Cells around the globe.
    """
    height = np.radians(north_edges[0] - north_edges[1])
    middle = np.radians(north_edges) - height / 2
    # The integral of the cosine over the row is exactly the cosine at its middle times this chord.
    chord = 2.0 * np.sin(height / 2)
    areas = EARTH_RADIUS_KM**2 * (2.0 * np.pi / columns) * chord * np.cos(middle)
    return cast("NDArray[np.float64]", areas)


# Step 2: bands, labelled by the workers.


def touching(one: NDArray[np.int32], other: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return which labels stand side by side in two lines of the same length.

    A pair of labels (a, b) is one 64-bit key, `a << 32 | b`: keys sort and unite faster than pairs.
    """
    both = (one > 0) & (other > 0)
    return np.unique((one[both].astype(np.int64) << 32) | other[both])


def touching_rows(upper: NDArray[np.int32], lower: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the keys of the labels that touch between two neighbouring rows.

    Rolling a row carries its end to its beginning, so the diagonals over the date line are here.
    """
    return np.concatenate([touching(upper, np.roll(lower, shift)) for shift in (-1, 0, 1)])


def touching_date_line(block: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the keys of the labels that touch over the date line within a block of rows."""
    east, west = np.array(block[:, -1]), np.array(block[:, 0])
    sides = ((east, west), (east[:-1], west[1:]), (east[1:], west[:-1]))
    return np.concatenate([touching(one, other) for one, other in sides])


def measure(
    block: NDArray[np.int32], cell_km2: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], int]:
    """Return the area of each label 0 to `count` in a block (0 for the sea), and its land cells."""
    km2 = np.zeros(count + 1)
    cells = 0
    # Row by row, because bincount widens what it is given to 64 bits.
    for row, area in zip(block, cell_km2, strict=True):
        in_row = np.bincount(row, minlength=count + 1)
        in_row[0] = 0
        km2 += area * in_row
        cells += int(in_row.sum())
    return km2, cells


def label_band(ground: Ground, worker: int, start: int, stop: int, block_rows: int) -> Band:
    """Label the rows `start` to `stop` in place, block by block, numbering from 1."""
    count = cells = 0
    km2, keys = [np.zeros(1)], [np.empty(0, dtype=np.int64)]
    for top in range(start, stop, block_rows):
        bottom = min(top + block_rows, stop)
        land, block = ground.land[top:bottom], ground.labels[top:bottom]
        found = scipy.ndimage.label(land, structure=EIGHT_NEIGHBOURS, output=block)
        block_km2, block_cells = measure(block, ground.cell_km2[top:bottom], found)
        km2.append(block_km2[1:])
        cells += block_cells
        np.add(block, count, out=block, where=land)
        keys.append(touching_date_line(block))
        if top > start:
            keys.append(touching_rows(np.array(ground.labels[top - 1]), np.array(block[0])))
        count += found
        ground.done[worker] += bottom - top
    return Band(start, stop, np.concatenate(km2), np.concatenate(keys), cells)


# Step 3: labels of all bands, joined into landmasses and numbered by area.


def join_bands(
    labels: NDArray[np.int32], bands: Sequence[Band]
) -> tuple[list[NDArray[np.int32]], NDArray[np.float64]]:
    """Unite labels that touch, and number the landmasses by falling area.

    Parameters
    ----------
    labels : array of shape (rows, columns)
        As `label_band` left it: each band counts from 1.
    bands : sequence of Band
        All bands, from north to south.

    Returns
    -------
    tables : list of arrays
        For each band, the number of the landmass of each of its labels; `table[0]` is 0.
    km2 : array
        The area of each landmass by its number; `km2[0]` is 0.
    """
    counts = [len(band.km2) - 1 for band in bands]
    offsets = np.concatenate(([0], np.cumsum(counts)))
    total = int(offsets[-1])
    pairs = [decode(b.keys, o, o) for b, o in zip(bands, offsets[:-1], strict=True)]
    for north in range(len(bands) - 1):
        seam = bands[north + 1].start
        keys = touching_rows(np.array(labels[seam - 1]), np.array(labels[seam]))
        pairs.append(decode(keys, offsets[north], offsets[north + 1]))
    edges = np.concatenate(pairs, axis=1)
    graph = scipy.sparse.coo_array(
        (np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(total + 1, total + 1)
    )
    parts, part = scipy.sparse.csgraph.connected_components(graph, directed=False)
    km2 = np.bincount(part, weights=np.concatenate([[0.0], *(b.km2[1:] for b in bands)]))
    # The sea is label 0 and touches nothing; without an area it comes last, and is dropped.
    order = np.argsort(-km2, kind="stable")
    number = np.empty(parts, dtype=np.int32)
    number[order] = np.arange(1, parts + 1)
    tables = [
        np.concatenate(([np.int32(0)], number[part[offset + 1 : offset + count + 1]]))
        for offset, count in zip(offsets[:-1], counts, strict=True)
    ]
    return tables, np.concatenate(([0.0], km2[order[:-1]]))


def decode(keys: NDArray[np.int64], one: int, other: int) -> NDArray[np.int64]:
    """Return keys as an array of shape (2, n) of labels counted over all bands."""
    return np.stack(((keys >> 32) + one, (keys & 0xFFFFFFFF) + other))


# Step 4: the numbers, written by the workers.


def renumber_band(
    ground: Ground, worker: int, start: int, stop: int, table: NDArray[np.int32]
) -> int:
    """Replace each label in rows `start` to `stop` by `table[label]`; return the land cells seen.

    Rows of sea alone are not written, so that their pages stay clean.
    """
    cells = 0
    for row in ground.labels[start:stop]:
        in_row = int(np.count_nonzero(row))
        if in_row:
            row[...] = table[row]
        cells += in_row
        ground.done[worker] += 1
    return cells


def find_places(labels: NDArray[np.int32]) -> list[tuple[str, int, float, float]]:
    """Return (name, label, latitude, longitude) of each of `PLACES` that is on land."""
    rows, columns = labels.shape
    found = []
    for name, latitude, longitude in PLACES:
        row = int((90.0 - latitude) / 180.0 * rows)
        label = int(labels[row, int((longitude + 180.0) / 360.0 * columns)])
        if label:
            found.append((name, label, latitude, longitude))
    return found


# The workers.


class WorkerError(RuntimeError):
    """A worker failed or died; the text says which, and carries its traceback."""


class Team:
    """Forked workers that inherit the ground and run what they are told.

    A task is a function and arguments; it is called with (ground, worker number, *arguments).
    Not thread-safe.
    """

    def __init__(self, ground: Ground, workers: int) -> None:
        self._ground = ground
        self._pipes: list[Connection[Any, Any]] = []
        self._processes: list[ForkProcess] = []
        fork = multiprocessing.get_context("fork")
        for worker in range(workers):
            mine, theirs = fork.Pipe()
            process = fork.Process(target=self._serve, args=(worker, mine, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def _serve(
        self,
        worker: int,
        parent: Connection[Any, Any],
        pipe: Connection[Any, Any],
    ) -> None:
        # Ctrl-C reaches the whole foreground group; the parent decides what becomes of the workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Its own copy of the parent's end would hide the parent's death from this worker.
        parent.close()
        while True:
            try:
                function, *arguments = pipe.recv()
            except EOFError:
                return
            try:
                result, error = function(self._ground, worker, *arguments), None
            except Exception:  # noqa: BLE001 - whatever it was, the parent raises it.
                result, error = None, traceback.format_exc()
            pipe.send((result, error))

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [process.pid for process in self._processes if process.pid is not None]

    def run(self, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run tasks, as many at once as there are workers; return the results in their order.

        Raises
        ------
        WorkerError
            A worker failed or died.
        """
        results: list[Any] = [None] * len(tasks)
        waiting = deque(enumerate(tasks))
        idle = deque(range(len(self._pipes)))
        running: dict[Any, tuple[int, int]] = {}
        while waiting or running:
            while waiting and idle:
                index, task = waiting.popleft()
                worker = idle.popleft()
                self._pipes[worker].send(task)
                running[self._pipes[worker]] = (worker, index)
            for ready in multiprocessing.connection.wait(list(running)):
                worker, index = running.pop(ready)
                results[index] = self._receive(worker)
                idle.append(worker)
        return results

    def _receive(self, worker: int) -> Any:
        try:
            result, error = self._pipes[worker].recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[worker]
            process.join()
            raise WorkerError(
                f"worker {worker + 1} (pid {process.pid}) died, exit code {process.exitcode}"
            ) from None
        if error is not None:
            raise WorkerError(f"worker {worker + 1} failed:\n{error}")
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.join()
            process.close()


# What is watched while it runs.


@dataclass(frozen=True)
class Record:
    """The state of a survey at one instant; times in seconds since its start, sizes in bytes."""

    seconds: float
    phase: str
    done: int
    total: int
    resident_pages: int
    store_bytes: int
    swap_used_bytes: int
    read_bytes: int
    written_bytes: int
    minor_faults: int
    major_faults: int
    write_faults: int
    anonymous_bytes: int


class View(Protocol):
    """Shows the records of a survey, as they come."""

    def show(self, record: Record, peaks: dict[str, int]) -> None:
        """Show one record; `peaks` is the largest anonymous memory of each process so far."""


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous resident memory of a process in bytes, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Monitor(threading.Thread):
    """A thread that samples every process's anonymous memory and the pool's counters.

    Processes are watched from outside, because a thread within a worker could not run while scipy
    holds the interpreter's lock, which is when memory peaks. Records are kept for the chart;
    when `RECORDS_LIMIT` is reached, every other one is dropped and they come half as often.
    """

    def __init__(self, pool: pyswap.Pool, pids: dict[str, int], ground: Ground, view: View) -> None:
        super().__init__(name="monitor", daemon=True)
        self.records: list[Record] = []
        self.peaks: dict[str, int] = dict.fromkeys([*pids, "swapper"], 0)
        self._pool = pool
        self._pids = pids
        self._ground = ground
        self._view = view
        self._phase = ("", 0)
        self._samples_per_record = SAMPLES_PER_RECORD
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._started_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since the monitor was made."""
        return time.monotonic() - self._started_at

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Tell what is going on: `total` is what the counters of the ground will add up to."""
        with self._lock:
            self._ground.done[:] = 0
            self._phase = (name, total)
            self._record()
        yield
        with self._lock:
            self._record()

    def run(self) -> None:
        """Sample until stopped, or until sampling fails, which `__exit__` then raises."""
        samples = 0
        try:
            while not self._stopped.wait(SAMPLE_SECONDS):
                with self._lock:
                    self._sample()
                    samples += 1
                    if samples % self._samples_per_record == 0:
                        self._record()
        except Exception as error:  # noqa: BLE001 - it is raised in the thread that waits.
            self._error = error

    def _sample(self) -> int:
        # A swapper that died is replaced by another process, so its id is asked for every time.
        largest = 0
        for name, pid in {**self._pids, "swapper": self._pool.swapper_pid}.items():
            now = anonymous_bytes(pid)
            self.peaks[name] = max(self.peaks[name], now)
            largest = max(largest, now)
        return largest

    def _record(self) -> None:
        stats = self._pool.stats()
        name, total = self._phase
        record = Record(
            seconds=self.seconds,
            phase=name,
            done=int(self._ground.done.sum()),
            total=total,
            resident_pages=stats.resident_pages,
            store_bytes=os.fstat(self._pool.fileno()).st_blocks * 512,
            swap_used_bytes=stats.swap_used_bytes,
            read_bytes=stats.slot_reads * stats.page_size,
            written_bytes=stats.slot_writes * stats.page_size,
            minor_faults=stats.minor_faults,
            major_faults=stats.major_faults,
            write_faults=stats.write_faults,
            anonymous_bytes=self._sample(),
        )
        self.records.append(record)
        if len(self.records) >= RECORDS_LIMIT:
            del self.records[1::2]
            self._samples_per_record *= 2
        self._view.show(record, self.peaks)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped.set()
        self.join()
        if self._error is not None and kind is None:
            raise self._error


# The pictures, drawn by workers, so that their memory is watched too.


HEAD, FOOT = 60, 152
STRIP_PIXELS = 50
GRATICULE: dict[str, Any] = {"color": "#eef3f7", "alpha": 0.09, "linewidth": 0.7}
SEA, PAPER, INK, FAINT = "#12293d", "#0a1825", "#eef3f7", "#8ba3b8"
TOP_COLOURS = (
    *("#e9b44c", "#57b894", "#dbe7ef", "#e5633c", "#86c5e8"),
    *("#b58cf0", "#f191b6", "#b2d15a", "#5a8fe0", "#2fc4b2"),
)


@dataclass(frozen=True)
class MapScale:
    """How cells become pixels: each is the mean colour of `detail` x `detail` of them."""

    width: int
    height: int
    cells: int
    detail: int


def map_scale(shape: tuple[int, ...]) -> MapScale:
    """Return the scale at which a map of cells of this shape is at most `MAP_WIDTH_PIXELS` wide."""
    rows, columns = shape
    cells = -(-columns // MAP_WIDTH_PIXELS)
    detail = next(n for n in (3, 2, 1) if cells % n == 0)
    return MapScale(columns // cells, rows // cells, cells, detail)


def palette(count: int) -> NDArray[np.uint8]:
    """Return a colour for the sea and each of `count` landmasses, of shape (count + 1, 3)."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    # Steps of the golden ratio keep the hues of neighbouring numbers far apart.
    hues = np.arange(count + 1) * 0.6180339887 % 1.0
    colours = hsv_to_rgb(np.stack((hues, np.full_like(hues, 0.38), np.full_like(hues, 0.78)), 1))
    top = min(TOP, count)
    colours[1 : top + 1] = [to_rgb(colour) for colour in TOP_COLOURS[:top]]
    colours[0] = to_rgb(SEA)
    return np.round(colours * 255).astype(np.uint8)


def paint(ground: Ground, worker: int, count: int) -> NDArray[np.uint8]:
    """Return the map as an image of shape (height, width, 3), read from the array in strides."""
    scale = map_scale(ground.labels.shape)
    colours = palette(count)
    image = np.empty((scale.height, scale.width, 3), dtype=np.uint8)
    # One row of several is looked at: reading ahead would fetch those between.
    ground.pool.advise(ground.labels, "random")
    stride = scale.cells // scale.detail
    for y in range(scale.height):
        top = y * scale.cells
        cells = ground.labels[
            top : top + scale.cells : stride, : scale.width * scale.cells : stride
        ]
        samples = colours[cells].reshape(scale.detail, scale.width, scale.detail, 3)
        image[y] = samples.mean(axis=(0, 2))
        ground.done[worker] += 1
    return image


def draw_map(ground: Ground, worker: int, landmasses: Landmasses, path: Path) -> None:
    """Write a PNG map, coloured by landmass, with a heading and a legend of the largest."""
    from matplotlib.figure import Figure

    image = paint(ground, worker, len(landmasses))
    pixels = image.shape[1] / MAP_WIDTH_PIXELS
    # All lengths from here on are in units of which the map is `MAP_WIDTH_PIXELS` wide.
    map_height = image.shape[0] / pixels
    height = FOOT + map_height + HEAD
    figure = Figure((MAP_WIDTH_PIXELS / 100, height / 100), dpi=100 * pixels, facecolor=PAPER)
    # In strips, because matplotlib resamples an image in floating point, even one to one.
    for top in range(0, len(image), STRIP_PIXELS):
        strip = image[top : top + STRIP_PIXELS]
        y = round(FOOT * pixels) + len(image) - top - len(strip)
        figure.figimage(strip, xo=0, yo=y, origin="upper")
    axes = figure.add_axes((0, 0, 1, 1), zorder=1)
    axes.set(xlim=(0, MAP_WIDTH_PIXELS), ylim=(0, height))
    axes.set_axis_off()

    def place(latitude: float, longitude: float) -> tuple[float, float]:
        x = (longitude + 180) / 360 * MAP_WIDTH_PIXELS
        return x, FOOT + (latitude + 90) / 180 * map_height

    for parallel in range(-60, 61, 30):
        axes.plot(*zip(place(parallel, -180), place(parallel, 180), strict=True), **GRATICULE)
    for meridian in range(-150, 151, 30):
        axes.plot(*zip(place(-90, meridian), place(90, meridian), strict=True), **GRATICULE)
    for number in range(1, TOP + 1):
        spots = [place(*spot) for _, owner, *spot in landmasses.places if owner == number]
        for spot in spots[:1]:
            draw_badge(axes, spot, number, PAPER, INK)
    draw_heading(axes, height - HEAD / 2, landmasses, ground.labels.shape)
    draw_legend(axes, landmasses)
    figure.savefig(path)


def draw_badge(axes: Axes, spot: tuple[float, float], number: int, disc: str, ink: str) -> None:
    """Draw a number on a disc."""
    axes.plot(*spot, "o", markersize=17, color=disc, markeredgewidth=0)
    size = 11 if number < 10 else 9.5
    axes.text(
        *spot, str(number), color=ink, size=size, weight="bold", ha="center", va="center_baseline"
    )


def draw_heading(axes: Axes, y: float, landmasses: Landmasses, shape: tuple[int, ...]) -> None:
    """Write title and summary in one line."""
    title = {"color": INK, "size": 21, "weight": "bold", "va": "center_baseline"}
    axes.text(26, y, "Landmasses of the Earth", title)
    summary = (
        f"{len(landmasses):,} landmasses cover {landmasses.share:.1%} of the surface   |   "
        f"GLOBE land mask, {shape[0]:,} x {shape[1]:,} cells"
    )
    style = {"color": FAINT, "size": 14, "va": "center_baseline", "ha": "right"}
    axes.text(MAP_WIDTH_PIXELS - 26, y, summary, style)


def draw_legend(axes: Axes, landmasses: Landmasses) -> None:
    """Write the largest landmasses and their areas in two rows of five."""
    for index, (number, name, km2) in enumerate(landmasses.largest()):
        x, y = 40 + (index % 5) * 360, FOOT * (0.7 - 0.44 * (index // 5))
        draw_badge(axes, (x, y), number, TOP_COLOURS[index], PAPER)
        axes.text(x + 24, y + 11, name, color=INK, size=13, va="center_baseline")
        axes.text(x + 24, y - 13, f"{km2:,.0f} km²", color=FAINT, size=12, va="center_baseline")


def draw_chart(
    ground: Ground, worker: int, records: list[Record], budget_bytes: int, path: Path
) -> None:
    """Write a PNG of memory, swap in use and swap traffic over time."""
    del ground, worker
    from matplotlib.figure import Figure

    figure = Figure((12.0, 9.0), dpi=120, facecolor=PAPER)
    figure.subplots_adjust(left=0.06, right=0.97, top=0.95, bottom=0.065, hspace=0.22)
    memory, used, traffic = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 3))
    seconds = np.array([record.seconds for record in records])
    store = np.array([record.store_bytes for record in records]) / MIB
    memory.fill_between(
        seconds, store, color="#57b894", alpha=0.55, linewidth=0, label="page store"
    )
    anonymous = np.array([record.anonymous_bytes for record in records]) / MIB
    memory.plot(
        seconds, anonymous, color="#86c5e8", linewidth=1.6, label="largest process, anonymous"
    )
    budget = budget_bytes / MIB
    label = f"budget, {budget:,.3g} MiB"
    memory.axhline(budget, color="#e5633c", linewidth=1.8, linestyle="--", label=label)
    memory.set_ylim(0, 1.3 * max(budget, float(anonymous.max())))
    swapped = np.array([record.swap_used_bytes for record in records]) / MIB
    used.fill_between(seconds, swapped, color="#b58cf0", alpha=0.55, linewidth=0)
    for name, colour, values in (
        ("read from swap", "#86c5e8", [record.read_bytes for record in records]),
        ("written to swap", "#e9b44c", [record.written_bytes for record in records]),
    ):
        middle, rate = rates(seconds, np.array(values) / MIB)
        traffic.plot(middle, rate, color=colour, linewidth=1.5, label=name)
        traffic.fill_between(middle, rate, color=colour, alpha=0.18, linewidth=0)
    titles = ("Memory, MiB", "Swap in use, MiB", "Swap traffic, MiB/s")
    for axes, title in zip((memory, used, traffic), titles, strict=True):
        dress(axes, title, records)
    name_phases(memory, records)
    used.set_ylim(bottom=0)
    traffic.set_ylim(bottom=0)
    traffic.set_xlabel("seconds", color=FAINT)
    figure.savefig(path, facecolor=PAPER)


def rates(
    seconds: NDArray[np.float64], totals: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the rise of a running total per second over some 120 even spans of time."""
    edges = np.linspace(seconds[0], seconds[-1], 121)
    rise = np.diff(np.interp(edges, seconds, totals)) / np.diff(edges)
    return (edges[:-1] + edges[1:]) / 2, rise


def phase_spans(records: list[Record]) -> list[tuple[str, float, float]]:
    """Return name, start and end in seconds of each phase, in order."""
    spans: list[tuple[str, float, float]] = []
    for record in records:
        if spans and spans[-1][0] == record.phase:
            spans[-1] = (record.phase, spans[-1][1], record.seconds)
        else:
            spans.append((record.phase, spans[-1][2] if spans else 0.0, record.seconds))
    return spans


def dress(axes: Axes, title: str, records: list[Record]) -> None:
    """Give a chart its title, colours and grid, and a line where each phase begins."""
    axes.set_title(title, color=INK, loc="left", size=12, weight="bold", pad=8)
    axes.set_facecolor(SEA)
    axes.tick_params(colors=FAINT)
    axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlim(0, records[-1].seconds)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for _, start, _ in phase_spans(records)[1:]:
        axes.axvline(start, color=INK, alpha=0.35, linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        style = {"labelcolor": FAINT, "frameon": False, "borderaxespad": 0.1}
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, **style)


def name_phases(axes: Axes, records: list[Record]) -> None:
    """Write the names of the phases that are wide enough over a chart."""
    style = {"color": FAINT, "size": 11, "ha": "center", "va": "top"}
    for name, start, end in phase_spans(records):
        if end - start > 0.04 * records[-1].seconds:
            middle = (start + end) / 2
            axes.text(middle, 0.95, name, style, transform=axes.get_xaxis_transform())


# The whole job.


def survey(pool: pyswap.Pool, plan: Plan, view: View) -> Survey:
    """Find, measure and draw the landmasses of a mask.

    Parameters
    ----------
    pool : pyswap.Pool
        Gives the two arrays: one byte and four bytes a cell.
    plan : Plan
        What to do.
    view : View
        Shows how it goes.

    Raises
    ------
    ValueError
        The mask is not what `Plan.source` says, or `Plan.every` does not divide it.
    WorkerError
        A worker failed or died.
    RuntimeError
        Land cells were lost or won between reading, labelling and numbering.
    """
    shape = rows, columns = mask_shape(plan)
    memory = pool.stats().memory_bytes
    with np.load(plan.source) as arrays:
        north_edges = arrays["lat"][:: plan.every]
    ground = Ground(
        pool,
        land=pool.empty(shape, dtype=np.bool_),
        labels=pool.empty(shape, dtype=np.int32),
        cell_km2=cell_areas(north_edges, columns),
        done=np.frombuffer(mmap.mmap(-1, 8 * (plan.workers + 1)), dtype=np.int64),
    )
    edges = [rows * band // plan.workers for band in range(plan.workers + 1)]
    spans = list(itertools.pairwise(edges))
    with Team(ground, plan.workers) as team:
        pids = {"parent": os.getpid()}
        pids.update((f"worker {n}", pid) for n, pid in enumerate(team.pids, start=1))
        with Monitor(pool, pids, ground, view) as monitor:
            landmasses = find_landmasses(plan, ground, team, monitor, spans)
            if plan.output is not None:
                plan.output.mkdir(parents=True, exist_ok=True)
                with monitor.phase("draw", map_scale(shape).height):
                    map_task = (draw_map, landmasses, plan.output / MAP_NAME)
                    chart_task = (draw_chart, monitor.records, memory, plan.output / CHART_NAME)
                    team.run([map_task, chart_task])
    return Survey(ground.labels, landmasses, monitor.peaks, monitor.records, monitor.seconds)


def find_landmasses(
    plan: Plan, ground: Ground, team: Team, monitor: Monitor, spans: list[tuple[int, int]]
) -> Landmasses:
    """Take the four steps; `spans` are the rows of each band, from north to south.

    Raises
    ------
    RuntimeError
        Land cells were lost or won on the way.
    """
    rows = len(ground.labels)
    with monitor.phase("read", rows):
        streamed = load_land(plan, ground)
    with monitor.phase("label", rows):
        bands = team.run([(label_band, *span, plan.block_rows) for span in spans])
    with monitor.phase("join", 0):
        tables, km2 = join_bands(ground.labels, bands)
    with monitor.phase("number", rows):
        tasks = [(renumber_band, *span, table) for span, table in zip(spans, tables, strict=True)]
        numbered = sum(team.run(tasks))
    labelled = sum(band.cells for band in bands)
    if not streamed == labelled == numbered:
        raise RuntimeError(
            f"land cells differ: {streamed} read, {labelled} labelled, {numbered} numbered"
        )
    return Landmasses(km2, find_places(ground.labels))


# What people see.


class LiveView:
    """A display that is drawn again for every record, for a terminal. Not thread-safe."""

    def __init__(self, console: Console, budget_bytes: int, limit_bytes: int) -> None:
        from rich.live import Live

        self._live = Live(console=console, auto_refresh=False)
        self._budget_bytes = budget_bytes
        self._limit_bytes = limit_bytes
        self._phases: dict[str, Record] = {}
        self._last: Record | None = None

    def show(self, record: Record, peaks: dict[str, int]) -> None:
        """Draw it."""
        self._phases[record.phase] = record
        self._live.update(self._draw(record, peaks), refresh=True)
        self._last = record

    def _draw(self, record: Record, peaks: dict[str, int]) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bars = Table.grid(padding=(0, 2))
        for name, title in PHASES.items():
            then = self._phases.get(name)
            done, total = (then.done, then.total) if then else (0, 0)
            ended = then is not None and name != record.phase
            share = 1.0 if ended else done / total if total else 0.0
            bars.add_row(
                f"[{'bold' if name == record.phase else 'dim'}]{title}",
                ProgressBar(total=1.0, completed=share, width=40),
                f"{share:4.0%}",
            )
        facts = Table.grid(padding=(0, 2))
        store = ProgressBar(total=self._budget_bytes, completed=record.store_bytes, width=40)
        facts.add_row(
            "page store", store, f"{mib(record.store_bytes)} of {mib(self._budget_bytes)}"
        )
        for name, text in self._facts(record, peaks):
            facts.add_row(name, text)
        return Group("", bars, "", facts)

    def _facts(self, record: Record, peaks: dict[str, int]) -> Iterator[tuple[str, str]]:
        before = self._last or record
        span = max(record.seconds - before.seconds, SAMPLE_SECONDS)
        reading = (record.read_bytes - before.read_bytes) / span
        writing = (record.written_bytes - before.written_bytes) / span
        yield "resident pages", f"{record.resident_pages:,}"
        yield "faults", faults(record)
        yield "swap in use", mib(record.swap_used_bytes)
        yield "read", f"{mib(record.read_bytes)}, {mib(reading)}/s"
        yield "written", f"{mib(record.written_bytes)}, {mib(writing)}/s"
        name = max(peaks, key=lambda process: peaks[process])
        yield "anonymous peak", f"{mib(peaks[name])} ({name}), limit {mib(self._limit_bytes)}"
        yield "time", f"{record.seconds:.0f} s"

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


class PlainView:
    """A line now and then, for where there is no terminal. Not thread-safe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: Record | None = None

    def show(self, record: Record, peaks: dict[str, int]) -> None:
        """Print a line when a phase begins, when it is done, and every few seconds."""
        del peaks
        shown = self._shown
        ends = record.total > 0 and record.done == record.total
        if (
            shown is not None
            and shown.phase == record.phase
            and record.seconds - shown.seconds < PLAIN_LINE_SECONDS
            and not (ends and shown.done < shown.total)
        ):
            return
        self._shown = record
        share = f"{record.done / record.total:4.0%}" if record.total else "    "
        line = (
            f"{record.seconds:6.1f} s  {record.phase:7}{share}"
            f"  page store {mib(record.store_bytes)}, swap {mib(record.swap_used_bytes)},"
            f" read {mib(record.read_bytes)}, written {mib(record.written_bytes)},"
            f" major faults {record.major_faults:,}"
        )
        self._console.print(line, soft_wrap=True, highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


def mib(size_bytes: float) -> str:
    """Return a size for people."""
    return f"{size_bytes / MIB:,.1f} MiB"


def faults(record: Record) -> str:
    """Return the counts of faults for people."""
    counts = (record.minor_faults, record.major_faults, record.write_faults)
    return "{:,} minor, {:,} major, {:,} write".format(*counts)


def report(console: Console, found: Survey, budget_bytes: int, limit_bytes: int) -> None:
    """Print the ten largest landmasses, and what finding them took."""
    from rich.table import Table

    landmasses, last = found.landmasses, found.records[-1]
    table = Table(
        title=f"The {TOP} largest of {len(landmasses):,} landmasses", title_justify="left"
    )
    table.add_column("", justify="right")
    table.add_column("landmass")
    table.add_column("area, km²", justify="right")
    table.add_column("of all land", justify="right")
    for number, name, km2 in landmasses.largest():
        table.add_row(str(number), name, f"{km2:,.0f}", f"{km2 / landmasses.km2.sum():.2%}")
    console.print(table)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("land", f"{landmasses.share:.2%} of the surface, {landmasses.km2.sum():,.0f} km²")
    store = max(record.store_bytes for record in found.records)
    facts.add_row("page store", f"{mib(store)} at most, of a budget of {mib(budget_bytes)}")
    facts.add_row("swap", f"{mib(last.read_bytes)} read, {mib(last.written_bytes)} written")
    facts.add_row("faults", faults(last))
    peaks = ", ".join(f"{name} {size / MIB:.1f}" for name, size in found.peaks.items())
    facts.add_row("anonymous", f"peak in MiB: {peaks}; limit {limit_bytes / MIB:.0f}")
    facts.add_row("time", f"{found.seconds:.1f} s")
    console.print(facts, soft_wrap=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--memory", default="256 MiB", help="the memory budget (default: %(default)s)")
    add("--swap", default="6 GiB", help="the size of the swap area (default: %(default)s)")
    add("--swap-path", help="folder or new file for it (default: the library's choice)")
    add("--page-size", type=int, help="bytes (default: the library's choice)")
    add("--workers", type=int, default=4, help="forked workers (default: %(default)s)")
    add("--block-rows", type=int, default=64, help="rows labelled at once (default: %(default)s)")
    add("--every", type=int, default=1, help="take every n-th cell each way (default: all)")
    add("--mask", type=Path, help="npz file with `mask` and `lat` (default: global-land-mask's)")
    add(
        "--anonymous-limit",
        type=float,
        default=250.0,
        metavar="MIB",
        help="fail if a process holds more anonymous memory (default: %(default)s)",
    )
    output = Path(__file__).parent / "output"
    add("--output", type=Path, default=output, help="folder for pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.workers, options.block_rows, options.every) < 1:
        parser.error("--workers, --block-rows and --every must be 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 1 if a process held too much anonymous memory, else 0."""
    from rich.console import Console

    options = parse(arguments)
    console = Console()
    plan = Plan(
        source=options.mask or mask_file(),
        every=options.every,
        workers=options.workers,
        block_rows=options.block_rows,
        output=options.output,
    )
    limit = int(options.anonymous_limit * MIB)
    with pyswap.Pool(
        options.memory, options.swap, swap_path=options.swap_path, page_size=options.page_size
    ) as pool:
        budget = pool.stats().memory_bytes
        terminal = console.is_terminal
        with LiveView(console, budget, limit) if terminal else PlainView(console) as view:
            found = survey(pool, plan, view)
        report(console, found, budget, limit)
    console.print(
        f"pictures: {options.output / MAP_NAME}, {options.output / CHART_NAME}", soft_wrap=True
    )
    over = [name for name, size in found.peaks.items() if size > limit]
    if over:
        console.print(f"over the limit of {mib(limit)} of anonymous memory: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())

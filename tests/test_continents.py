"""The landmass demo: the same code as the demo's, on every 8th cell and on small made masks."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.ndimage  # type: ignore[import-untyped]
from numpy.typing import NDArray

import pyswap

SCRIPT = Path(__file__).parent.parent / "examples" / "continents.py"
PAGE_SIZE = 4096
BUDGET = 128 * PAGE_SIZE
EIGHT = np.ones((3, 3))


def load_script() -> ModuleType:
    """Import the example under its own name, by which workers are sent its functions."""
    spec = importlib.util.spec_from_file_location("continents", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["continents"] = module
    spec.loader.exec_module(module)
    return module


continents = load_script()


class Silence:
    """A view that shows nothing."""

    def show(self, record: object, peaks: dict[str, int]) -> None:
        """Do nothing."""


def small_pool() -> pyswap.Pool:
    return pyswap.Pool(BUDGET, "128 MiB", page_size=PAGE_SIZE)


def write_mask(path: Path, land: NDArray[np.bool_]) -> Path:
    """Write land as a file like the one of global-land-mask, and return its path."""
    edges = 90.0 - 180.0 / len(land) * np.arange(len(land))
    np.savez_compressed(path, mask=~land, lat=edges)
    return path


def label_in_ram(land: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Label at once in memory, then join over the date line by following links one by one."""
    labels, count = scipy.ndimage.label(land, structure=EIGHT)
    leader = list(range(count + 1))

    def find(label: int) -> int:
        while leader[label] != label:
            label = leader[label]
        return label

    rows = len(land)
    for row in range(rows):
        for beside in range(max(row - 1, 0), min(row + 2, rows)):
            if land[row, -1] and land[beside, 0]:
                leader[find(int(labels[row, -1]))] = find(int(labels[beside, 0]))
    table = np.array([find(label) for label in range(count + 1)], dtype=np.int32)
    joined: NDArray[np.int32] = table[labels]
    return joined


def areas_in_ram(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the area of each label in km2, by the heights of the zones between parallels."""
    rows, columns = labels.shape
    sines = np.sin(np.linspace(np.pi / 2, -np.pi / 2, rows + 1))
    cells = 6371.0**2 * 2 * np.pi / columns * -np.diff(sines)
    areas = np.bincount(labels.ravel(), weights=np.repeat(cells, columns))
    return np.asarray(areas, dtype=np.float64)


def assert_same(survey: object, land: NDArray[np.bool_]) -> None:
    """Assert that a survey has the partition and areas that one labelling in memory has."""
    expected = label_in_ram(land)
    got = np.array(survey.labels)  # type: ignore[attr-defined]
    km2 = survey.landmasses.km2  # type: ignore[attr-defined]
    assert np.array_equal(got > 0, land)
    pairs = np.unique((got[land].astype(np.int64) << 32) | expected[land])
    numbers, labels = pairs >> 32, pairs & 0xFFFFFFFF
    assert np.array_equal(numbers, np.arange(1, len(km2)))
    assert len(np.unique(labels)) == len(labels) == len(np.unique(expected[land]))
    np.testing.assert_allclose(km2[numbers], areas_in_ram(expected)[labels], rtol=1e-9)
    assert km2[0] == 0
    assert np.all(np.diff(km2[1:]) <= 0)


def random_land(seed: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    print(f"seed {seed}")
    land = np.random.default_rng(seed).random(shape) < 0.35
    return np.asarray(land)


def test_do_128_small_pages_give_the_partition_of_every_8th_cell_that_memory_gives() -> None:
    plan = continents.Plan(source=continents.mask_file(), every=8, block_rows=4)
    with small_pool() as pool:
        survey = continents.survey(pool, plan, Silence())
        with np.load(plan.source) as arrays:
            land = ~arrays["mask"][::8, ::8]
        assert_same(survey, land)
        last = survey.records[-1]
        assert max(record.store_bytes for record in survey.records) <= BUDGET
        assert last.written_bytes > 4 * BUDGET
        assert last.read_bytes > 4 * BUDGET
    assert set(survey.peaks) == {"parent", *(f"worker {n}" for n in range(1, 5)), "swapper"}
    assert min(survey.peaks.values()) > 0
    assert survey.landmasses.name(1) == "Eurasia and Africa"
    assert survey.landmasses.name(2) == "North America and South America"
    assert 0.28 < survey.landmasses.share < 0.30


@pytest.mark.parametrize(
    ("seed", "workers", "block_rows", "every"),
    [(1, 1, 64, 1), (2, 4, 1, 1), (3, 3, 5, 1), (4, 4, 7, 2), (5, 2, 3, 3)],
)
def test_are_labels_joined_over_every_seam(
    tmp_path: Path, seed: int, workers: int, block_rows: int, every: int
) -> None:
    land = random_land(seed, (60, 90))
    source = write_mask(tmp_path / "mask.npz", land)
    plan = continents.Plan(source, every=every, workers=workers, block_rows=block_rows)
    with small_pool() as pool:
        survey = continents.survey(pool, plan, Silence())
        assert_same(survey, land[::every, ::every])


@pytest.mark.parametrize(
    ("west", "east", "landmasses"), [(3, 3, 1), (3, 4, 1), (4, 3, 1), (3, 5, 2), (5, 3, 2)]
)
@pytest.mark.parametrize("block_rows", [1, 4, 8])
def test_do_neighbours_over_the_date_line_make_one_landmass(
    tmp_path: Path, west: int, east: int, landmasses: int, block_rows: int
) -> None:
    # With bands of four rows, the diagonals between rows 3 and 4 also cross a seam of bands.
    land = np.zeros((8, 16), dtype=bool)
    land[west, 0] = land[east, -1] = True
    plan = continents.Plan(
        write_mask(tmp_path / "mask.npz", land), workers=2, block_rows=block_rows
    )
    with small_pool() as pool:
        survey = continents.survey(pool, plan, Silence())
        assert len(survey.landmasses) == landmasses


def test_do_the_areas_of_all_cells_add_up_to_the_sphere() -> None:
    edges = 90.0 - 180.0 / 50 * np.arange(50)
    total = continents.cell_areas(edges, 100).sum() * 100
    assert total == pytest.approx(4 * np.pi * 6371.0**2, rel=1e-12)


def test_is_a_mask_without_land_no_landmass(tmp_path: Path) -> None:
    source = write_mask(tmp_path / "mask.npz", np.zeros((8, 16), dtype=bool))
    with small_pool() as pool:
        survey = continents.survey(pool, continents.Plan(source), Silence())
        assert not np.array(survey.labels).any()
    assert len(survey.landmasses) == 0
    assert survey.landmasses.largest() == []


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--swap", "64 MiB", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_does_the_command_report_and_draw_two_pictures(tmp_path: Path) -> None:
    done = run_script("--every", "24", "--memory", "8 MiB", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Eurasia and Africa" in done.stdout
    assert "% of the surface" in done.stdout
    for process in ("parent", "worker 1", "worker 4", "swapper"):
        assert process in done.stdout
    assert "\x1b" not in done.stdout
    width, height = png_size(tmp_path / "landmasses.png")
    assert width == 1800
    assert 900 < height < 1200
    assert png_size(tmp_path / "memory.png") == (1440, 1080)


def test_does_too_much_anonymous_memory_fail_the_command(tmp_path: Path) -> None:
    source = write_mask(tmp_path / "mask.npz", random_land(6, (36, 72)))
    options = ("--mask", str(source), "--output", str(tmp_path), "--memory", "8 MiB")
    assert run_script(*options).returncode == 0
    failed = run_script(*options, "--anonymous-limit", "1")
    assert failed.returncode == 1
    assert "over the limit" in failed.stdout
    assert "worker 4" in failed.stdout.rpartition("over the limit")[2]


@pytest.mark.parametrize(
    ("mask", "every", "complaint"),
    [
        (np.ones((6, 8), dtype=bool), 4, "does not divide"),
        (np.ones(8, dtype=bool), 1, "two dimensions"),
        (np.ones((6, 8), dtype=np.int16), 1, "not a C-ordered array of bool"),
        (np.asfortranarray(np.ones((6, 8), dtype=bool)), 1, "not a C-ordered array of bool"),
        (np.ones((3, 8), dtype=bool), 1, "too many"),
    ],
)
def test_is_a_mask_that_does_not_fit_refused(
    tmp_path: Path, mask: NDArray[np.generic], every: int, complaint: str
) -> None:
    np.savez(tmp_path / "mask.npz", mask=mask, lat=np.arange(8.0))
    plan = continents.Plan(tmp_path / "mask.npz", every=every)
    with small_pool() as pool, pytest.raises(ValueError, match=complaint):
        continents.survey(pool, plan, Silence())


def test_is_a_mask_that_ends_early_refused(tmp_path: Path) -> None:
    whole = write_mask(tmp_path / "whole.npz", np.ones((8, 16), dtype=bool))
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(tmp_path / "mask.npz", "w") as target,
    ):
        target.writestr("mask.npy", source.read("mask.npy")[:-5])
        target.writestr("lat.npy", source.read("lat.npy"))
    plan = continents.Plan(tmp_path / "mask.npz")
    with small_pool() as pool, pytest.raises(ValueError, match="ends within rows"):
        continents.survey(pool, plan, Silence())


def test_are_lost_cells_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_mask(tmp_path / "mask.npz", random_land(7, (12, 24)))
    load_land = continents.load_land
    monkeypatch.setattr(continents, "load_land", lambda *what: load_land(*what) + 1)
    with small_pool() as pool, pytest.raises(RuntimeError, match="land cells differ"):
        continents.survey(pool, continents.Plan(source), Silence())


def test_does_a_view_that_fails_in_the_monitor_fail_what_it_monitors() -> None:
    class Broken:
        def show(self, record: object, peaks: dict[str, int]) -> None:
            shown.set()
            raise LookupError("broken view")

    shown = threading.Event()
    with (
        small_pool() as pool,
        pytest.raises(LookupError, match="broken view"),
        continents.Monitor(pool, {"parent": os.getpid()}, small_ground(), Broken()),
    ):
        assert shown.wait(60)


def test_are_records_thinned_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        count = 0

        def show(self, record: object, peaks: dict[str, int]) -> None:
            self.count += 1
            if self.count == 20:
                enough.set()

    enough = threading.Event()
    monkeypatch.setattr(continents, "RECORDS_LIMIT", 8)
    monkeypatch.setattr(continents, "SAMPLE_SECONDS", 0.001)
    ground = small_ground()
    with small_pool() as pool:
        with continents.Monitor(pool, {"parent": os.getpid()}, ground, Counting()) as monitor:
            assert enough.wait(60)
        times = [record.seconds for record in monitor.records]
    assert len(times) < 8
    assert times == sorted(times)


def small_ground() -> object:
    """Make a ground for what takes no page from a pool."""
    land = np.zeros((4, 4), dtype=bool)
    done = np.zeros(3, dtype=np.int64)
    return continents.Ground(None, land, land.astype(np.int32), np.ones(4), done)


def die(ground: object, worker: int) -> None:
    os._exit(3)


def fail(ground: object, worker: int, text: str) -> None:
    raise LookupError(text)


def double(ground: object, worker: int, number: int) -> int:
    return 2 * number


def test_does_a_team_return_results_in_the_order_of_its_tasks() -> None:
    with continents.Team(small_ground(), 2) as team:
        assert team.run([(double, number) for number in range(7)]) == [0, 2, 4, 6, 8, 10, 12]


def test_is_a_failure_in_a_worker_raised_with_its_traceback() -> None:
    with (
        pytest.raises(continents.WorkerError, match=r"(?s)failed:.*LookupError: no such thing"),
        continents.Team(small_ground(), 2) as team,
    ):
        team.run([(fail, "no such thing")])


def test_is_the_death_of_a_worker_raised_with_its_exit_code() -> None:
    with (
        pytest.raises(continents.WorkerError, match=r"worker 1 .* died, exit code 3"),
        continents.Team(small_ground(), 2) as team,
    ):
        team.run([(die,)])


def test_do_rates_keep_the_total() -> None:
    seconds = np.array([0.0, 0.5, 0.6, 2.0, 4.0])
    totals = np.array([0.0, 10.0, 10.0, 50.0, 64.0])
    middle, rate = continents.rates(seconds, totals)
    assert rate.sum() * (middle[1] - middle[0]) == pytest.approx(64.0)

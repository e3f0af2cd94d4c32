"""The what-if example: the same code, on a small made mask."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyswap

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS, COLUMNS = 200, 512
PAGE_SIZE = 4096


@pytest.fixture
def what_if(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "what_if", raising=False)
    import what_if

    return what_if


@pytest.fixture
def mask(tmp_path: Path, seed: int) -> Path:
    sea = np.random.default_rng(seed).random((ROWS, COLUMNS)) < 0.5
    edges = 90.0 - 180.0 / ROWS * np.arange(ROWS)
    np.savez_compressed(tmp_path / "mask.npz", mask=sea, lat=edges)
    return tmp_path / "mask.npz"


def test_is_each_childs_flood_its_own(what_if: Any, mask: Path) -> None:
    # 100 pages of areas in a quarter of the memory they need would be fewer than 128 frames.
    with pyswap.Pool(128 * PAGE_SIZE, "16 MiB", page_size=PAGE_SIZE) as pool:
        asked = what_if.ask(pool, mask, 1)
        areas, north = what_if.load_areas(mask, 1, pool)
        plain, expected = np.array(areas), []
        for child in range(what_if.CHILDREN):
            flooded = plain.copy()
            expected.append(what_if.flood(flooded, north, child))
        assert [each.south for each in asked.answers] == [each.south for each in expected]
        for got, wanted in zip(asked.answers, expected, strict=True):
            assert got.left_km2 == pytest.approx(wanted.left_km2)
            assert got.lost_km2 + got.left_km2 == pytest.approx(asked.total_km2)
        copies = asked.during.cow_copies - asked.before.cow_copies
        band = ROWS // what_if.SHARE * COLUMNS * 4 // PAGE_SIZE
        # What a stream copies ahead is no more than what it has written.
        assert what_if.CHILDREN * band <= copies <= what_if.CHILDREN * 2 * (band + 2)


def test_does_the_command_print_its_cost(
    what_if: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sea = np.zeros((1024, 2048), np.bool_)
    np.savez_compressed(tmp_path / "mask.npz", mask=sea, lat=90 - 180 / 1024 * np.arange(1024))
    arguments = ["--every", "1", "--mask", str(tmp_path / "mask.npz"), "--page-size", "4096"]
    assert what_if.main(arguments) == 0
    out = capsys.readouterr().out
    told = re.search(
        r"memory: 2\.0 MiB for parent and 8 children, an array of 8\.0 MiB; [\d.]+ s\n"
        r"copies: ([\d.]+) MiB, where 8 full copies are 64\.0 MiB\n"
        r"swap traffic: ([\d.]+) MiB written, ([\d.]+) MiB read, "
        r"where every child reads 8\.0 MiB, 64\.0 MiB in all\n",
        out,
    )
    assert told, out
    copied, written, read = map(float, told.groups())
    # Eight children change a twentieth each, and nobody copies the rest.
    assert 8 * 8 / 20 * 0.95 <= copied <= 2 * 8 * 8 / 20
    # What is flooded is zeros, which need no room in swap.
    assert written < copied
    # The array does not fit.  Pages that one child had read in are there for the others, if these
    # are not far behind; on a busy machine they are, and some pages come more than once.
    assert 6 < read < 2 * 64

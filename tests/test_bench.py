"""The bench runs, checks what it computes, and leaves the machine as it was."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.applications import DAMPING, ROUNDS, write_graph
from bench.cgroup import parents
from bench.forks import CHILDREN
from bench.graph import Graph
from bench.peers import PEERS
from bench.plan import Plan
from bench.rows import SUBJECTS, peers_of, rows
from bench.runner import RunKilledError, Runner
from bench.share import Array, Share, WrongResultError
from bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
PAGE_CLUSTER = Path("/proc/sys/vm/page-cluster")
WAIT_S = 60.0
POLL_S = 0.01


def command(folder: Path, *arguments: str) -> list[str]:
    """The bench, with its swap files and reports in `folder`."""
    for module in ("click", "matplotlib", "rich"):
        pytest.importorskip(module, reason="the bench needs its packages")
    (folder / "results").mkdir()
    (folder / "swap").mkdir()
    places = ["--folder", str(folder / "swap"), "--results", str(folder / "results")]
    return [sys.executable, "-m", "bench", *places, *arguments]


def plan_of(workload: str) -> Plan:
    return Plan(
        workload=workload,
        peer="",
        budget_bytes=1 << 20,
        array_bytes=8 << 20,
        swap_bytes=8 << 20,
        operations=512,
        repeats=1,
        most_seconds=1.0,
        seed=1,
        folder="",
        area="",
        native="",
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_does_the_quick_bench_check_every_workload(tmp_path: Path) -> None:
    told = subprocess.run(
        command(tmp_path, "--quick"), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert told.returncode == 0, told.stdout + told.stderr
    report = json.loads((tmp_path / "results" / "quick.json").read_text())
    runs: dict[str, dict[str, list[dict[str, Any]]]] = report["runs"]
    assert set(runs) == set(SUBJECTS)
    assert all("pyswap" in by_peer for by_peer in runs.values())
    for workload in WORKLOADS:
        (run,) = runs[workload]["pyswap"]
        assert run["units"] > 0
        assert run["totals"]["slot_reads"] > 0, workload
        assert run["totals"]["evictions"] > 0, workload
        assert run["totals"]["memory_bytes"] <= report["plan"]["budget_bytes"]
        assert run["counters"]["minor_faults"] + run["counters"]["major_faults"] > 0, workload
    for name in ("forks-read", "forks-write"):
        (run,) = runs[name]["pyswap"]
        assert run["counters"]["minor_faults"] >= CHILDREN
    (run,) = runs["scale"]["pyswap"]
    assert all(run[which][cost] > 0 for which in ("alone", "space") for cost in run["alone"])
    has_compiler = importlib.util.find_spec("Cython") is not None
    assert bool(runs["minor-fault"].get("userfaultfd")) == has_compiler
    assert "rows met / rows printed" in told.stdout
    assert sorted(path.suffix for path in (tmp_path / "results").iterdir()) == [
        ".json",
        ".png",
        ".png",
    ]
    assert not list((tmp_path / "swap").iterdir())


# A word of PageRank's array may be no edge: what a wrong edge changes is asked below.
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "pagerank"])
def test_does_a_workload_notice_a_wrong_word(name: str, seed: int) -> None:
    import numpy as np

    workload, plan = WORKLOADS[name], plan_of(name)
    shape, dtype = workload.shape(plan)
    a: Array = np.zeros(shape, dtype)
    share = Share(plan, 0, 1)
    if workload.prepare is not None:
        workload.prepare(a, share)()
    if workload.verify is None:
        # What the timed part reads is what it checks: spoil a column that all reads pass.
        a[np.random.default_rng(seed).integers(0, 2) :: 2, 0] += 7
        a[:, 2:4] += 7 if name == "column-major" else 0
        with pytest.raises(WrongResultError):
            workload.work(a, share)()
        return
    if not workload.is_private:
        workload.work(a, share)()
    workload.verify(a, share)
    a[..., 5:] += 7
    with pytest.raises(WrongResultError):
        workload.verify(a, share)


def test_does_a_writer_of_a_copy_notice_a_wrong_row() -> None:
    import numpy as np

    workload, plan = WORKLOADS["copy-storm"], plan_of("copy-storm")
    assert workload.prepare
    shape, dtype = workload.shape(plan)
    a: Array = np.zeros(shape, dtype)
    share = Share(plan, 1, 4)
    workload.prepare(a, share)()
    workload.work(a, share)()
    a[: len(a) // 8, 0] += 7
    with pytest.raises(WrongResultError):
        workload.work(a, share)()


def test_are_ranks_those_of_the_matrix_and_a_wrong_edge_noticed(tmp_path: Path) -> None:
    import numpy as np

    plan = dataclasses.replace(plan_of("pagerank"), array_bytes=1 << 18)
    plan = dataclasses.replace(plan, graph=str(tmp_path / "graph"))
    write_graph(plan, Path(plan.graph))
    workload, share = WORKLOADS["pagerank"], Share(plan, 0, 1)
    assert workload.prepare
    assert workload.verify
    shape, dtype = workload.shape(plan)
    a: Array = np.zeros(shape, dtype)
    workload.prepare(a, share)()
    workload.work(a, share)()
    workload.verify(a, share)
    graph = Graph(a)
    n = graph.count
    matrix = np.zeros((n, n))
    edges = np.diff(graph.starts)
    np.add.at(matrix, (np.repeat(np.arange(n), edges), graph.sources[: graph.starts[-1]]), 1.0)
    # The first vertices of an R-MAT graph have more edges than the last.
    assert edges[: n // 4].sum() > 5 * edges[-n // 4 :].sum()
    leaving = matrix.sum(axis=0)
    matrix = np.where(leaving > 0, matrix / np.maximum(leaving, 1), 1.0 / n)
    ranks = np.full(n, 1.0 / n)
    for _ in range(ROUNDS):
        ranks = (1 - DAMPING) / n + DAMPING * matrix @ ranks
    assert np.allclose(graph.ranks, ranks)
    graph.sources[: n // 8] = 0
    workload.work(a, share)()
    with pytest.raises(WrongResultError):
        workload.verify(a, share)


def test_does_memopro_hold_what_compresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("memopro")
    monkeypatch.setattr(PEERS["memopro"], "limits_memory", False)
    # It pages arrays of 16 MiB and more.
    plan = dataclasses.replace(
        plan_of(""), budget_bytes=8 << 20, array_bytes=32 << 20, folder=str(tmp_path)
    )
    runner = Runner(plan, lambda what: None)
    runner.measure("sequential-modify-compressible", ["memopro"], 1)
    assert not runner.failures
    (run,) = runner.results["sequential-modify-compressible"]["memopro"]
    assert run["counters"]["restores"] > 0


def test_are_rows_chosen_by_their_names() -> None:
    testing = pytest.importorskip("click.testing")
    pytest.importorskip("matplotlib")
    from bench.__main__ import main

    told = testing.CliRunner().invoke(main, ["--rows", "sequential-read,nothing"])
    assert told.exit_code == 2
    assert "nothing is none of kernels, sequential-read" in told.output
    assert peers_of("forks-read", ("pyswap", "pyswap-16k")) == ["pyswap", "pyswap-16k"]
    assert peers_of("scale", ("pyswap-16k",)) == []


def test_is_a_run_tried_again_that_the_kernel_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Exception | None] = [RunKilledError("1"), RunKilledError("2"), None]

    def run(self: Runner, peer: object, plan: Plan) -> dict[str, Any]:
        error = outcomes.pop(0)
        if error:
            raise error
        return {"rate": 1.0}

    monkeypatch.setattr(Runner, "_run", run)
    monkeypatch.setattr(Runner, "_can_run", lambda self, peer: True)
    runner = Runner(plan_of(""), lambda what: None)
    runner.measure("zipf-4", ["kernel-swap-3"], 1)
    assert runner.failures == {"zipf-4": {"kernel-swap-3": ["1", "2"]}}
    assert runner.results == {"zipf-4": {"kernel-swap-3": [{"rate": 1.0}]}}
    outcomes = [RunKilledError("1"), None]
    runner.measure("zipf-4", ["memmap"], 1)
    assert len(outcomes) == 1


def test_is_a_row_met_by_the_better_of_two_peers() -> None:
    def runs(rate: float) -> list[dict[str, Any]]:
        return [{"rate": rate * k} for k in (0.5, 1.0, 3.0)]

    plan = plan_of("random-read-1")
    results = {
        "random-read-1": {
            "pyswap": runs(10.0),
            "kernel-swap-3": runs(8.0),
            "kernel-swap-5": runs(11.0),
        }
    }
    (counted,), shown = rows(results, {}, plan)
    assert counted.theirs is not None
    assert counted.theirs.median == 11.0
    assert (counted.theirs.least, counted.theirs.most) == (5.5, 33.0)
    assert counted.is_met is False
    assert [row.theirs.median for row in shown if row.theirs] == [8.0]
    results["random-read-1"]["kernel-swap-5"] = runs(9.0)
    assert rows(results, {}, plan)[0][0].is_met is True


def until(predicate: Callable[[], object]) -> bool:
    """Wait for something, for WAIT_S at most; tell whether it came."""
    deadline = time.monotonic() + WAIT_S
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_is_swap_off_again_after_an_interrupt(
    tmp_path: Path, require: Callable[[str], None], number: signal.Signals
) -> None:
    require("root")
    require("memcg")
    before = PAGE_CLUSTER.read_text()
    area = str(tmp_path / "swap" / "pyswap-bench-")
    only = ["--rows", "sequential-modify", "--peers", "kernel-swap-5"]
    bench = subprocess.Popen(
        command(tmp_path, "--budget", "16 MiB", "--runs", "1000", *only),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )

    def is_swapping() -> bool:
        return area in Path("/proc/swaps").read_text()

    try:
        assert until(lambda: is_swapping() or bench.poll() is not None)
        if bench.poll() is not None and "cannot be set up" in bench.communicate()[0]:
            pytest.skip("this machine cannot swap to a file here")
        bench.send_signal(number)
        told = bench.communicate(timeout=WAIT_S)[0]
        assert bench.returncode not in (0, None), told
        assert "rows met / rows printed" in told
    finally:
        if bench.poll() is None:
            bench.kill()
            bench.wait()
        if bench.stdout:
            bench.stdout.close()
    assert not is_swapping()
    assert PAGE_CLUSTER.read_text() == before
    assert not list((tmp_path / "swap").iterdir())
    assert not [path for path, _ in parents() if (path / f"pyswap-bench-{bench.pid}").exists()]


def test_does_a_run_that_fails_leave_the_others(tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_of("sequential-modify"), folder=str(tmp_path))
    runner = Runner(plan, lambda what: None)
    # There are no helpers to load: the limit fails, and what is not about it goes on.
    runner.plan = dataclasses.replace(plan, native="/nowhere.so")
    runner.measure("sequential-read", ["device-read"], 1)
    runner.measure("sequential-modify", ["numpy-4k"], 1)
    assert len(runner.failures["sequential-read"]["device-read"]) == 1
    assert len(runner.results["sequential-modify"]["numpy-4k"]) == 1


def test_is_a_runs_peak_its_own_and_not_of_who_started_it(tmp_path: Path) -> None:
    import numpy as np

    large = np.ones(64 << 20, np.float64)
    plan = dataclasses.replace(plan_of("sequential-modify"), folder=str(tmp_path))
    runner = Runner(plan, lambda what: None)
    runner.measure("sequential-modify", ["numpy-4k"], 1)
    (run,) = runner.results["sequential-modify"]["numpy-4k"]
    assert 0 < run["peak_bytes"] < large.nbytes


def test_is_a_row_whose_peers_all_failed_printed_and_not_met() -> None:
    results = {"zipf-4": {"pyswap": [{"rate": 5.0}]}}
    failures = {"zipf-4": {"kernel-swap-3": ["killed"]}}
    (row,), _ = rows(results, failures, plan_of("zipf-4"))
    assert "all failed" in row.against
    assert row.is_met is False
    assert not rows(results, {}, plan_of("zipf-4"))[0]


def test_is_a_row_that_pyswap_failed_printed_and_not_met() -> None:
    results = {"zipf-4": {"kernel-swap-3": [{"rate": 5.0}]}}
    (row,), _ = rows(results, {"zipf-4": {"pyswap": ["wrong"]}}, plan_of("zipf-4"))
    assert row.ours is None
    assert row.is_met is False

"""Are pages kept that will be wanted again, on traces whose hit rates are known?"""

from __future__ import annotations

import numpy as np
import pytest

from bench.policy import FRAMES, Trace, fifo, lru, replay, traces


@pytest.mark.parametrize("number", range(len(list(traces(64, 0)))))
def test_are_hits_never_two_points_fewer_than_with_fifo(number: int, seed: int) -> None:
    trace = list(traces(FRAMES, seed))[number]
    ours = replay(trace, FRAMES)
    simple = fifo(trace, FRAMES)
    print(f"{trace.name}: {ours.rate:.3f}, FIFO {simple:.3f}, {ours.faults} major faults")
    assert ours.faults > 0
    assert ours.rate >= simple - 0.02


def test_does_what_is_in_use_survive_a_scan_of_ten_times_the_memory(seed: int) -> None:
    trace = next(iter(traces(FRAMES, seed)))
    ours = replay(trace, FRAMES)
    assert ours.faults > trace.scanned
    assert ours.rate >= 0.9
    assert ours.survived >= 0.9


def test_does_a_loop_over_a_little_more_than_fits_keep_half_of_it(seed: int) -> None:
    trace = next(t for t in traces(FRAMES, seed) if "loop" in t.name)
    assert fifo(trace, FRAMES) == 0
    assert replay(trace, FRAMES).rate >= 0.4


def test_do_simulations_agree_with_counting_by_hand() -> None:
    trace = Trace("by hand", np.array([0, 1, 2, 0, 3, 0, 1]), 0)
    assert fifo(trace, 3) == pytest.approx(1 / 7)
    assert lru(trace, 3) == pytest.approx(2 / 7)

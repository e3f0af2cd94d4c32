"""Run the random tests again and again, each time with a fresh seed: `make soak MINUTES=30`.

A round that fails ends the soak and shows its log and its seed, with which it is run again:
PYSWAP_SEED=... pytest ...
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Tests that take a seed, of workers that are killed, stopped and forked while pages are evicted.
TESTS = (
    "tests/test_death.py::test_are_all_counts_right_when_workers_are_killed_and_stopped_at_random",
    "tests/test_private_copies.py::test_lose_threads_nothing_while_their_pages_are_copied",
    "tests/test_private_copies.py::test_is_a_childs_array_still_while_the_parents_threads_write",
    "tests/test_private_copies.py::test_does_a_worker_that_dies_while_it_writes_leave_nothing",
    "tests/test_private_forks.py::test_may_threads_fork_while_others_write_and_pages_are_evicted",
    "tests/test_stateful.py",
    "tests/test_stress.py",
)


def one_round(seed: int, engine: str) -> tuple[int, str]:
    """Run every test once; its status and its log."""
    there = [test for test in TESTS if (ROOT / test.split("::")[0]).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rP", "-p", "no:cacheprovider"]
    told = subprocess.run(
        [*command, "--timeout=600", "--timeout-method=thread", *there],
        cwd=ROOT,
        env={**os.environ, "PYSWAP_SEED": str(seed), "PYSWAP_ENGINE": engine},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return told.returncode, told.stdout


def counted(log: str, word: str) -> int:
    """Add up what the tests of a round printed of a thing: "14,000 evictions", say."""
    return sum(
        int(n.replace(",", "")) for n in re.findall(rf"([\d,]+) (?:\w+ )?{word}", log) if n != ","
    )


def main() -> int:
    """Soak for some minutes; 1 where a round failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    end = time.monotonic() + minutes * 60
    rounds, evictions, faults = 0, 0, 0
    while time.monotonic() < end:
        seed = random.SystemRandom().getrandbits(32)
        engine = ("release", "debug")[rounds % 2]
        status, log = one_round(seed, engine)
        if status:
            print(log)
            print(f"soak: round {rounds + 1} failed: PYSWAP_SEED={seed} PYSWAP_ENGINE={engine}")
            return 1
        rounds += 1
        evictions += counted(log, "evictions")
        faults += counted(log, "faults")
        print(f"round {rounds}: PYSWAP_SEED={seed}, {engine}: {log.splitlines()[-1]}", flush=True)
    print(f"soak: {rounds} rounds in {minutes:g} minutes, {faults} faults, {evictions} evictions")
    return 0


if __name__ == "__main__":
    sys.exit(main())

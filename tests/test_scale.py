"""Does what a unit costs stay the same where there are many: pages, arrays, processes, forks?

Costs are counted in system calls, of all processes together, and in faults. Times are printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from counting import counting  # noqa: F401 - a fixture.

from pyswap.objects import Objects

BEGIN = """
import json, mmap, os, struct, sys, time
import numpy as np
import pyswap

with open(os.environ["CALLS_FILE"], "r+b") as file:
    calls = mmap.mmap(file.fileno(), 4096)
count = int(sys.argv[1])
pool = pyswap.Pool("32 MiB", "64 MiB", page_size=int(sys.argv[2]), overcommit=True)
numbers = pool._control().numbers

def now():
    text = open(f"/proc/{pool.swapper_pid}/stat").read().rsplit(")", 1)[1].split()
    faults = sum(numbers()[name] for name in ("minor_faults", "major_faults", "zero_fills"))
    return (struct.unpack("q", calls[:8])[0], faults, int(text[11]) + int(text[12]),
            time.monotonic())

def alone():
    deadline = time.monotonic() + 60
    while len(pool._control().workers()) > 1 or numbers()["committed_pages"] > committed:
        assert time.monotonic() < deadline, "what was made is not gone"
        time.sleep(0.0005)

def forked(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid

def ended(pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
"""

END = """
after = now()
pool.check()
print(json.dumps([b - a for a, b in zip(before, after)]))
"""

PROGRAMS = {
    # Its page table alone has 8 bytes for each page.
    "pages of a 4 TiB array": """
a = pool.zeros(1 << 42, np.uint8)
places = (np.arange(count) * ((1 << 42) // count)).tolist()
before = now()
for place in places:
    a[place] = 1
assert all(a[place] == 1 for place in places)
""",
    "pages of a 4 TiB array, one after the other in memory": """
a = pool.zeros(1 << 42, np.uint8)
places = (np.arange(count) * ((1 << 42) // count)).tolist()
before = now()
for place in places:
    assert a[place] == 0
""",
    "arrays": """
committed = 0
before = now()
arrays = [pool.zeros(4000, np.uint8) for _ in range(count)]
for a in arrays:
    a[0] = 1
assert all(a[0] == 1 for a in arrays)
del a
arrays.clear()
alone()
""",
    "private arrays of two processes": """
committed = 0
before = now()
arrays = [pool.zeros(4000, np.uint8, private=True) for _ in range(count)]
for a in arrays:
    a[0] = 1
def work():
    for a in arrays:
        a[0] += 1
    assert all(a[0] == 2 for a in arrays)
ended([forked(work)])
assert all(a[0] == 1 for a in arrays)
for a in arrays:
    a[0] = 3
del a
arrays.clear()
alone()
""",
    "workers": """
a = pool.zeros((64, 4096), np.uint8)
committed = 64
a[:, 0] = 1
before = now()
ready, go = os.pipe(), os.pipe()
def work():
    assert a[:, 0].sum() == 64
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    a[:, 1] = 1
pids = [forked(work) for _ in range(count)]
got = 0
while got < count:
    got += len(os.read(ready[0], count))
assert len(pool._control().workers()) == count + 1
os.write(go[1], b"x" * count)
ended(pids)
alone()
""",
    "forks": """
a = pool.zeros((64, 4096), np.uint8, private=True)
committed = 64
a[:, 0] = 1
before = now()
def work():
    a[1, 0] += 1
    assert a[:, 0].sum() == 65
for _ in range(count):
    ended([forked(work)])
alone()
""",
}
COUNTS = {
    "pages of a 4 TiB array": (40, 400),
    "pages of a 4 TiB array, one after the other in memory": (800, 8000),
    "arrays": (100, 1000),
    "private arrays of two processes": (100, 1000),
    "workers": (6, 64),
    "forks": (20, 200),
}


def cost(environment: dict[str, str], program: str, count: int) -> tuple[float, float]:
    """System calls and faults for each of so many; tells times, too."""
    arguments = [str(count), "65536" if "TiB" in program else "4096"]
    told = subprocess.run(
        [sys.executable, "-c", BEGIN + PROGRAMS[program] + END, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    calls, faults, ticks, seconds = json.loads(told.stdout)
    print(
        f"{count} {program}: each {calls / count:.1f} calls, {faults / count:.2f} faults, "
        f"{seconds / count * 1e6:.0f} us; the swapper's CPU {ticks / count * 1e4:.0f} us"
    )
    return calls / count, faults / count


@pytest.mark.parametrize("program", PROGRAMS)
def test_does_a_unit_cost_the_same_among_ten_times_as_many(
    counting: dict[str, str],  # noqa: F811 - the fixture.
    program: str,
) -> None:
    few, many = COUNTS[program]
    few_calls, few_faults = cost(counting, program, few)
    many_calls, many_faults = cost(counting, program, many)
    assert few_calls > 0
    assert many_calls <= 1.25 * few_calls + 2
    assert many_faults <= 1.25 * few_faults + 1


class CountedTables:
    """Stands in for the tables, and counts what is asked of them."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers = {"commit": True, "families_unswept": [], "family_trim": None, "clones": 0}

        def call(*_: object, **__: object) -> Any:
            self.calls += 1
            return answers.get(name, 0)

        return call


def calls_of_a_life(count: int) -> tuple[float, float]:
    """What so many private arrays that were forked cost each, and a request beside them."""
    tables: Any = CountedTables()
    vault: Any = CountedTables()
    objects = Objects(tables, vault, 4096, 1 << 32)
    regions = []
    for i in range(count):
        o = objects.create(4096, "", private=True)
        regions.append(objects.map(0, o, (i + 1) << 20))
    for child in objects.promise(1, regions).values():
        objects.drop(child)
    objects.sweep()
    before = tables.calls
    for _ in range(10):
        objects.sweep()
    beside = (tables.calls - before) / 10
    objects.unmap(regions)
    assert not objects.live
    return tables.calls / count, beside


def test_does_the_swapper_look_at_every_array_for_each_request() -> None:
    few, beside_few = calls_of_a_life(50)
    many, beside_many = calls_of_a_life(500)
    print(f"{few:.1f} and {many:.1f} calls for each array, {beside_few} and {beside_many} beside")
    assert beside_few == beside_many
    assert many <= few

"""Is there one default pool for a program and its children, and is it made as was said?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyswap

HEAD = """
import multiprocessing, os, sys
import numpy as np
import pyswap

def of_a_program_that_it_starts():
    import subprocess
    where()
    code = "import pyswap; print(pyswap.default_pool().swapper_pid)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)

def where(_=None):
    a = pyswap.ones(10)
    return pyswap.default_pool().swapper_pid, a

if __name__ == "__main__":
"""


def run(tmp_path: Path, *lines: str, **environment: str) -> str:
    """Run a program whose main part is given, in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(HEAD + "".join(f"    {line}\n" for line in lines))
    told = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYSWAP_MEMORY": "8 MiB", "PYSWAP_SWAP": "16 MiB", **environment},
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    return told.stdout


def test_is_it_made_by_what_the_environment_says(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        "assert 'PYSWAP_POOL' not in os.environ",
        "a = pyswap.zeros((3, 4), 'i2', 'F')",
        "pool = pyswap.default_pool()",
        "assert type(a) is pyswap.PagedArray and a.flags.f_contiguous",
        "print(pool.memory, pool.stats().swap_bytes)",
        "print([str(area.path) for area in pool.swaps()])",
        PYSWAP_DIR=str(tmp_path),
    )
    assert said == f"{8 << 20} {16 << 20}\n['{tmp_path}']\n"


def test_do_all_constructors_use_it(tmp_path: Path) -> None:
    run(
        tmp_path,
        "p = np.arange(6.0).reshape(2, 3)",
        "np.save(sys.argv[0] + '.npy', p); p.tofile(sys.argv[0] + '.raw')",
        "made = [pyswap.empty(3), pyswap.zeros(3), pyswap.ones(3), pyswap.full(3, 7)]",
        "made += [pyswap.array(p), pyswap.asarray(p), pyswap.empty_like(p), pyswap.zeros_like(p)]",
        "made += [pyswap.ones_like(p), pyswap.full_like(p, 2)]",
        "made += [pyswap.fromfile(sys.argv[0] + '.raw')]",
        "made += [pyswap.load(sys.argv[0] + '.npy'), pyswap.open_npy(sys.argv[0] + '.npy')]",
        "assert all(type(a) is pyswap.PagedArray for a in made)",
        "assert made[4].tolist() == made[-1].tolist() == made[-2].tolist() == p.tolist()",
        "assert all(len(pyswap.default_pool().residency(a)) == 1 for a in made)",
    )


def test_are_a_program_and_its_children_one_budget(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        "mine = where()[0]",
        "for method in ('fork', 'spawn', 'forkserver'):",
        "    with multiprocessing.get_context(method).Pool(2) as processes:",
        "        for pid, a in processes.map(where, range(2)):",
        "            assert pid == mine and type(a) is pyswap.PagedArray and a.sum() == 10",
        "code = 'import pyswap; print(pyswap.zeros(3).sum(), pyswap.default_pool().swapper_pid)'",
        "import subprocess",
        "out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)",
        "assert out.stdout == f'0.0 {mine}\\n', out",
        "print(pyswap.default_pool().stats().in_transit_bytes)",
    )
    assert said == "0\n"


def test_are_children_of_a_server_that_ran_before_the_pool_in_it_too(tmp_path: Path) -> None:
    run(
        tmp_path,
        "context = multiprocessing.get_context('forkserver')",
        "with context.Pool(1) as processes: assert processes.map(abs, [-1]) == [1]",
        "mine = where()[0]",
        "with context.Pool(1) as processes:",
        "    assert [pid for pid, _ in processes.map(where, range(2))] == [mine] * 2",
        "from concurrent.futures import ProcessPoolExecutor",
        "with ProcessPoolExecutor(1, context) as processes:",
        "    assert processes.submit(where).result()[0] == mine",
        "    assert processes.submit(of_a_program_that_it_starts).result() == mine",
    )


def test_does_configure_come_before_the_environment_and_once(tmp_path: Path) -> None:
    run(
        tmp_path,
        "pyswap.configure('16 MiB', swap=0, name='mine')",
        "pyswap.configure('4 MiB', swap=0, name='mine')",
        "assert pyswap.zeros(3).sum() == 0",
        "assert (pyswap.default_pool().memory, pyswap.default_pool().name) == (4 << 20, 'mine')",
        "try: pyswap.configure('4 MiB')",
        "except RuntimeError as error: assert 'in use already' in str(error)",
        "else: raise SystemExit('configured twice')",
    )


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("configure('lots')", ValueError),
        ("configure('8 MiB', swap='many')", ValueError),
        ("configure(swap='8 MiB')", TypeError),
        ("configure('8 MiB', size=3)", TypeError),
        ("configure('8 MiB', swap_path='/nowhere/at/all')", FileNotFoundError),
    ],
)
def test_does_configure_refuse_at_once_what_a_pool_would(
    tmp_path: Path, call: str, kind: type[Exception]
) -> None:
    run(
        tmp_path,
        "pyswap.configure('4 MiB', swap=0)",
        f"try: pyswap.{call}",
        f"except {kind.__name__}: pass",
        "else: raise SystemExit('it was taken')",
        "assert pyswap.zeros(3).sum() == 0",
        "assert pyswap.default_pool().memory == 4 << 20",
    )


def test_does_a_child_whose_ancestor_has_ended_make_its_own(tmp_path: Path) -> None:
    with pyswap.Pool("8 MiB", "8 MiB", page_size=4096) as pool:
        import json

        address: Any = json.dumps(pool.address())
        wrong = json.dumps(["x"])
    run(tmp_path, "assert where()[0] > 0", PYSWAP_POOL=address)
    with pytest.raises(AssertionError, match="is no pool's address: unset it"):
        run(tmp_path, "where()", PYSWAP_POOL=wrong)


def test_are_wrong_values_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError"):
        run(tmp_path, "where()", PYSWAP_MEMORY="lots")
    with pytest.raises(AssertionError, match="ValueError"):
        run(tmp_path, "where()", PYSWAP_SWAP="many")

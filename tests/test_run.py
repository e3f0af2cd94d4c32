"""Does a program run under a budget as it would without one, its worker processes included?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import memcg_parent
from test_working_set import MemoryGroup

import pyswap

pytestmark = [pytest.mark.core, pytest.mark.timeout(300)]

PACKAGE = str(Path(pyswap.__file__).parent.parent)
MIB = 1 << 20

WHERE = """
import numpy as np

def paged(a):
    from pyswap._native import native
    return bool(native.owns(a.ctypes.data))

def of_a_worker(k):
    a = np.full(1 << 18, float(k))
    assert paged(a)
    return float(a.sum())
"""

LARGER_THAN_MEMORY = (
    WHERE
    + """
import multiprocessing, sys

def part(k):
    a = np.arange(items, dtype=np.float64) + k
    a.sort()
    return paged(a) and a[0] == k and a[-1] == items - 1 + k and float(a.sum())

items = int(sys.argv[2])

if __name__ == "__main__":
    whole = np.arange(2 * items, dtype=np.float64)
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as workers:
        sums = workers.map(part, [1])
    assert sums == [items * (items - 1) / 2 + items], sums
    assert whole.sum() == items * (2 * items - 1)
    print("right")
"""
)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PACKAGE}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m pyswap run` with a small budget."""
    command = [sys.executable, "-m", "pyswap", "run", "--memory", "8M", "--swap", "64M"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment(),
        **options,
    )


def script(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text)
    return path


def test_is_a_script_run_as_python_runs_it(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import sys, beside\n"
        "print(__name__, __file__, sys.argv, beside.x, sys.path[0])\nsys.exit(7)",
    )
    (tmp_path / "beside.py").write_text("x = 5")
    arguments = ["-m", "--memory", "1", "--", "file"]
    told = run(program, *arguments)
    assert told.returncode == 7
    plain = subprocess.run(
        [sys.executable, str(program), *arguments], capture_output=True, text=True, check=False
    )
    assert told.stdout == plain.stdout


def test_is_a_module_run_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "__init__.py").touch()
    (tmp_path / "some" / "program.py").write_text(
        "import sys\nprint(__name__, __spec__.name, sys.argv[1:])"
    )
    told = run("-m", "some.program", "-x", "1", cwd=tmp_path)
    assert (told.returncode, told.stdout) == (0, "__main__ some.program ['-x', '1']\n"), told.stderr


def test_are_a_programs_arrays_paged_wherever_they_are_made(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        WHERE
        + """
import concurrent.futures, multiprocessing, subprocess, sys, threading

if __name__ == "__main__":
    assert paged(np.ones(1 << 18)) and not paged(np.ones(10))
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as workers:
            print(method, workers.map(of_a_worker, [3]))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        print("thread", list(executor.map(of_a_worker, [3])))
    code = "import program; print('subprocess', [program.of_a_worker(3)])"
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", code], check=True)
""",
    )
    told = run(program, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    ways = ("fork", "spawn", "forkserver", "thread", "subprocess")
    assert told.stdout.splitlines() == [f"{way} [786432.0]" for way in ways]
    last = told.stderr.splitlines()[-1]
    assert last.startswith("pyswap: at most ")
    assert len(told.stderr.splitlines()) == 1, told.stderr


def test_are_paged_arrays_of_a_program_within_the_same_budget(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        """
import multiprocessing, os
import pyswap

def of(a):
    return pyswap.default_pool().swapper_pid, (a + pyswap.zeros(1, "u1")).sum(dtype=int)

if __name__ == "__main__":
    pyswap.configure("1 GiB", swap="1 GiB")
    a = pyswap.ones((4, 1 << 20), "u1")
    pool = pyswap.default_pool()
    print(pool.memory, pool.name.startswith("run-"), pool.stats().committed_bytes)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as workers:
            assert workers.map(of, [a]) == [(pool.swapper_pid, 4 << 20)]
""",
    )
    told = run(program)
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"{8 * MIB} True {4 * MIB}\n"


def test_is_out_of_swap_a_memory_error_in_the_program(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import numpy as np\nkept = [np.ones(1 << 20) for _ in range(5)]\n"
        "try:\n    np.ones(9 << 20)\nexcept MemoryError as error:\n    print('caught')\n"
        "print(sum(a.sum() for a in kept) == 5 << 20)\nnp.ones(9 << 20)",
    )
    told = run(program)
    assert told.stdout == "caught\nTrue\n"
    assert told.returncode == 1
    assert "MemoryError" in told.stderr.splitlines()[-2]


def test_does_overcommit_allow_what_is_not_touched(tmp_path: Path) -> None:
    program = script(tmp_path, "import numpy as np\na = np.zeros(1 << 27)\na[-1] = 1\nprint(a[-1])")
    assert run(program).returncode == 1
    told = run("--overcommit", program)
    assert (told.returncode, told.stdout) == (0, "1.0\n"), told.stderr


def test_does_the_report_tell_what_was_used(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import numpy as np, os\na = np.ones(2 << 20)\n"
        "plain = bytearray(b'x' * (30 << 20))\nprint(os.getpid(), a.sum())\n"
        "import time\nuntil = time.monotonic() + 1\n"
        "while time.monotonic() < until: a[::512] += 1",
    )
    report = tmp_path / "report.json"
    told = run("--report", report, program)
    assert told.returncode == 0, told.stderr
    read = json.loads(report.read_text())
    assert read["exit_status"] == 0
    assert read["command"][-1] == str(program)
    assert 0 < read["peak_resident_bytes"] <= 8 * MIB
    assert read["peak_swap_bytes"] >= 8 * MIB
    assert read["peak_committed_bytes"] == 16 * MIB
    assert read["stats"]["evictions"] > 0
    (own,) = [p for p in read["processes"] if p["pid"] == int(told.stdout.split()[0])]
    assert own["peak_anonymous_bytes"] > 30 * MIB
    assert str(own["pid"]) in told.stderr


def test_is_all_told_that_was_used_for_a_moment(tmp_path: Path) -> None:
    """It is given back, and the program over, before anybody could look."""
    report = tmp_path / "report.json"
    told = run("--report", report, script(tmp_path, "import numpy as np\nnp.ones(1 << 19)"))
    assert told.returncode == 0, told.stderr
    read = json.loads(report.read_text())
    assert read["stats"]["resident_pages"] == read["stats"]["committed_bytes"] == 0
    assert read["peak_resident_bytes"] == read["peak_committed_bytes"] == 4 * MIB
    assert read["peak_swap_bytes"] == 0
    used = "at most 4.0 MiB of 8.0 MiB memory and 0 B of 64.0 MiB swap"
    assert told.stderr.startswith(f"pyswap: {used}")


def test_does_a_program_end_by_the_signal_that_it_was_sent(tmp_path: Path) -> None:
    program = script(
        tmp_path, "import os, signal\nprint('up', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run(program).returncode == -signal.SIGKILL
    waiting = script(tmp_path, "import time, numpy\nprint('up', flush=True)\ntime.sleep(300)")
    command = [sys.executable, "-m", "pyswap", "run", "--memory", "8M", str(waiting)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert said.startswith("pyswap: at most ")


# What runs tests in the background has them ignore interrupts.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_are_an_interrupt_and_a_traceback_what_they_are_without(tmp_path: Path) -> None:
    # Many short sleeps: one that a signal comes right before is not interrupted.
    waiting = script(
        tmp_path,
        "import time, numpy\nprint('up', flush=True)\n"
        "for _ in range(30_000):\n    time.sleep(0.01)",
    )
    ended = []
    for how in ([], ["-m", "pyswap", "run", "--memory", "8M"]):
        with subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE, sys.executable, *how, str(waiting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            # As a terminal does, all of them.
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
        # Which of its lines the signal meets is chance; that there are no others is not.
        files = re.findall(r'File "(.*?)"', said)
        ended.append(
            (process.returncode, said.split("pyswap: at most ")[0].splitlines()[-1], files)
        )
    assert ended[0] == ended[1]
    assert ended[0][0] == -signal.SIGINT
    assert ended[0][1:] == ("KeyboardInterrupt", [str(waiting)])


def test_is_a_users_own_sitecustomize_run_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = 'mine'")
    program = script(tmp_path, "import sys, numpy\nprint(sys.mine)")
    path = f"{PACKAGE}{os.pathsep}{tmp_path}"
    told = subprocess.run(
        [sys.executable, "-m", "pyswap", "run", "--memory", "8M", str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (told.returncode, told.stdout) == (0, "mine\n"), told.stderr


def test_do_a_c_librarys_calls_go_through_the_shim(tmp_path: Path) -> None:
    """A library that looks its functions up by itself finds the preloaded ones."""
    program = script(
        tmp_path,
        WHERE
        + """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
a = np.arange(4 << 20, dtype=np.float32)  # twice the budget
b = np.zeros_like(a)
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
libc.write.restype = libc.pread.restype = libc.fread.restype = ctypes.c_ssize_t
pointer = lambda x: ctypes.c_void_p(x.ctypes.data)
print(libc.write(fd, pointer(a), ctypes.c_size_t(a.nbytes)) == a.nbytes)
print(libc.pread(fd, pointer(b), ctypes.c_size_t(b.nbytes), ctypes.c_long(0)) == b.nbytes)
print(bool((a == b).all()))
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"r"))
b[:] = 0
print(libc.fread(pointer(b), ctypes.c_size_t(4), ctypes.c_size_t(b.size), file) == b.size)
print(bool((a == b).all()))
""",
    )
    told = run(program, tmp_path / "data")
    assert told.returncode == 0, told.stderr
    assert told.stdout == "True\n" * 5


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "no size"], ["--memory", "1"], ["--swap", "-3"], ["--threshold", "0"]],
)
def test_is_a_bad_option_refused_in_a_sentence(tmp_path: Path, arguments: list[str]) -> None:
    told = run(*arguments, script(tmp_path, "print('ran')"))
    assert told.returncode == 1
    assert told.stdout == ""
    assert told.stderr.startswith("Error: ")
    assert "Traceback" not in told.stderr


def peak_in_group(
    command: list[str], env: dict[str, str], limit: int | None
) -> tuple[int, str, int, int]:
    """Run a command in a memory group: exit status, output, peak bytes, processes killed."""
    parent = memcg_parent()
    assert parent is not None
    group = MemoryGroup(parent)
    try:
        if limit is not None:
            group.limit(limit)
        code, told = group.run(command, env)
        return code, told, group.peak_bytes(), group.events()["oom_kill"]
    finally:
        group.remove()


def finishes_in_its_budget(
    prefix: list[str], env: dict[str, str], program: Path, method: str
) -> None:
    """A program that needs three times --memory finishes in a group of budget and baseline."""
    memory = 96 * MIB
    command = [
        *prefix,
        "-m",
        "pyswap",
        "run",
        "--memory",
        str(memory),
        "--swap",
        "512M",
        str(program),
    ]
    # What the same processes need with hardly any data, and the budget.
    code, _, baseline, _ = peak_in_group([*command, method, "200000"], env, None)
    assert code == 0
    limit = baseline + memory
    items = memory // 8
    needed = 3 * memory
    code, told, peak, killed = peak_in_group([*command, method, str(items)], env, limit)
    print(f"{method}: peak {peak} of {limit} bytes, baseline {baseline}, arrays {needed}")
    assert (code, told, killed) == (0, "right\n", 0)
    # And would not without.
    _, told, _, killed = peak_in_group([*prefix, str(program), method, str(items)], env, limit)
    assert killed > 0 or "right" not in told, "the limit was no limit for the program alone"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_does_a_program_over_its_memory_finish_in_a_group_of_its_budget(
    tmp_path: Path, method: str, require: Callable[[str], None]
) -> None:
    require("memcg")
    program = script(tmp_path, LARGER_THAN_MEMORY)
    finishes_in_its_budget([sys.executable], environment(), program, method)

"""Does everything hold for an ordinary user, with only user-mode userfaultfd?

Another uid runs the core tests, in an environment of its own made by the system's Python: one that
root's home does not hide from it.  Dropping root's capabilities would not be the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import NOBODY_UID, SYSTEM_PYTHON
from test_run import LARGER_THAN_MEMORY, finishes_in_its_budget, script

ROOT = Path(__file__).parent.parent

# What is built from, and what is run.
BUILT_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "pyswap")
RUN_FROM = ("pyproject.toml", "tests")
BUILT = shutil.ignore_patterns("*.so", "_fast*.c", "_allocator.c", "__pycache__")

BUILD_NEEDS = ("setuptools>=77", "Cython>=3.0.11", "numpy>=2.0")
SETUP_LIMIT_S = 480
RUN_LIMIT_S = 1500

UNPRIVILEGED = Path("/proc/sys/vm/unprivileged_userfaultfd")


def run(*command: str, limit_s: int = SETUP_LIMIT_S, **environment: str) -> str:
    """Run a step of the setup as we are, and fail with what it said."""
    told = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd="/",
        timeout=limit_s,
        umask=0o022,
        env={**os.environ, **environment},
    )
    assert told.returncode == 0, f"{' '.join(command)}:\n{told.stdout[-4000:]}"
    return told.stdout


def copy(names: tuple[str, ...], target: Path) -> None:
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=BUILT)
        elif (ROOT / name).exists():
            target.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def make_environment(base: Path) -> Path:
    """Make an environment of the system's Python, and give its interpreter."""
    environment = base / "environment"
    has_venv = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import ensurepip, venv"], check=False, capture_output=True, cwd="/"
    )
    if has_venv.returncode == 0:
        run(SYSTEM_PYTHON, "-m", "venv", str(environment))
    else:
        tools = str(base / "tools")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, "virtualenv")
        made_by = [sys.executable, "-m", "virtualenv", "-p", SYSTEM_PYTHON, str(environment)]
        run(*made_by, PYTHONPATH=tools)
    return environment / "bin" / "python"


@pytest.fixture(scope="module")
def users_python() -> Iterator[tuple[Path, Path]]:
    """A folder that everybody may read, and the interpreter in it that has pyswap installed."""
    base = Path(tempfile.mkdtemp(prefix="pyswap-user-", dir="/var/tmp"))
    try:
        base.chmod(0o755)
        python = make_environment(base)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        copy(BUILT_FROM, base / "source")
        source = base / "source"
        run(*pip, *BUILD_NEEDS)
        run(*pip, "--no-build-isolation", f"{source}[test-core]", PYSWAP_DEBUG="1")
        copy(RUN_FROM, base / "run")
        yield base, python
    finally:
        shutil.rmtree(base)


def own_folder(base: Path, name: str) -> str:
    """Make a folder that belongs to the other user, and to nobody else."""
    folder = base / name
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY_UID, NOBODY_UID)
    return str(folder)


def processes_of(python: Path) -> list[psutil.Process]:
    """The other user's processes that run the environment's Python."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.uids().effective == NOBODY_UID and str(python) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for_end(python: Path, limit_s: float = 10) -> list[psutil.Process]:
    deadline = time.monotonic() + limit_s
    while (left := processes_of(python)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.timeout(SETUP_LIMIT_S + RUN_LIMIT_S)
def test_do_the_core_tests_hold_for_an_ordinary_user(
    require: Callable[[str], None],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    require("user")
    begun = time.monotonic()
    base, python = request.getfixturevalue("users_python")
    setup_s = time.monotonic() - begun
    environment = {
        "PATH": f"{python.parent}:{os.defpath}",
        "HOME": own_folder(base, "home"),
        "TMPDIR": own_folder(base, "tmp"),
        "LANG": "C.UTF-8",
        "PYSWAP_ENGINE": "debug",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYSWAP_SEED": os.environ.get("PYSWAP_SEED", ""),
    }
    options = ["--timeout=300", "--timeout-method=thread", "-p", "no:cacheprovider"]
    options += ["-m", "(core or failpoint or user) and not long", "--ignore=tests/test_user.py"]
    options += ["--durations=10", "--durations-min=1"]
    # The demo and the bench are not installed there, and need packages of their own.
    options += ["--ignore=tests/test_continents.py", "--ignore=tests/test_bench.py"]
    options += ["--ignore=tests/test_hit_rates.py"]
    try:
        told = subprocess.run(
            [str(python), "-m", "pytest", *options, "tests"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=base / "run",
            timeout=RUN_LIMIT_S,
            env=environment,
            user=NOBODY_UID,
            group=NOBODY_UID,
            extra_groups=[],
            umask=0o077,
        )
    finally:
        left = wait_for_end(python)
        for process in left:
            process.kill()
    print(told.stdout[-12000:])
    assert told.returncode == 0, f"the other user's tests ended with {told.returncode}"
    assert not left, f"the other user's processes stayed: {left}"
    assert re.search(r"\b[1-9]\d* passed\b", told.stdout), "no test ran"
    everybody_has_all = UNPRIVILEGED.exists() and UNPRIVILEGED.read_text().strip() == "1"
    expected = "userfaultfd" if everybody_has_all else "userfaultfd, user mode only"
    assert f"pyswap engine: {expected}\n" in told.stdout
    slowest = told.stdout.partition(" slowest ")[2].splitlines()[1:11]
    with capsys.disabled():
        print(f"\nthe other user: {setup_s:.0f} s for its environment; the slowest of its tests:")
        print(*slowest, told.stdout.splitlines()[-1], sep="\n")


AS_NOBODY = """
import os, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
os.umask(0o077)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.timeout(SETUP_LIMIT_S + RUN_LIMIT_S)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_does_an_ordinary_users_program_finish_in_a_group_of_its_budget(
    require: Callable[[str], None], request: pytest.FixtureRequest, method: str
) -> None:
    require("user")
    require("memcg")
    base, python = request.getfixturevalue("users_python")
    folder = base / f"program-{method}"
    folder.mkdir()
    program = script(folder, LARGER_THAN_MEMORY)
    environment = {
        "PATH": f"{python.parent}:{os.defpath}",
        "HOME": own_folder(base, f"home-{method}"),
        "TMPDIR": own_folder(base, f"tmp-{method}"),
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    prefix = [SYSTEM_PYTHON, "-c", AS_NOBODY, str(NOBODY_UID), str(python)]
    finishes_in_its_budget(prefix, environment, program, method)
    assert not wait_for_end(python), "the other user's processes stayed"

"""Does the command line say what it has, and what it lacks?"""

from __future__ import annotations

import subprocess
import sys

import pyswap


def told(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=60
    )


def test_does_the_command_line_tell_its_version() -> None:
    answer = told("-m", "pyswap", "--version")
    assert answer.returncode == 0, answer.stderr
    assert pyswap.__version__ in answer.stdout


def test_is_a_missing_package_named_in_one_sentence() -> None:
    hidden = "import sys, runpy; sys.modules['click'] = None; "
    code = hidden + "runpy.run_module('pyswap', run_name='__main__')"
    answer = told("-c", code)
    assert answer.returncode == 1
    assert len(answer.stderr.splitlines()) == 1
    assert "click" in answer.stderr
    assert "pyswap-runtime[cli]" in answer.stderr

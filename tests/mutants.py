"""Take one guard out at a time, and see a test fail: `make mutants`.

Each file in tests/mutants/ names a mistake, the tests that are to see it, and what it changes:
pieces of a file, between <<<<<<< and =======, that become what is between ======= and >>>>>>>.  A
piece must be there exactly once; lines may move about it.  A mutant is built as the debug extension
in a copy of the tree, and dies when a test fails there that the unchanged tree passes.  One that
its own tests do not see is shown to all interleavings and the stress; it fails the run all the
same, as does one that lives, or that does not apply any more.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "mutants"

# What a mutant is shown to that its own tests do not see, quick ones first.
OTHERS = (
    "tests/test_races.py",
    "tests/test_interleavings.py",
    "tests/test_private.py",
    "tests/test_takeover.py",
    "tests/test_private_copies.py",
    "tests/test_death.py",
    "tests/test_stateful.py",
    "tests/test_stress.py",
)

PIECE = re.compile(r"^<<<<<<<\n(.*?)^=======\n(.*?)^>>>>>>>\n", re.MULTILINE | re.DOTALL)

# How long a mutant's test waits for what ought to happen soon, and a run for the next line of its
# log.  The unchanged tree's tests wait as long as ever: beside the others they may be slow.
WAIT_S = 10
SILENCE_S = 120

# So much of why a test failed is shown.
LINE = 200

# Every process of a mutant has it in its environment, with the tree as its value.
MARK = "PYSWAP_MUTANT"


@dataclass
class Mutant:
    """A mistake: what it is, who is to see it first, and the pieces it changes."""

    name: str
    what: str
    tests: list[str]
    pieces: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Mutant:
        head, *parts = re.split(r"^--- (\S+)\n", path.read_text(), flags=re.MULTILINE)
        what, tests = head.strip().split("\ntests:")
        made = cls(path.stem, what.strip(), tests.split())
        for file, text in zip(parts[::2], parts[1::2], strict=True):
            made.pieces += [(file, old, new) for old, new in PIECE.findall(text)]
        if not made.pieces:
            raise SystemExit(f"{path}: it changes nothing")
        return made

    def changed(self, tree: Path) -> dict[Path, str]:
        """Return the files that it changes, as they are then.

        Raises
        ------
        ValueError
            If it does not apply.
        """
        texts: dict[Path, str] = {}
        for file, old, new in self.pieces:
            path = tree / file
            text = texts.get(path) or path.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{self.name}: {file} has {text.count(old)} times:\n{old}")
            texts[path] = text.replace(old, new)
        return texts


def read_all() -> list[Mutant]:
    """Read every mutant there is, by name."""
    return [Mutant.read(path) for path in sorted(FOLDER.glob("*.patch"))]


def copy_tree(target: Path) -> None:
    """Copy what a build and the tests need."""
    built = shutil.ignore_patterns("*.so", "_fast*.c", "_allocator.c", "__pycache__", ".*", "build")
    for name in ("pyswap", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


def build(tree: Path) -> str | None:
    """Build the debug extension alone, not optimised; says why where it cannot."""
    told = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "PYSWAP_DEBUG": "only", "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if told.returncode == 0 else f"does not build:\n{told.stderr[-2000:]}"


def end_processes(tree: Path) -> None:
    """End what a mutant left running: its swapper has a session of its own, and may hang."""
    mark = f"{MARK}={tree}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def run_tests(tree: Path, tests: list[str], wait_s: int | None = WAIT_S) -> tuple[int | None, str]:
    """Run tests until one fails; the status, None for one that hung, and the log."""
    there = [test for test in tests if (tree / test.split("::")[0]).exists()]
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider"]
    command += [f"--timeout={SILENCE_S - 10}", "--timeout-method=thread"]
    # Of whole files only those; a test that is named is run whatever its marks are.
    if not any("::" in test for test in there):
        command += ["-m", "core or failpoint"]
    own = {"PYSWAP_ENGINE": "debug", "PYTHONPATH": str(tree)}
    own |= {"PYSWAP_WAIT_S": str(wait_s)} if wait_s else {}
    own |= {"COLUMNS": str(2 * LINE), MARK: str(tree)}
    log = tree / "log"
    with log.open("w") as out:
        running = subprocess.Popen(
            [*command, *there],
            cwd=tree,
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        status = None
        while time.time() < log.stat().st_mtime + SILENCE_S and status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = running.wait(0.5)
        end_processes(tree)
        running.wait()
    return status, log.read_text(errors="replace")


def failure(tree: Path, tests: list[str], wait_s: int | None = WAIT_S) -> str | None:
    """Run tests until one fails; names it, and says why it failed.

    Raises
    ------
    ValueError
        If there are no such tests.
    """
    status, log = run_tests(tree, tests, wait_s)
    if status == 0:
        return None
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise ValueError(f"pytest ran none of these tests: {' '.join(tests)}")
    for kind in ("FAILED", "ERROR"):
        if found := re.search(rf"^{kind} (tests/.+)", log, re.MULTILINE):
            return found[1][:LINE]
    begun = re.findall(r"^(tests/\S+::\S+)", log, re.MULTILINE) or ["no test"]
    return f"{begun[-1]} - it " + ("hung" if status is None else f"crashed with {status}")


@dataclass
class Verdict:
    """What became of a mutant."""

    name: str
    line: str
    seen: bool
    """A test that is named for it failed."""


def verdict(mutant: Mutant) -> Verdict:
    """Build and test one mutant."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pyswap-mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for path, text in mutant.changed(tree).items():
            path.write_text(text)
        if why := build(tree):
            return Verdict(mutant.name, why, False)
        # Twice, since on a busy machine a test may come too late to see it.
        by = failure(tree, mutant.tests) or failure(tree, mutant.tests)
        seen = by is not None
        if not seen:
            by = failure(tree, list(OTHERS))
    seconds = f"{time.monotonic() - began:.0f} s"
    if by is None:
        return Verdict(mutant.name, f"LIVES ({seconds}): {mutant.what}", False)
    killed = "killed" if seen else "NOT SEEN BY ITS OWN TESTS, killed"
    return Verdict(mutant.name, f"{killed} ({seconds}) by {by}", seen)


def unchanged(mutants: list[Mutant]) -> Verdict:
    """Whether the tree passes as it is: where it does not, no mutant is told from it.

    What fails beside the others must pass when it is run again.
    """
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    with tempfile.TemporaryDirectory(prefix="pyswap-mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        why = build(tree) or (failure(tree, tests, None) and failure(tree, tests, None))
    return Verdict("the unchanged tree", f"FAILS: {why}" if why else "passes", why is None)


def main() -> int:
    """Try every mutant, or those that are named; 1 where one is not seen by its tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 2))
    given = parser.parse_args()
    mutants = read_all()
    if unknown := set(given.names) - {m.name for m in mutants}:
        parser.error(f"no such mutants: {' '.join(sorted(unknown))}")
    mutants = [m for m in mutants if not given.names or m.name in given.names]
    wrong: list[str] = []
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as threads:
        tried = [threads.submit(functools.partial(unchanged, mutants))]
        tried += [threads.submit(functools.partial(verdict, mutant)) for mutant in mutants]
        for done in concurrent.futures.as_completed(tried):
            told = done.result()
            line = f"{told.name}: {told.line}"
            print(line, flush=True)
            if not told.seen:
                wrong.append(line)
    seconds = time.monotonic() - began
    print(f"{len(tried) - len(wrong)} of {len(tried)} as they should be, in {seconds:.0f} s")
    if wrong:
        print("not as they should be:", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

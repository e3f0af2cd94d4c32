"""Run core tests on an extension that watches itself: `make deep`.

The debug extension is built with the C compiler's address and undefined-behaviour sanitizers in a
copy of the tree.  Whatever they find ends the process that it is found in, swapper or worker, and
so fails the test; a line of theirs in the log fails the run too.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants import copy_tree

# What runs side by side; each half takes about as long.
TESTS = (
    (
        "tests/test_races.py",
        "tests/test_private.py",
        "tests/test_checksums.py",
        "tests/test_batches.py",
        "tests/test_readahead.py",
        "tests/test_advise.py",
        "tests/test_swap_cache.py",
        "tests/test_shared.py",
        "tests/test_death.py",
    ),
    (
        "tests/test_interleavings.py",
        "tests/test_access.py",
        "tests/test_resize.py",
        "tests/test_takeover.py::test_do_pins_outlive_a_swapper",
        "tests/test_takeover.py::test_is_a_copy_mapped_whose_swapper_died",
        "tests/test_takeover.py::test_has_the_store_no_byte_of_a_page_that_was_on_its_way_out",
        "tests/test_takeover.py::test_are_private_pages_shared_yet_after_a_takeover",
    ),
)
# A process that crashes on purpose is told from a found one by its signal.
LEFT_OUT = "crash or raw_clone or whichever_call"
LIMIT_S = 600
FOUND = re.compile(r"^.*(?:ERROR: AddressSanitizer|runtime error:).*$", re.MULTILINE)


def library(name: str) -> str:
    """Where the compiler keeps a sanitizer's library."""
    told = subprocess.run(
        [os.environ.get("CC", "gcc"), f"-print-file-name={name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip()


def environment(tree: Path, logs: Path) -> dict[str, str]:
    """What the tests run with; Python's own leaks are not ours."""
    options = f"detect_leaks=0:handle_segv=0:handle_sigbus=0:log_path={logs}/asan"
    return {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYSWAP_ENGINE": "debug",
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={logs}/ubsan",
    }


def build(tree: Path) -> None:
    """Build the debug extension so that it watches itself."""
    own = {"PYSWAP_DEBUG": "only", "PYSWAP_SANITIZE": "address,undefined", "PYTHONPATH": str(tree)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, **own})
    (built,) = tree.glob("pyswap/_fast_debug.*.so")
    for mark in (b"__asan_report", b"__ubsan_handle"):
        assert mark in built.read_bytes(), "the extension does not watch itself"


def run(tree: Path, logs: Path, tests: tuple[str, ...]) -> int:
    """Run tests, and show their log."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=120"]
    command += ["--timeout-method=thread", "-m", "core or failpoint", "-k", f"not ({LEFT_OUT})"]
    told = subprocess.run(
        [*command, *tests],
        cwd=tree,
        env=environment(tree, logs),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=LIMIT_S,
        check=False,
    )
    print(told.stdout, flush=True)
    return told.returncode


def main() -> int:
    """Build, run, and show what was found."""
    halves = (tuple(sys.argv[1:]),) if sys.argv[1:] else TESTS
    with tempfile.TemporaryDirectory(prefix="pyswap-sanitized-") as folder:
        tree = Path(folder)
        logs = tree / "found"
        logs.mkdir()
        copy_tree(tree)
        build(tree)
        with concurrent.futures.ThreadPoolExecutor(len(halves)) as threads:
            ended = list(threads.map(functools.partial(run, tree, logs), halves))
        found = [text for path in logs.iterdir() for text in FOUND.findall(path.read_text())]
    for line in found:
        print(line)
    print(f"sanitizers: {len(found)} findings, tests ended with {ended}")
    return int(any(ended) or bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""Is the house in order?  Floors, setters, sizes and linters, so that one command checks all."""

from __future__ import annotations

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import read_all

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyswap"
CORE = PACKAGE / "core"

LINE_LENGTH = 100
CYTHON_LINE_LENGTH = 120
CORE_FILE_LINES = 450
FUNCTION_LINES = 60

# The floors, lowest first: a module imports from lower rows only, never from its own.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "0, words: structs and foreign calls",
        ("core.checksum", "core.kernel", "core.layout", "core.order"),
    ),
    ("0, words: atomics", ("core.lock",)),
    ("0, words: one process's own", ("core.context",)),
    ("1, what threads read into", ("core.buffer",)),
    ("1, what is worth a look", ("core.area", "core.groups")),
    (
        "1, tables: one record type each, ignorant of each other",
        (
            "core.frame",
            "core.pagetable",
            "core.region",
            "core.starved",
            "core.swapmap",
        ),
    ),
    ("1, streams of faults over them", ("core.stream",)),
    ("1, what those are worth reading", ("core.readahead",)),
    (
        "1, what regions share, and what is worth keeping",
        ("core.family", "core.hold", "core.policy"),
    ),
    ("1, files behind arrays", ("core.backing",)),
    ("1, the engine: what is told to a worker", ("core.engine",)),
    ("1, the store: bytes of pages", ("core.store",)),
    ("2, a worker's part in a takeover", ("core.election",)),
    ("2, steps that several paths share", ("core.page", "core.victim")),
    ("2, steps made of those", ("core.clean", "core.mapping")),
    ("2, more of those at once", ("core.neighbours",)),
    ("2, ranges of pages, and readahead carried out", ("core.ahead", "core.evict")),
    ("2, the bytes of copies", ("core.run",)),
    ("2, copies on write", ("core.copy",)),
    (
        "2, paths: verbs over several tables",
        (
            "core.attendant",
            "core.drain",
            "core.fault",
            "core.fork",
            "core.reclaim",
            "core.resize",
            "core.sparse",
            "core.takeover",
        ),
    ),
    ("2, faults that stay", ("core.pin",)),
    (
        "3, words of the Python side",
        (
            "birth",
            "config",
            "disk",
            "errors",
            "extents",
            "files",
            "pages",
            "sizes",
            "stats",
        ),
    ),
    (
        "3, where Python meets the machinery",
        ("_fast", "_fast_debug", "_fast_takeover", "_fast_worker"),
    ),
    ("3, NumPy's memory handler", ("_allocator",)),
    ("3, which build of it", ("_native",)),
    ("3, the C library's I/O", ("shim",)),
    ("3, what outlives a swapper", ("vault",)),
    ("3, one noun each", ("address", "areas", "objects", "protocol", "settings")),
    ("3, what is asked of those", ("pins", "swapoff")),
    ("3, what is made of settings", ("segments",)),
    ("3, who finds a pool, and who comes in", ("listener", "registry")),
    ("4, memory as an array", ("paged",)),
    ("4, processes: who runs what", ("swapper", "worker")),
    ("4, who comes without a fork", ("joining",)),
    ("4, the pool", ("pool",)),
    ("4, arrays by reference, and where nobody names a pool", ("default", "reference")),
    ("5, what people touch", ("__init__", "allocator", "shared_memory")),
    ("5, what a command does", ("doctor", "pools")),
    ("5, what it shows", ("tables",)),
    ("5, programs under a budget", ("run",)),
    ("5, what they start with", ("hook.sitecustomize",)),
    ("5, the command line", ("cli",)),
    ("5, the command", ("__main__",)),
)

LEVEL = {name: level for level, (_, names) in enumerate(FLOORS) for name in names}

# The exceptions: an array asks its pool to pin it, and what refers to it, by an import at the time
# of asking.
UPWARD = {("paged", "pool"), ("paged", "reference")}

# Whose word a record's word is: nobody else may do more than read it.
WORD_HOMES = {"copy.pxd", "frame.pxd", "region.pxd", "swapmap.pxd"}


def sources(*patterns: str) -> list[Path]:
    """The project's files of some kinds, those that are built or installed left out."""
    folders = ("pyswap", "tests", "examples", "bench")
    found = (path for name in folders for p in patterns for path in (ROOT / name).rglob(p))
    return sorted([path for p in patterns for path in ROOT.glob(p)] + list(found))


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def without_strings(code: str) -> str:
    """Blank out strings, docstrings and comments, so that a rule reads code only; lines stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r'""".*?"""|"(?:\\.|[^"\\\n])*"|#[^\n]*', blank, code, flags=re.DOTALL)


def numbered_matches(pattern: str, path: Path, code: str) -> Iterator[tuple[str, re.Match[str]]]:
    for match in re.finditer(pattern, code, flags=re.MULTILINE):
        yield shown(path, code.count("\n", 0, match.start()) + 1), match


# Floors.


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        yield child
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield from run_time_nodes(child)


def python_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and names of the modules of this package that a Python file imports."""
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level == 0 and origin.split(".")[0] != "pyswap":
                continue
            origin = origin.removeprefix("pyswap").lstrip(".")
            for name in [origin] if origin else [alias.name for alias in node.names]:
                yield node.lineno, name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pyswap."):
                    yield node.lineno, alias.name.removeprefix("pyswap.")


def cython_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and names of the modules of this package that a Cython file cimports."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = re.match(r"\s*from pyswap(?:\.(\S+))? c?import (.*)", line)
        if match and match[1] and match[1] != "core":
            yield number, match[1]
        elif match:
            prefix = "core." if match[1] else ""
            for name in re.findall(r"\w+(?= as)|(?<!as )\b\w+", match[2]):
                yield number, prefix + name
        match = re.match(r"\s*c?import pyswap\.(\S+)", line)
        if match:
            yield number, match[1]


def package_files() -> list[Path]:
    found = sources("*.py", "*.pyx", "*.pxi", "*.pxd")
    return [p for p in found if PACKAGE in p.parents and p.name != "__init__.pxd"]


def test_has_every_module_a_floor() -> None:
    homeless = [name for name in map(module_name, package_files()) if name not in LEVEL]
    assert not homeless, f"give each a row in FLOORS: {homeless}"


def test_do_imports_point_down_only() -> None:
    broken = []
    for path in package_files():
        importer = module_name(path)
        found = python_imports(path) if path.suffix == ".py" else cython_imports(path)
        broken += [
            f"{shown(path, line)}: {importer} (floor {FLOORS[LEVEL[importer]][0]}) imports {name}"
            for line, name in found
            if importer in LEVEL
            and LEVEL.get(name, -1) >= LEVEL[importer]
            and (importer, name) not in UPWARD
        ]
    assert not broken, "\n".join(broken)


def test_does_the_swapper_start_without_numpy() -> None:
    code = "import sys, pyswap.swapper; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Setters.


def machinery() -> list[Path]:
    return sorted([*CORE.glob("*.pxd"), *PACKAGE.glob("*.pyx"), *PACKAGE.glob("*.pxi")])


def test_are_atomics_spelled_in_one_file() -> None:
    broken = [
        f"{place}: {match[0]}"
        for path in machinery()
        if path.name != "lock.pxd"
        for place, match in numbered_matches(r"__(atomic|sync)_\w+", path, path.read_text())
    ]
    assert not broken, "core/lock.pxd has the atomics:\n" + "\n".join(broken)


def test_is_a_word_never_assigned() -> None:
    broken = [
        f"{place}: {match[0]}"
        for path in machinery()
        for place, match in numbered_matches(
            r"\.word\s*(?:[-+|&^]|<<|>>)?=(?!=)", path, without_strings(path.read_text())
        )
    ]
    assert not broken, "a word changes by an atomic only:\n" + "\n".join(broken)


def test_does_a_frames_word_change_only_in_its_own_file() -> None:
    # Others read it by load64; what it is called there tells the frame's word from the others'.
    broken = [
        f"{place}: {match[0]}"
        for path in machinery()
        if path.name != "frame.pxd"
        for place, match in numbered_matches(
            r"\w+\(\s*&[\w.]*(?:frames?|victim)\w*(?:\[[^\]]*\])?\.word",
            path,
            without_strings(path.read_text()),
        )
        if not match[0].startswith("load64(")
    ]
    assert not broken, "core/frame.pxd has the setters:\n" + "\n".join(broken)


def test_does_a_records_word_change_only_in_its_tables_file() -> None:
    broken = [
        f"{place}: {match[0]}"
        for path in machinery()
        if path.name not in WORD_HOMES
        for place, match in numbered_matches(
            r"\w+\(\s*&[\w.]+(?:\[[^\]]*\])?\.word", path, without_strings(path.read_text())
        )
        if not re.match(r"(load64|life_\w+)\(", match[0])
    ]
    assert not broken, "a record's word has its helpers:\n" + "\n".join(broken)


def test_is_a_state_set_only_through_its_setter() -> None:
    broken = [
        place
        for path in machinery()
        if path.name != "frame.pxd"
        for place, _ in numbered_matches(r"\bframe_move\(", path, without_strings(path.read_text()))
    ]
    assert not broken, f"use frame_set_<state>(): {broken}"


# The generated C.


def directives() -> dict[str, object]:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DIRECTIVES":
            return dict(ast.literal_eval(node.value))
    raise AssertionError("setup.py names no DIRECTIVES")


@pytest.fixture(scope="session")
def generated_c(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The C text of `_fast`: the build's where it is newer than its sources, else made here."""
    built = PACKAGE / "_fast.c"
    if not machinery():
        pytest.skip("there is no machinery yet")
    newest = max(path.stat().st_mtime for path in machinery())
    if built.exists() and built.stat().st_mtime > newest:
        return built.read_text()
    pytest.importorskip("Cython")
    made = tmp_path_factory.mktemp("generated") / "_fast.c"
    options = [f"-X{name}={value}" for name, value in directives().items()]
    command = [sys.executable, "-m", "cython", "-3", *options, "-o", str(made)]
    subprocess.run([*command, "pyswap/_fast.pyx"], check=True, cwd=ROOT)
    return made.read_text()


def nogil_functions(text: str) -> dict[str, str]:
    """The bodies, by C name, of the functions that run without the GIL.

    Those are all of core/ and those that `_fast.pyx` and its parts declare nogil.
    """
    pyx = "\n".join(path.read_text() for path in PACKAGE.glob("_fast*.px[yi]"))
    own = re.findall(r"^\s*cdef .*?(\w+)\(.*\bnogil:", pyx, re.MULTILINE)
    prefixes = [r"pyswap_4core_\w+", *(rf"pyswap_5_fast_{name}" for name in own)]
    head = rf"^static [^\n;]*?(__pyx_f_6(?:{'|'.join(prefixes)}))\([^\n;]*\) \{{\n(.*?)^\}}"
    return {match[1]: match[2] for match in re.finditer(head, text, re.MULTILINE | re.DOTALL)}


def test_does_the_machinery_touch_no_python_object(generated_c: str) -> None:
    functions = nogil_functions(generated_c)
    assert len(functions) >= len(list(CORE.glob("*.pxd"))), "the functions are not found in the C"
    broken = []
    for name, body in functions.items():
        code = re.sub(r"/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", "", body, flags=re.DOTALL)
        found = sorted(set(re.findall(r"\b(?:__Pyx_\w+|_?Py[A-Z_]\w+|__pyx_gilstate\w*)", code)))
        if found:
            broken.append(f"{name}: {', '.join(found)}")
    assert not broken, "\n".join(broken)


def test_are_divisions_those_of_c() -> None:
    # Python's `//` and `%` on C integers check for zero under the GIL; C's do not.
    assert directives()["cdivision"] is True
    broken = [
        f"{place}: {match[0]}"
        for path in machinery()
        for place, match in numbered_matches(
            r"(?:#\s*cython:|@?cython\.)\s*(?:cdivision|boundscheck|wraparound|overflowcheck)\b",
            path,
            path.read_text(),
        )
    ]
    assert not broken, "directives are set in setup.py, for all:\n" + "\n".join(broken)


# Sizes.


def python_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def cython_functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first line and length of each function; a function ends where its indent does."""
    lines = path.read_text().splitlines()
    for start, line in enumerate(lines):
        match = re.match(r"(\s*)(?:cdef|cpdef|def)\b[^=]*?\b(\w+)\s*\(", line)
        head = "\n".join(lines[start : start + 8])
        if not match or not re.search(r":\s*$", head, re.MULTILINE):
            continue
        end = last = start
        is_in_head = True
        while end + 1 < len(lines):
            end += 1
            text = lines[end]
            indent = len(text) - len(text.lstrip())
            if not text.strip():
                continue
            is_in_head = is_in_head and text.lstrip().startswith(")")
            if indent <= len(match[1]) and not is_in_head and not text.lstrip().startswith(")"):
                break
            last = end
        yield match[2], start + 1, last - start + 1


def test_does_a_function_fit_a_screen() -> None:
    broken = []
    for path in sources("*.py", "*.pyx", "*.pxi", "*.pxd"):
        found = python_functions(path) if path.suffix == ".py" else cython_functions(path)
        broken += [
            f"{shown(path, line)}: {name} has {length} lines"
            for name, line, length in found
            if length > FUNCTION_LINES
        ]
    assert not broken, f"over {FUNCTION_LINES} lines:\n" + "\n".join(broken)


def test_is_a_core_file_read_in_one_sitting() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in CORE.glob("*.pxd")}
    broken = {name: lines for name, lines in sizes.items() if lines > CORE_FILE_LINES}
    assert not broken, f"over {CORE_FILE_LINES} lines: {broken}"


# Mutants.


def test_does_every_mutant_apply_and_name_a_test() -> None:
    for mutant in read_all():
        mutant.changed(ROOT)
        for test in mutant.tests:
            file, name = test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(), f"{mutant.name}: {test}"


# Leftovers.


def test_is_nothing_left_to_do() -> None:
    # Spelled apart, so that this file may be searched too.
    words = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
    texts = sources("*.py", "*.pyx", "*.pxi", "*.pxd", "*.pyi", "*.md", "*.toml", "Makefile")
    broken = [
        f"{place}: {match[0]}"
        for path in texts
        for place, match in numbered_matches(rf"\b(?:{words})\b", path, path.read_text())
    ]
    assert not broken, "\n".join(broken)


def test_does_the_package_print_nothing() -> None:
    allowed = {"__main__.py", "cli.py"}
    broken = [
        shown(path, node.lineno)
        for path in PACKAGE.rglob("*.py")
        if path.name not in allowed
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    broken += [
        place
        for path in machinery()
        for place, _ in numbered_matches(
            r"(?<![\w.])print\(", path, without_strings(path.read_text())
        )
    ]
    assert not broken, f"the log is for telling: {broken}"


def test_is_no_log_record_given_an_error() -> None:
    """Its text only: a handler may keep the record, it the error, its frames, and they the pool."""
    given = []
    for path in sorted(PACKAGE.glob("*.py")):
        for handler in ast.walk(ast.parse(path.read_text())):
            if not isinstance(handler, ast.ExceptHandler):
                continue
            for call in ast.walk(handler):
                if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("_log."):
                    names = [a.id for a in call.args if isinstance(a, ast.Name)]
                    given += [f"{path.name}:{call.lineno}"] * (handler.name in names)
    assert given == []


def test_does_the_readme_name_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@functools.cache
def tracked_files() -> list[str]:
    told = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return told.stdout.splitlines()


def test_is_nothing_built_kept_in_the_repository() -> None:
    if not tracked_files():
        pytest.skip("this is no git checkout")
    built = (".so", ".c", ".o", ".pyc", ".whl")
    written = {"pyswap/_shim.c"}
    assert not [name for name in tracked_files() if name.endswith(built) and name not in written]


# Linters.


def run_linter(*command: str) -> None:
    """Run a tool of this environment on the project and show what it says."""
    tools = os.path.dirname(sys.executable)
    tool = shutil.which(command[0], path=tools)
    assert tool is not None, f"{command[0]} is not installed beside {sys.executable}: use make test"
    # cython-lint finds pycodestyle by PATH.
    path = os.pathsep.join([tools, os.environ.get("PATH", os.defpath)])
    told = subprocess.run(
        [tool, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_has_ruff_nothing_to_say() -> None:
    run_linter("ruff", "check", "--no-cache", ".")


def test_do_the_types_hold() -> None:
    run_linter("mypy", "--strict", "--package", "pyswap")


def test_has_cython_lint_nothing_to_say() -> None:
    files = [str(path) for path in sources("*.pyx", "*.pxi", "*.pxd")]
    # Its limit is in pyproject.toml: types and nogil clauses make longer lines than Python's.
    run_linter("cython-lint", f"--max-line-length={CYTHON_LINE_LENGTH}", *files)


def test_is_there_a_test_for_each_promise() -> None:
    text = (ROOT / "README.md").read_text()
    promises = text.split("## What pyswap promises when things fail")[1].split("\nNot promised")[0]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for promise in promises.split("\n- ")[1:]:
        named = re.findall(r"`(test_\w+)`", promise)
        assert named, f"no test is named: {promise}"
        missing = [name for name in named if f"def {name}(" not in tests]
        assert not missing, missing

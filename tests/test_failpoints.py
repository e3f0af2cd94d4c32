"""Has every change of the tables a failpoint, and has the release build none of their code?"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_tidy import CORE, PACKAGE, ROOT, without_strings

# What a line does that changes a table.
CHANGES = {
    "a frame's word": r"\b(?:cas|or|and|swap|store)64\(&frame\.word",
    "a frame's pins": r"\bframe\.pins (?:[-+]?=)",
    "a page table entry": r"\b(?:cas|or|and|swap|store)64\(&pool\.pages\[",
    "a slot": r"\b(?:cas|or|and|swap|store)64\(&pool\.slots\[[^\]]*\]\.word",
    "a reference": r"\b(?:cas32|add32|store32|store32_release)\(&(?:pool\.references|counts)\[",
    "a map": r"\bstore64\(&(?:map\[|pool\.map_entries\[|pool\.regions\[r\]\.map\b)",
}
# A frame's state and dirty bit change in here, for setters that have a failpoint each.
SETTERS = r"\bframe_(?:move|mark|unmark)\("

# What changes a frame's lock or hints, or is a part of a setter; map_set() makes the map known.
PARTS = {
    # Steps of a repair, which begins again where it was killed: its own failpoint is between them.
    "copies_repair",
    "frame_recover",
    "references_clear",
    "region_refer",
    "slot_recover",
    "frame_flags",
    "frame_end_lock",
    "frame_mark",
    "frame_move",
    "frame_sleep",
    "frame_trylock",
    "frame_unmark",
    "frame_wait_for",
    "map_begin",
}
# A new frame's descriptor is written after its word says FILLING, where the failpoint is.
BEFORE = {("frame_claim", "a frame's pins")}


def core_texts() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(CORE.glob("*.pxd"))}


def functions(text: str) -> Iterator[tuple[str, list[str]]]:
    """The functions of a Cython file: names and lines, without strings and comments."""
    lines = without_strings(text).splitlines()
    heads = [(n, re.match(r"cdef inline .*?\b(\w+)\(", line)) for n, line in enumerate(lines)]
    starts = [(n, match[1]) for n, match in heads if match]
    ends = [*(n for n, _ in starts[1:]), len(lines)]
    for (start, name), end in zip(starts, ends, strict=False):
        yield name, lines[start:end]


def changes(name: str, line: str) -> list[str]:
    kinds = [kind for kind, pattern in CHANGES.items() if re.search(pattern, line)]
    if name.startswith("frame_set_") and re.search(SETTERS, line):
        kinds.append("a frame's state")
    return [kind for kind in kinds if (name, kind) not in BEFORE]


def changing(texts: dict[str, str]) -> Iterator[tuple[str, str, bool]]:
    """Changes of the tables: place, kind, and whether a failpoint follows in the function."""
    for file, text in texts.items():
        for name, lines in functions(text):
            for n, line in enumerate(lines):
                for kind in changes(name, line) if name not in PARTS else ():
                    after = any("failpoint_visit(" in later for later in lines[n + 1 :])
                    yield f"{file}: {name}: {line.strip()}", kind, after


def test_has_every_change_of_the_tables_a_failpoint() -> None:
    found = list(changing(core_texts()))
    assert {kind for _, kind, _ in found} == {*CHANGES, "a frame's state"}, "none found"
    assert len(found) >= 25
    bare = [place for place, _, visited in found if not visited]
    assert not bare, "name a failpoint, and visit it after:\n" + "\n".join(bare)


def test_is_a_failpoint_missed_when_it_is_taken_out() -> None:
    texts = core_texts()
    missed = []
    for file, text in texts.items():
        for name, lines in functions(text):
            last = [n for n, line in enumerate(lines) if "failpoint_visit(" in line][-1:]
            if name in PARTS or not last or not any(changes(name, x) for x in lines[: last[0]]):
                continue
            without = [line for n, line in enumerate(lines) if n != last[0]]
            missed.append((name, all(seen for *_, seen in changing({file: "\n".join(without)}))))
    assert len(missed) >= 20
    assert [name for name, unseen in missed if unseen] == []


def enumerated() -> list[str]:
    (body,) = re.findall(r"cdef enum failpoint:\n((?: +.*\n)+)", core_texts()["lock.pxd"])
    return re.findall(r"^ +FP_(\w+)", body, re.MULTILINE)


def test_is_every_failpoint_named_and_visited() -> None:
    debug = (PACKAGE / "_fast_debug.pyx").read_text()
    (names,) = re.findall(r"FAILPOINT_NAMES = \(([^)]*)\)", debug)
    assert re.findall(r'"(\w+)"', names) == [name.lower() for name in enumerated()]
    lines = "\n".join(core_texts().values()).splitlines()
    visits = [line for line in lines if "failpoint_visit(" in line]
    visited = {name for visit in visits for name in re.findall(r"\bFP_(\w+)", visit)}
    assert set(enumerated()) == visited


# The release build.


def traces(name: str, tmp_path: Path) -> set[str]:
    """What a built extension has of failpoints, its own symbols left out."""
    found = sorted(PACKAGE.glob(f"{name}.*.so"))
    if not found:
        pytest.skip(f"{name} is not built here")
    built = found[-1]
    bare = tmp_path / built.name
    subprocess.run(["objcopy", "--strip-all", str(built), str(bare)], check=True)
    told = subprocess.run(["nm", "-D", str(bare)], capture_output=True, text=True, check=True)
    names = f"import pyswap.{name} as n; print(*(x for x in dir(n) if 'fail' in x.lower()))"
    listed = subprocess.run(
        [sys.executable, "-c", names], capture_output=True, text=True, check=True, cwd=ROOT
    )
    content = bare.read_bytes().lower()
    words = {word for word in ("failpoint", "failing_calls") if word.encode() in content}
    # Nothing else in there kills or stops its own process.
    return (
        words
        | set(listed.stdout.split())
        | set(re.findall(r"\b(raise)(?:@\S+)?$", told.stdout, re.MULTILINE))
    )


@pytest.mark.skipif(not shutil.which("objcopy"), reason="binutils are not installed")
def test_has_the_release_build_none_of_their_code(tmp_path: Path) -> None:
    assert traces("_fast", tmp_path) == set()
    # The question is one that another answer is possible to.
    there = {"raise", "failpoint", "FAILPOINT_NAMES", "failing_calls", "call_to_fail"}
    assert traces("_fast_debug", tmp_path) >= there

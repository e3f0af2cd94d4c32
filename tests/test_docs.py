"""Is what docs/ says true?  Each page's Python is one program, whose output must be the page's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Its page needs torch, which only make test-extras installs.
EXTRAS = ("dataloader.md",)

LIMIT_S = 120


def pages() -> list[object]:
    names = sorted(path.name for path in DOCS.glob("*.md"))
    return [
        pytest.param(name, marks=pytest.mark.extras) if name in EXTRAS else name for name in names
    ]


def blocks(name: str, kind: str) -> list[str]:
    return [text for what, text in BLOCK.findall((DOCS / name).read_text()) if what == kind]


def run(command: list[str], folder: Path) -> str:
    tools = os.path.dirname(sys.executable)
    told = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join([tools, os.environ.get("PATH", os.defpath)])},
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stderr == ""
    return told.stdout


@pytest.mark.parametrize("name", pages())
def test_does_a_page_print_what_it_says(name: str, tmp_path: Path) -> None:
    program = "\n".join(blocks(name, "python"))
    assert program, f"{name} shows no code"
    # A file, since what is spawned imports it again.
    (tmp_path / "page.py").write_text(program)
    assert run([sys.executable, "page.py"], tmp_path) == "".join(blocks(name, "text"))


@pytest.mark.parametrize("name", pages())
def test_do_a_pages_commands_work(name: str, tmp_path: Path) -> None:
    for text in blocks(name, "sh"):
        assert run(["sh", "-ec", text], tmp_path)


def test_has_the_readme_a_way_to_every_page() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    missing = [path.name for path in DOCS.glob("*.md") if f"docs/{path.name}" not in readme]
    assert not missing


def test_do_links_lead_somewhere() -> None:
    for path in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_is_every_block_of_a_kind_that_is_run() -> None:
    kinds = {what for path in DOCS.glob("*.md") for what, _ in BLOCK.findall(path.read_text())}
    assert kinds <= {"python", "text", "sh"}
    assert all(path.read_text().count("```") % 2 == 0 for path in DOCS.glob("*.md"))

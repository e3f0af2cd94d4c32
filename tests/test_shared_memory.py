"""Are SharedMemory and ShareableList those of multiprocessing, but swappable?"""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import shared_memory as standard
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workers import until

import pyswap
from pyswap import default, registry
from pyswap.shared_memory import ShareableList, SharedMemory

LIMIT_S = 60


@pytest.fixture(autouse=True)
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A default pool of this test's own, with a registry of its own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096) as made:
        monkeypatch.setattr(default, "_pool", made)
        yield made


def names() -> list[str]:
    return [p.name for p in registry.folder().iterdir() if p.name.startswith("shm")]


def test_has_it_the_standard_ones_attributes() -> None:
    for ours, theirs in (
        (SharedMemory, standard.SharedMemory),
        (ShareableList, standard.ShareableList),
    ):
        public = {name for name in dir(theirs) if not name.startswith("_")}
        assert public <= set(dir(ours))
    parameters = inspect.signature(SharedMemory).parameters
    assert list(parameters) == ["name", "create", "size", "track"]
    assert parameters["track"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"create": True, "size": -1}),
        (ValueError, {"create": True, "size": 0}),
        (ValueError, {"create": True}),
        (ValueError, {}),
        (ValueError, {"name": "x", "size": -1}),
        (FileNotFoundError, {"name": "not there"}),
        (TypeError, {"create": True, "size": "a"}),
    ],
)
def test_are_its_errors_the_standard_ones(error: type[Exception], arguments: Any) -> None:
    for kind in (SharedMemory, standard.SharedMemory):
        with pytest.raises(error):
            kind(**arguments)
    assert names() == []


def test_is_a_block_what_the_standard_one_is(pool: Any) -> None:
    one = SharedMemory("pyswap-block", create=True, size=10_000, track=False)
    assert (one.name, one.size, len(one.buf), one.buf.format) == (
        "pyswap-block",
        10_000,
        10_000,
        "B",
    )
    assert repr(one) == "SharedMemory('pyswap-block', size=10000)"
    assert bytes(one.buf) == bytes(10_000)
    with pytest.raises(FileExistsError):
        SharedMemory("pyswap-block", create=True, size=5)
    one.buf[42] = 7
    two = SharedMemory("pyswap-block", track=True)
    assert (two.size, two.buf[42]) == (10_000, 7)
    two.buf[43] = 8
    assert one.buf[43] == 8
    three = pickle.loads(pickle.dumps(one))
    assert (three.name, three.size, three.buf[43]) == (one.name, one.size, 8)
    assert pool.stats().committed_bytes == 12_288
    view = np.ndarray(10_000, np.uint8, buffer=one.buf)
    for block in (one, two, three):
        block.close()
        block.close()
        assert block.buf is None
    # Nothing is pulled from under an array over it.
    assert view[42:44].tolist() == [7, 8]
    del view
    # Closed everywhere, it lives as long as its name.
    four = SharedMemory("pyswap-block")
    assert four.buf[42] == 7
    four.unlink()
    assert four.buf[42] == 7
    for block in (one, four):
        with pytest.raises(FileNotFoundError):
            block.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory("pyswap-block")
    four.close()
    until(lambda: pool.stats().committed_bytes == 0, "nothing keeps it any more")


def test_does_nobody_unlink_what_took_the_name_since() -> None:
    first = SharedMemory("again", create=True, size=5)
    first.unlink()
    second = SharedMemory("again", create=True, size=6)
    with pytest.raises(FileNotFoundError, match="before"):
        first.unlink()
    assert SharedMemory("again").size == 6
    second.unlink()
    assert names() == []


def test_is_a_size_refused_that_is_no_whole_number() -> None:
    # The standard one raises the same, and leaves a block behind.
    with pytest.raises(TypeError):
        SharedMemory(create=True, size=1.5)  # type: ignore[arg-type]
    assert names() == []


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    "name", ["a/b", "x/", "", "/", "//", ".", "/..", "x" * 256, "x" * 5000, 5, b"x", 1.5, "\udc80"]
)
def test_is_a_name_refused_that_the_standard_one_refuses(name: Any, create: bool) -> None:
    said = []
    for kind in (SharedMemory, standard.SharedMemory):
        with pytest.raises((OSError, TypeError, ValueError)) as caught:
            kind(name, create=create, size=10)
        said.append((type(caught.value), getattr(caught.value, "errno", None)))
    # How long is too long the C library and the file system say, each in its way.
    assert said[0] == said[1] or (len(name) > 255 and said[0][0] is said[1][0])
    assert names() == []
    assert default._pool is not None
    assert default._pool.stats().committed_bytes == 0


def test_is_a_name_the_same_with_a_slash_before_it() -> None:
    block = SharedMemory("/slash", create=True, size=10)
    with pytest.raises(FileExistsError):
        SharedMemory("slash", create=True, size=10)
    again = SharedMemory("slash")
    block.buf[0] = 9
    assert (block.name, again.name, again.buf[0]) == ("/slash", "slash", 9)
    again.unlink()
    assert names() == []


def test_is_a_made_up_name_free_and_any_text_a_name() -> None:
    blocks = [SharedMemory(create=True, size=1) for _ in range(5)]
    assert len({block.name for block in blocks}) == 5
    blocks += [SharedMemory(name, create=True, size=1) for name in ("a b", "...", "\n", "x" * 250)]
    for block in blocks:
        assert SharedMemory(block.name).size == 1
        block.unlink()
    assert names() == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_does_a_child_write_to_it(method: str) -> None:
    block = SharedMemory(create=True, size=100)
    process: Any = multiprocessing.get_context(method).Process(target=write, args=(block,))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == 0
    process.close()
    assert block.buf[3] == 33
    again = SharedMemory(block.name)
    assert again.buf[3] == 33
    block.unlink()


def write(block: SharedMemory) -> None:
    block.buf[3] = 33
    block.close()


def test_does_an_unrelated_process_find_it_and_leave_it() -> None:
    block = SharedMemory("unrelated", create=True, size=100)
    code = """if True:
        from pyswap import SharedMemory
        block = SharedMemory("unrelated")
        block.buf[5] = 55
        block.close()
        other = SharedMemory("unrelated")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
    assert block.buf[5] == 55
    again = SharedMemory("unrelated")
    assert again.buf[5] == 55
    block.unlink()


def test_does_it_end_with_its_pool(pool: Any) -> None:
    block = SharedMemory("ends", create=True, size=100)
    block.buf[0] = 1
    pool.close()
    assert block.buf[0] == 1
    block.close()
    until(lambda: not exists("ends"), "its pool ends")
    block.close()
    with pytest.raises(FileNotFoundError):
        block.unlink()


def exists(name: str) -> bool:
    try:
        registry.look_up(name)
    except FileNotFoundError:
        return False
    return True


def test_is_a_block_swapped(pool: Any) -> None:
    blocks = [SharedMemory(create=True, size=4 << 20) for _ in range(6)]
    for i, block in enumerate(blocks):
        np.frombuffer(block.buf, np.uint8)[:] = i + 1
    assert pool.stats().evictions > 1000
    for i, block in enumerate(blocks):
        assert (np.frombuffer(block.buf, np.uint8) == i + 1).all()
        block.unlink()


def test_is_a_list_what_the_standard_one_is() -> None:
    values = [b"howdy", "HoWdY", 7, -2.5, True, None, b"x" * 100, "", 1 << 40]
    ours, theirs = ShareableList(values), standard.ShareableList(values)
    try:
        assert list(ours) == list(theirs) == values
        assert ours.format == theirs.format
        assert ours.shm.size == theirs.shm.size
        assert repr(ours) == repr(theirs).replace(theirs.shm.name, ours.shm.name)
        assert type(ours.shm) is SharedMemory
        again = ShareableList(name=ours.shm.name)
        for each in (ours, theirs):
            each[0], each[2] = b"abc", 8
            with pytest.raises(ValueError, match="exceeds available storage"):
                each[1] = "far too long for what was there"
            with pytest.raises(IndexError):
                each[100]
        assert again[0] == b"abc"
        assert (again.index(8), again.count(None)) == (2, 1)
        loaded = pickle.loads(pickle.dumps(ours))
        assert type(loaded) is ShareableList
        assert list(loaded) == list(ours) == list(theirs)
        for each in (again, loaded):
            each.shm.close()
    finally:
        theirs.shm.close()
        theirs.shm.unlink()
        ours.shm.close()
        ours.shm.unlink()
    assert names() == []

"""Private arrays: each process's own after fork, over pages shared until they are written."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import references_of
from physical import frames_of
from workers import Worker, until, workers

import pyswap

pytestmark = pytest.mark.core

WORDS = 512
"""64-bit words of the pages of the `pool` fixture."""
PAGES = 48


def read(a: Any, low: int = 0, high: int | None = None) -> bytes:
    return bytes(a[low:high].tobytes())


def first_words(a: Any) -> list[int]:
    """The first word of every page."""
    return [int(n) for n in a[::WORDS]]


def set_page(a: Any, page: int, value: int) -> None:
    a[page * WORDS] = value


def made(pool: pyswap.Pool, pages: int = PAGES) -> Any:
    """A private array whose pages' first words are their numbers, from 1 on."""
    a = pool.zeros(pages * WORDS, np.int64, private=True)
    a[::WORDS] = np.arange(1, pages + 1)
    return a


def evict(pool: pyswap.Pool, a: Any) -> None:
    def is_out() -> bool:
        pool.advise(a, "pageout")
        return not pool.residency(a).any()

    until(is_out, "the array is paged out")


def balance(pool: pyswap.Pool) -> tuple[int, int, int]:
    """What arrays have in the pool: committed bytes, and pages in memory or in swap."""
    now = pool.stats()
    return now.committed_bytes, now.swap_used_bytes, now.workers


@pytest.fixture
def tight() -> Iterator[pyswap.Pool]:
    """A pool whose 256 frames are fewer than the pages of the arrays in it."""
    with pyswap.Pool("1 MiB", "64 MiB", page_size=4096) as made_small:
        yield made_small
        made_small.check()


def test_has_everybody_an_array_of_its_own(pool: pyswap.Pool) -> None:
    a = made(pool)
    words = first_words(a)

    def grandchild_writes(inherited: Any) -> None:
        with workers(inherited, 1) as (below,):
            below.ask(set_page, 3, -3)
            assert below.ask(first_words)[3] == -3
            assert first_words(inherited)[3] == 4
            assert below.ask(first_words)[:3] == first_words(inherited)[:3]

    with workers(a, 2) as (one, other):
        set_page(a, 0, -1)
        one.ask(set_page, 1, -2)
        other.ask(set_page, 1, -20)
        assert first_words(a) == [-1, *words[1:]]
        assert one.ask(first_words) == [words[0], -2, *words[2:]]
        assert other.ask(first_words) == [words[0], -20, *words[2:]]
        # A function of this test travels to nobody: the grandchild is this process's child's.
        pid = os.fork()
        if pid == 0:
            try:
                grandchild_writes(a)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        evict(pool, a)
        assert first_words(a) == [-1, *words[1:]]
        assert one.ask(first_words) == [words[0], -2, *words[2:]]


def test_is_only_the_written_page_copied(pool: pyswap.Pool) -> None:
    a = made(pool)
    with workers(a, 1) as (child,):
        before = pool.stats().cow_copies
        for page in (0, 7, 30):
            child.ask(set_page, page, 9)
            child.ask(set_page, page, 10)
        assert pool.stats().cow_copies - before == 3
        assert child.ask(first_words)[7] == 10
        assert first_words(a)[7] == 8


def test_is_the_copy_the_writers(pool: pyswap.Pool, require: Callable[[str], None]) -> None:
    require("root")
    a = made(pool)
    with workers(a, 2) as (child, sibling):
        before = frames_of(a)
        assert child.ask(frames_of) == sibling.ask(frames_of) == before
        for page in (0, 7, 30):
            child.ask(set_page, page, 9)
        # Who did not write keeps the memory; who did has other memory for what it wrote.
        assert frames_of(a) == sibling.ask(frames_of) == before
        assert differing(child.ask(frames_of), before) == [0, 7, 30]
        set_page(a, 12, -1)
        assert differing(frames_of(a), before) == [12]
        assert sibling.ask(frames_of) == before


def differing(some: list[int], others: list[int]) -> list[int]:
    return [i for i in range(len(others)) if some[i] != others[i]]


def test_does_the_last_sharer_write_in_place(pool: pyswap.Pool) -> None:
    a = made(pool)
    with workers(a, 1) as (child,):
        child.ask(set_page, 5, -1)
        # The child goes on as soon as its copy is mapped, a moment before it gives the page up.
        until(lambda: references_of(pool, a[5 * WORDS :]) == 1, "the page is the parent's alone")
        before = pool.stats().cow_copies
        # The child has a copy of this one; after its end, all the others are the parent's alone.
        set_page(a, 5, 77)
        assert pool.stats().cow_copies == before
        assert child.ask(first_words)[5] == -1
    until(lambda: pool.stats().workers == 1, "the child is gone")
    a[::WORDS] = 5
    assert pool.stats().cow_copies == before
    assert first_words(a) == [5] * PAGES


def test_are_pages_that_came_back_from_swap_still_shared(
    pool: pyswap.Pool, require: Callable[[str], None]
) -> None:
    require("root")
    a = made(pool)
    words = first_words(a)
    with workers(a, 3) as crew:
        for _ in range(3):
            before = pool.stats().slot_reads
            evict(pool, a)
            everyone = [frames_of(a)] + [worker.ask(frames_of) for worker in crew]
            assert all(frames == everyone[0] for frames in everyone)
            assert len(set(everyone[0])) == PAGES
            assert pool.stats().slot_reads - before == PAGES
        crew[0].ask(set_page, 4, -4)
        evict(pool, a)
        for worker in crew:
            worker.ask(read)
        mine, theirs = frames_of(a), crew[0].ask(frames_of)
        assert differing(mine, theirs) == [4]
        assert crew[1].ask(frames_of) == mine
        assert [worker.ask(first_words) for worker in crew[1:]] == [words, words]


@pytest.mark.parametrize("where", ["untouched", "in swap", "in memory"])
def test_is_a_page_copied_right_wherever_it_is(pool: pyswap.Pool, where: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = pool.zeros(PAGES * WORDS, np.int64, private=True)
    model = np.zeros(len(a), np.int64)
    if where != "untouched":
        model[:] = rng.integers(1, 1 << 62, len(a))
        a[:] = model
    with workers(a, 2) as (one, other):
        if where == "in swap":
            evict(pool, a)
        one.ask(set_page, 7, 1)
        set_page(a, 9, 2)
        mine, theirs = model.copy(), model.copy()
        theirs[7 * WORDS], mine[9 * WORDS] = 1, 2
        assert one.ask(read) == theirs.tobytes()
        assert read(a) == mine.tobytes()
        assert other.ask(read) == model.tobytes()


@pytest.mark.parametrize("killed", [False, True])
def test_does_a_childs_end_give_everything_back(pool: pyswap.Pool, killed: bool) -> None:
    a = made(pool, 3 * 128)
    evict(pool, a)
    before = balance(pool)
    for _ in range(3):
        with workers(a, 3) as crew:
            for i, worker in enumerate(crew):
                for page in range(i, 300, 5):
                    worker.ask(set_page, page, -1)
            assert pool.stats().committed_bytes > before[0]
            for worker in crew:
                worker.kill() if killed else worker.end()
        until(lambda: pool.stats().workers == 1, "the children are gone")
        evict(pool, a)
        until(lambda: balance(pool) == before, f"{before} again, not {balance(pool)}")
        assert first_words(a) == list(range(1, 3 * 128 + 1))
        # Nobody has a reference any more: what is written now is not copied.
        copies = pool.stats().cow_copies
        a[::WORDS] += 0
        assert pool.stats().cow_copies == copies
        evict(pool, a)
    pool.check()


def test_is_nothing_of_a_family_left_after_the_last_one(pool: pyswap.Pool) -> None:
    a = made(pool, 200)
    with workers(a, 2) as crew:
        for worker in crew:
            worker.ask(set_page, 3, 1)
        del a
        assert crew[0].ask(first_words)[4] == 5
    until(lambda: balance(pool) == (0, 0, 1), f"nothing, not {balance(pool)}")
    until(lambda: pool.stats().resident_pages == 0, "no page is left")
    assert os.fstat(pool.fileno()).st_blocks == 0
    b = made(pool, 200)
    assert read(b, 1, WORDS) == bytes(8 * (WORDS - 1))


def test_do_copies_over_the_commitment_end_their_writer_only(
    pool: pyswap.Pool, capfd: pytest.CaptureFixture[str]
) -> None:
    rest = []
    while True:
        try:
            rest.append(pool.zeros(16 * WORDS, np.int64))
        except MemoryError:
            break
    del rest[-4:]
    a = made(pool, 60)
    with workers(a, 2) as (greedy, modest):
        modest.ask(set_page, 0, -1)
        greedy.send(write_all_pages, 60)
        assert greedy.wait() == -signal.SIGBUS
        assert modest.ask(first_words) == [-1, *range(2, 61)]
        assert first_words(a) == list(range(1, 61))
    assert capfd.readouterr().err.count("no room for its copy") == 1


def write_all_pages(a: Any, pages: int) -> None:
    for page in range(pages):
        set_page(a, page, -7)


# Snapshots.


def test_is_a_snapshot_made_without_a_copy(tight: pyswap.Pool) -> None:
    pool, pages = tight, 3 * 256
    a = made(pool, pages)
    # Some pages are in memory and clean, most are in swap, and nothing is on its way in or out.
    evict(pool, a)
    pool.advise(a, "random")
    assert first_words(a[: 60 * WORDS]) == list(range(1, 61))
    before, held = pool.stats(), os.fstat(pool.fileno()).st_blocks
    b = a.snapshot()
    after = pool.stats()
    assert os.fstat(pool.fileno()).st_blocks == held == 60 * 8
    for name in ("cow_copies", "major_faults", "slot_reads", "slot_writes", "swap_used_bytes"):
        assert getattr(after, name) == getattr(before, name), name
    assert isinstance(b, pyswap.PagedArray)
    b[:: 2 * WORDS] = -1
    a[WORDS :: 2 * WORDS] = -2
    assert pool.stats().cow_copies == pages
    evictions = pool.stats().evictions
    for _ in range(2):
        numbers = np.arange(1, pages + 1)
        assert first_words(b) == np.where(numbers % 2 == 1, -1, numbers).tolist()
        assert first_words(a) == np.where(numbers % 2 == 0, -2, numbers).tolist()
        evict(pool, a)
        evict(pool, b)
    # There and back, twice: each array is three times the memory.
    assert pool.stats().evictions - evictions >= 3 * pages


def test_has_a_snapshot_of_a_view_its_shape_and_flags(pool: pyswap.Pool) -> None:
    a = pool.array(np.arange(24 * WORDS).reshape(24, WORDS), private=True)
    view = a[20:2:-3, 5::7]
    view.flags.writeable = False
    b = view.snapshot()
    assert (b.shape, b.strides, b.dtype) == (view.shape, view.strides, view.dtype)
    assert not b.flags.writeable
    expected = np.array(view)
    a[:] = 0
    assert (b == expected).all()
    again = b.snapshot()
    del a, view, b
    assert (again == expected).all()


def test_do_snapshots_come_and_go(pool: pyswap.Pool) -> None:
    a = made(pool, 100)
    before = balance(pool)
    versions = []
    for i in range(20):
        set_page(a, i, -i)
        versions.append(a.snapshot())
    for i, b in enumerate(versions):
        assert first_words(b) == [-n if n <= i else n + 1 for n in range(100)]
    with workers(versions, 1) as (child,):
        assert child.ask(words_of_version, 7) == first_words(versions[7])
    del versions, b
    evict(pool, a)
    until(lambda: balance(pool)[0] == before[0], "the snapshots are gone")
    assert first_words(a) == [-n if n < 20 else n + 1 for n in range(100)]


def words_of_version(versions: Any, i: int) -> list[int]:
    return first_words(versions[i])


@pytest.mark.parametrize("pages", [24, 600])
def test_is_every_page_protected_that_was_written_since_the_last_snapshot(
    pool: pyswap.Pool, pages: int
) -> None:
    """Of two arrays whose frames lie among each other: who looks for one's meets the other's."""
    a = pool.zeros(pages * WORDS, np.int64, private=True)
    b = pool.zeros(pages * WORDS, np.int64, private=True)
    for page in range(pages):
        set_page(a, page, page + 1)
        set_page(b, page, page + 1)
    wanted = list(range(1, pages + 1))
    for change in range(1, 4):
        snapshots = [a.snapshot(), b.snapshot()]
        seen = [first_words(s) for s in snapshots]
        assert seen == [wanted, wanted]
        for page in range(change, pages, change):
            for array in (a, b):
                set_page(array, page, 1000 * change + page)
        assert [first_words(s) for s in snapshots] == seen
        wanted = first_words(a)
        assert first_words(b) == wanted
    pool.check()


def test_is_what_a_fork_needs_kept_for_the_next_and_given_back(pool: pyswap.Pool) -> None:
    """Memory for a child's page ids and map, which costs more than the rest of a fork."""
    a = made(pool, 1 << 10)

    def fork_once() -> None:
        with workers(a, 1) as (child,):
            assert child.ask(first_words) == list(range(1, (1 << 10) + 1))

    before = pool.stats().metadata_bytes
    fork_once()
    # The array's own map and references stay; a child has a map and two runs of page ids.
    own, child = (8 + 4) * len(a) // WORDS, (8 + 2 * (8 + 4)) * len(a) // WORDS
    kept = pool.stats().metadata_bytes
    assert kept >= before + own + child
    until(lambda: pool.stats().workers == 1, "the child is gone")
    until(lambda: pool.stats().metadata_bytes <= kept - child, "what was kept is given back")
    fork_once()
    assert pool.stats().metadata_bytes <= kept
    pool.check()


def test_has_a_shared_array_no_snapshot(pool: pyswap.Pool) -> None:
    with pytest.raises(TypeError, match="every process sees every write"):
        pool.zeros(3).snapshot()


def test_are_snapshots_bounded(pool: pyswap.Pool) -> None:
    a = pool.zeros(3, private=True)
    versions = [a.snapshot() for _ in range(127)]
    with pytest.raises(MemoryError, match="128 snapshots"):
        a.snapshot()
    del versions
    a.snapshot()


# Pins, and the rest of the interface.


@pytest.mark.parametrize("writable", [False, True])
def test_does_a_pin_stay_through_fork_and_copies(pool: pyswap.Pool, writable: bool) -> None:
    a = made(pool)
    with workers(a, 1):
        # The pages are shared with the child: pinning makes them this process's own.
        with pool.pin(a[: 4 * WORDS], writable=writable), workers(a, 1) as (child,):
            assert child.ask(first_words) == first_words(a)
            copies = pool.stats().cow_copies
            set_page(a, 0, -1)
            assert pool.stats().cow_copies == copies
            pool.advise(a, "pageout")
            assert pool.residency(a).tolist() == [True] * 4 + [False] * (PAGES - 4)
            assert child.ask(first_words)[0] == 1
            child.ask(set_page, 1, -2)
            assert first_words(a)[:3] == [-1, 2, 3]
        assert pool.stats().pinned_pages == 0


def test_are_private_arrays_made_by_every_constructor(pool: pyswap.Pool, tmp_path: Path) -> None:
    source = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "saved.npy", source)
    calls: dict[str, tuple[Any, ...]] = {
        "array": (source,),
        "asarray": (source,),
        "empty": ((2, 3),),
        "empty_like": (source,),
        "fromfile": (tmp_path / "saved.npy",),
        "full": ((2, 3), 7),
        "full_like": (source, 7),
        "load": (tmp_path / "saved.npy",),
        "ones": ((2, 3),),
        "ones_like": (source,),
        "zeros": ((2, 3),),
        "zeros_like": (source,),
    }
    assert set(calls) == {
        name
        for name, made_by in inspect.getmembers(pyswap.Pool, callable)
        if name[0] != "_" and "private" in inspect.signature(made_by).parameters
    }
    for name, arguments in calls.items():
        each = getattr(pool, name)(*arguments, private=True)
        before = np.array(each)
        with workers(each, 1) as (child,):
            each[:] = -1
            assert child.ask(np.array).tobytes() == before.tobytes(), name
            assert isinstance(each.snapshot(), pyswap.PagedArray)
    a = pool.array(source, private=True)
    assert pool.asarray(a, private=True) is a
    assert pool.asarray(a) is not a


def test_is_a_private_array_not_released_for_others(pool: pyswap.Pool) -> None:
    with pytest.raises(ValueError, match="each process's own"):
        pool.release(pool.zeros(3, private=True))


def test_is_a_private_file_read_in_pieces(pool: pyswap.Pool, tmp_path: Path) -> None:
    values = np.arange(200 * WORDS)
    values.tofile(tmp_path / "numbers")
    a = pool.fromfile(tmp_path / "numbers", np.int64, private=True)
    with workers(a, 1) as (child,):
        a.tofile(tmp_path / "again")
        a[:] = 0
        assert child.ask(read) == values.tobytes()
    assert (tmp_path / "again").read_bytes() == values.tobytes()


def test_stays_everything_right_under_random_work(tight: pyswap.Pool, seed: int) -> None:
    pool = tight
    rng = np.random.default_rng(seed)
    a = pool.zeros(250 * WORDS, np.int64, private=True)
    model = np.zeros(len(a), np.int64)
    before = pool.stats()
    for _ in range(6):
        with workers(a, 3) as crew:
            models = [model, *(model.copy() for _ in crew)]
            for _ in range(120):
                who = int(rng.integers(4))
                low = int(rng.integers(len(a)))
                values = rng.integers(1 << 62, size=min(int(rng.integers(1, 2500)), len(a) - low))
                models[who][low : low + len(values)] = values
                if who == 0:
                    write(a, low, values)
                else:
                    crew[who - 1].ask(write, low, values)
                who = int(rng.integers(4))
                low = int(rng.integers(len(a)))
                high = min(low + 20 * WORDS, len(a))
                got = read(a, low, high) if who == 0 else crew[who - 1].ask(read, low, high)
                assert got == models[who][low:high].tobytes()
            for worker, expected in zip(crew, models[1:], strict=True):
                assert worker.ask(read) == expected.tobytes()
            assert read(a) == model.tobytes()
    after = pool.stats()
    print(
        f"{after.major_faults - before.major_faults} major faults, "
        f"{after.cow_copies} copies, {after.evictions} evictions"
    )
    assert after.cow_copies > 1000
    assert after.evictions > 2000


def write(a: Any, low: int, values: np.ndarray[Any, Any]) -> None:
    a[low : low + len(values)] = values


def test_do_forks_one_after_another_leave_nothing(pool: pyswap.Pool) -> None:
    a = made(pool, 200)
    fds = len(os.listdir(f"/proc/{pool.swapper_pid}/fd"))
    sizes = []
    for round_number in range(4):
        for i in range(50):
            child = Worker(a)
            child.ask(set_page, (7 * i) % 200, -1)
            set_page(a, i, round_number)
            child.finish()
        until(lambda: pool.stats().workers == 1, "the children are gone")
        until(lambda: len(os.listdir(f"/proc/{pool.swapper_pid}/fd")) == fds, "no fd is left")
        sizes.append(pool.stats().metadata_bytes)
    assert first_words(a) == [3] * 50 + list(range(51, 201))
    assert pool.stats().committed_bytes == 200 * 4096
    assert sizes[-1] == sizes[0]

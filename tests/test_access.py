"""Who gets in, and what is seen of what was there before?

A stranger is another user's Python. What it tries in vain, the pool's user can do: each attempt is
made by both.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NOBODY_UID, SYSTEM_PYTHON
from failpoints import page_id
from workers import Worker, until, workers

import pyswap
from pyswap import config, segments
from pyswap._native import native
from pyswap.settings import resolve

WORDS = 512
PAGE_BYTES = 4096
PAGES = 256
SECRET = 0x5EC4E70FA0EAD

STRANGER = r"""
import ctypes, json, os, sys

libc = ctypes.CDLL(None, use_errno=True)
PIDFD_GETFD = 438

def steal(pid, fd):
    pidfd = os.pidfd_open(pid)
    got = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
    os.close(pidfd)
    if got < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    os.close(got)

def opened(path, flags):
    os.close(os.open(path, flags))

told = []
for kind, *what in json.load(sys.stdin):
    try:
        {"open": opened, "list": os.listdir, "steal": steal, "unlink": os.unlink,
         "rename": os.rename}[kind](*what)
        told.append(0)
    except OSError as error:
        told.append(error.errno)
print(json.dumps(told))
"""


def attempt(what: list[list[Any]], uid: int) -> list[int]:
    """Have a user's Python try things; the errno of each, 0 where it came through."""
    told = subprocess.run(
        [SYSTEM_PYTHON, "-c", STRANGER],
        input=json.dumps(what),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.defpath},
        user=uid,
        group=uid,
        extra_groups=[],
        timeout=60,
    )
    assert told.returncode == 0, told.stderr
    errors: list[int] = json.loads(told.stdout)
    assert len(errors) == len(what)
    return errors


def refused(what: list[list[Any]]) -> None:
    """Nobody may do any of it."""
    errors = attempt(what, NOBODY_UID)
    let_in = [each for each, error in zip(what, errors, strict=True) if error == 0]
    assert not let_in, f"another user got in: {let_in}"
    assert set(errors) <= {errno.EACCES, errno.EPERM}, list(zip(what, errors, strict=True))


def fds_of(pid: int) -> list[tuple[int, str]]:
    """A process's descriptors, and what they are of."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # The descriptor by which the folder was listed is closed by now.
        with suppress(FileNotFoundError):
            found.append((int(link.name), os.readlink(link)))
    return found


def fd_of(pool: pyswap.Pool, label: str) -> str:
    """The path by which root may open a segment that the swapper has."""
    found = [fd for fd, name in fds_of(pool.swapper_pid) if f"pyswap.{label}" in name]
    assert len(found) == 1, fds_of(pool.swapper_pid)
    return f"/proc/{pool.swapper_pid}/fd/{found[0]}"


def touch_all(a: Any) -> int:
    return int(a[::WORDS].sum())


@pytest.mark.core
def test_may_another_user_open_what_a_pools_processes_have(
    pool: pyswap.Pool, require: Callable[[str], None]
) -> None:
    require("user")
    a = pool.full(PAGES * WORDS, SECRET, np.int64)
    pool.advise(a, "pageout")
    with workers(a, 1) as (child,):
        child.ask(touch_all)
        tries: list[list[Any]] = []
        for pid in (os.getpid(), child.pid, pool.swapper_pid):
            tries += [["list", f"/proc/{pid}/fd"], ["list", f"/proc/{pid}/map_files"]]
            tries += [["open", f"/proc/{pid}/mem", os.O_RDONLY]]
            for fd, name in fds_of(pid):
                if "pyswap" in name or "#" in name or "userfaultfd" in name or "socket" in name:
                    tries.append(["steal", pid, fd])
                if "pyswap" in name or "#" in name:
                    path = f"/proc/{pid}/fd/{fd}"
                    tries += [["open", path, os.O_RDONLY], ["open", path, os.O_RDWR]]
        kinds = [kind for kind, *_ in tries]
        assert kinds.count("open") > 10
        assert kinds.count("steal") > 10
        # What one may not who is not the pool's user, one may who is.
        ours = attempt(tries, os.geteuid())
        assert ours.count(0) == len(tries), list(zip(tries, ours, strict=True))
        refused(tries)


def test_may_another_user_open_a_segment_while_it_has_a_name(
    require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("user")
    tried = []
    unlink = segments.posix_ipc.unlink_shared_memory

    def try_and_unlink(name: str) -> None:
        path = f"/dev/shm{name}"
        opens = [["open", path, os.O_RDONLY], ["open", path, os.O_RDWR]]
        assert attempt(opens, os.geteuid()) == [0, 0]
        refused([*opens, ["unlink", path], ["rename", path, f"{path}.mine"]])
        tried.append(name)
        unlink(name)

    monkeypatch.setattr(segments.posix_ipc, "unlink_shared_memory", try_and_unlink)
    before = os.umask(0)
    try:
        with closing_fd(segments.create_segment("store", 1 << 20, 0)):
            assert len(tried) == 1
    finally:
        os.umask(before)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def without_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no nameless files."""
    real_open = os.open

    def refusing_open(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), str(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing_open)


@pytest.mark.parametrize("has_name", [False, True], ids=["nameless", "named"])
def test_may_another_user_open_the_swap_file(
    has_name: bool, tmp_path: Path, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    require("user")
    folder = public_folder(tmp_path)
    tried = []
    unlink = os.unlink

    def try_and_unlink(path: Any) -> None:
        name = os.fspath(path)
        opens = [["open", name, os.O_RDONLY], ["open", name, os.O_RDWR]]
        refused([*opens, ["unlink", name], ["rename", name, f"{name}.mine"]])
        tried.append(name)
        unlink(path)

    if has_name:
        without_tmpfile(monkeypatch)
        monkeypatch.setattr(os, "unlink", try_and_unlink)
    before = os.umask(0)
    try:
        with closing_fd(segments.open_swap(swap_in(folder))[0]) as fd:
            found = os.fstat(fd)
            assert (found.st_mode & 0o7777, found.st_uid, found.st_nlink) == (0o600, 0, 0)
            assert len(tried) == has_name
            # Not by the descriptor's name in /proc either.
            refused([["open", f"/proc/{os.getpid()}/fd/{fd}", os.O_RDONLY]])
            assert list(folder.iterdir()) == []
    finally:
        os.umask(before)


def public_folder(base: Path) -> Path:
    """A folder such as /tmp, which everybody may write to and reach."""
    for parent in (base, *base.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    folder = base / "public"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def swap_in(place: Path) -> Any:
    return resolve(1 << 20, 1 << 20, place, PAGE_BYTES)


@pytest.mark.parametrize("target", ["file", "nothing"])
@pytest.mark.parametrize("moment", ["before", "last"])
def test_is_a_symlink_followed_that_somebody_planted_where_swap_goes(
    target: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = public_folder(tmp_path)
    victim = tmp_path / "victim"
    if target == "file":
        victim.write_text("precious")
    place = folder / "swap"

    def plant() -> None:
        place.symlink_to(victim)
        os.chown(place, NOBODY_UID if os.geteuid() == 0 else -1, -1, follow_symlinks=False)

    if moment == "before":
        plant()
        with pytest.raises(ValueError, match="is a symbolic link"):
            pyswap.Pool("1 MiB", "1 MiB", swap_path=place, page_size=PAGE_BYTES)
    else:
        settings = swap_in(place)
        without_tmpfile(monkeypatch)
        monkeypatch.setattr(os.path, "lexists", lambda _: False)
        plant()
        with pytest.raises(FileExistsError):
            segments.open_swap(settings)
    assert place.is_symlink()
    assert (victim.read_text() == "precious") if target == "file" else not victim.exists()


def test_is_a_symlink_followed_that_somebody_planted_where_a_segment_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    name = f"pyswap.store.{os.getpid()}.1.{0:016x}"
    monkeypatch.setattr(segments, "_made_name", lambda _: name)
    planted = Path("/dev/shm") / name
    planted.symlink_to(victim)
    try:
        with closing_fd(segments.create_segment("store", 1 << 20, 0)) as fd:
            os.pwrite(fd, b"x" * 100, 0)
    finally:
        planted.unlink(missing_ok=True)
    assert victim.read_text() == "precious"


# A control segment that somebody sent.


def header_of(pool: pyswap.Pool) -> bytearray:
    with closing_fd(os.open(f"/proc/self/fd/{pool._attachment.control_fd}", os.O_RDONLY)) as fd:
        return bytearray(os.pread(fd, 4096, 0))


def attach_to(header: bytes, length: int) -> None:
    with closing_fd(os.memfd_create("foreign")) as fd:
        os.ftruncate(fd, length)
        os.pwrite(fd, header[:length], 0)
        native.Control(fd)


def is_refused(header: bytes, length: int) -> bool:
    try:
        attach_to(header, length)
    except ValueError as error:
        return "not a pyswap control segment" in str(error)
    return False


def places_of(header: bytes, value: int) -> list[int]:
    """Where the header has a number of 64 bits."""
    words = struct.unpack("<512Q", header)
    found = [8 * i for i, word in enumerate(words) if word == value]
    assert found, f"no field of the header is {value}"
    return found


WRONG_FIELDS = (0, 1, -1, 4096, -4096, 1 << 32, 1 << 63, -(1 << 63))


@pytest.mark.core
def test_is_a_control_segment_refused_that_is_wrong_in_one_field(pool: pyswap.Pool) -> None:
    header = header_of(pool)
    length = os.fstat(pool._attachment.control_fd).st_size
    attach_to(header, length)
    page_count = config.STORE_BYTES // PAGE_BYTES
    (frame_room,) = struct.unpack_from("<Q", header, 24)
    tables = native.control_bytes(frame_room, page_count)
    assert tables["size"] == length
    checked = 0
    for name, value in {**tables, "page count": page_count, "frame room": frame_room}.items():
        for place in places_of(header, value):
            for add in WRONG_FIELDS:
                # Tables are of whole pages: one record more or less may change nothing.
                if " " in name and abs(add) == 1:
                    continue
                changed = bytearray(header)
                wrong = (value + add) % (1 << 64) if add else 0
                struct.pack_into("<Q", changed, place, wrong)
                assert is_refused(changed, length), f"{name} may be {wrong} for {value}"
                checked += 1
    assert checked >= 8 * len(tables)


@pytest.mark.core
@pytest.mark.parametrize(
    ("place", "wrongs"),
    [
        (0, (0, 1, 1 << 63)),
        (8, (0, 1 << 16, 1 << 31)),
        (12, (0, 1, 2048, 4095, 4097, 12288, 8192, 1 << 22, 1 << 31)),
    ],
    ids=["magic", "version", "page_bytes"],
)
def test_is_a_control_segment_of_others_refused(
    pool: pyswap.Pool, place: int, wrongs: tuple[int, ...]
) -> None:
    header = header_of(pool)
    length = os.fstat(pool._attachment.control_fd).st_size
    for wrong in wrongs:
        changed = bytearray(header)
        struct.pack_into("<Q" if place == 0 else "<I", changed, place, wrong)
        if (place, wrong) == (12, 8192):
            # As good a page size as another: it is the store that has another length then.
            attach_to(changed, length)
            continue
        with pytest.raises(ValueError, match="not a pyswap control segment"):
            attach_to(changed, length)


@pytest.mark.core
def test_is_a_control_segment_of_another_length_refused(pool: pyswap.Pool) -> None:
    header = header_of(pool)
    length = os.fstat(pool._attachment.control_fd).st_size
    for other in (0, 1, 100, 4096, length // 2, length - 1, length + 1, length + 4096):
        with pytest.raises(ValueError, match="not a pyswap control segment"):
            attach_to(header, other)


@pytest.mark.core
def test_is_random_rubbish_no_control_segment(pool: pyswap.Pool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    header = header_of(pool)
    length = os.fstat(pool._attachment.control_fd).st_size
    for _ in range(300):
        changed = bytearray(header)
        # Magic, version and page size are right, so that it gets farther.
        changed[16:4096] = rng.bytes(4080)
        with pytest.raises(ValueError, match="not a pyswap control segment"):
            attach_to(changed, length)


# What was there before.


def data_of(path: str) -> Iterator[bytes]:
    """The bytes of a file that exist, a piece for each run of them."""
    with closing_fd(os.open(path, os.O_RDONLY)) as fd:
        at = 0
        while True:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(fd, at, os.SEEK_HOLE)
            while at < end:
                piece = os.pread(fd, min(1 << 20, end - at), at)
                at += len(piece)
                yield piece


def secret_pages(path: str) -> int:
    """How many pages of a file begin with the secret."""
    return sum(
        int((np.frombuffer(piece, np.int64)[::WORDS] == SECRET).sum()) for piece in data_of(path)
    )


def swap_path(pool: pyswap.Pool) -> str:
    """The path by which root may open the swap file."""
    for fd, name in fds_of(pool.swapper_pid):
        path = f"/proc/{pool.swapper_pid}/fd/{fd}"
        # pytest's own captured output is such a file too.
        if (
            re.search(r"^/(?!dev/shm/|memfd:).* \(deleted\)$", name)
            and os.stat(path).st_size >= 8 << 20
        ):
            return path
    raise AssertionError(fds_of(pool.swapper_pid))


def mapped_kib(pid: int, address: int) -> int:
    """How much of the mapping at an address is present in a process, in KiB."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    match = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"nothing is mapped at {address:#x}"
    return int(match[1])


def overwrite(a: Any) -> None:
    a[:] = SECRET


@pytest.mark.core
def test_is_anything_left_of_a_released_array_where_a_stopped_process_maps_it(
    pool: pyswap.Pool,
) -> None:
    a = pool.zeros(PAGES * WORDS, np.int64)
    address, base = a.ctypes.data, page_id(pool, a)
    with workers(a, 1) as (stopped,):
        stopped.ask(overwrite)
        stopped.stop()
        assert secret_pages(fd_of(pool, "store")) == PAGES
        assert mapped_kib(stopped.pid, address) == PAGES * 4
        pool.release(a)
        del a
        assert secret_pages(fd_of(pool, "store")) == 0
        assert mapped_kib(stopped.pid, address) == 0
        # Its page ids are nobody else's as long as it may look at them.
        news = [pool.zeros(PAGES * WORDS, np.int64) for _ in range(20)]
        assert all(abs(page_id(pool, new) - base) >= PAGES for new in news)
        for i, new in enumerate(news):
            assert not new.any()
            new[:] = i + 1
        assert mapped_kib(stopped.pid, address) == 0
        news.clear()
        del new
        stopped.kill()
        until(lambda: pool.stats().workers == 1, "the stopped one is gone")
    again = pool.zeros(PAGES * WORDS, np.int64)
    assert page_id(pool, again) == base, "page ids are given out again"
    assert not again.any()


@pytest.mark.core
def test_is_a_page_read_from_a_slot_that_it_did_not_write(pool: pyswap.Pool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = pool.full(PAGES * WORDS, SECRET, np.int64)
    base = page_id(pool, a)
    pool.advise(a, "pageout")
    assert secret_pages(swap_path(pool)) == PAGES
    del a
    assert pool.stats().swap_used_bytes == 0
    # The bytes are on disk yet, in slots of nobody.
    assert secret_pages(swap_path(pool)) == PAGES
    for turn in range(1, 9):
        b = pool.zeros(PAGES * WORDS, np.int64)
        assert page_id(pool, b) == base, "page ids are given out again"
        rows = b.reshape(PAGES, WORDS)
        written = rng.random(PAGES) < 0.3
        rows[written] = turn
        for _ in range(3):
            pool.advise(b[: int(rng.integers(1, b.size))], "pageout")
            assert (rows == np.where(written, turn, 0)[:, None]).all()
            more = rng.random(PAGES) < 0.1
            rows[more] = turn
            written |= more
        pool.advise(b, "pageout")
        assert (rows == np.where(written, turn, 0)[:, None]).all()
        del rows, b
    left = secret_pages(swap_path(pool))
    print(f"{left} of {PAGES} slots still had the old bytes in the end")
    assert left > 0


def fill_with(a: Any, value: int) -> None:
    a[:] = value


def is_all(a: Any, value: int) -> bool:
    return bool((a == value).all())


@pytest.mark.core
def test_is_a_dead_copys_page_id_seen_by_a_stopped_sharer(pool: pyswap.Pool) -> None:
    a = pool.full(PAGES * WORDS, 1, np.int64, private=True)
    with workers(a, 1) as (stopped,):
        stopped.ask(is_all, 1)
        stopped.stop()
        for turn in range(6):
            # Its copies get page ids, and give them back; the next ones take them.
            other = Worker(a)
            try:
                other.ask(fill_with, SECRET)
                if turn % 2:
                    pool.advise(a, "pageout")
                other.kill()
            finally:
                other.finish()
            until(lambda: pool.stats().workers == 2, "it is gone")
            assert secret_pages(fd_of(pool, "store")) == 0
            a[:] = turn + 2
            assert is_all(a, turn + 2)
        stopped.send(is_all, 1)
        stopped.signal(signal.SIGCONT)
        assert stopped.answer()


def test_does_the_swap_file_leave_with_its_pool(tmp_path: Path) -> None:
    pool = pyswap.Pool("1 MiB", "8 MiB", swap_path=tmp_path, page_size=PAGE_BYTES)
    with closing(pool):
        pid = pool.swapper_pid
        a = pool.full(PAGES * WORDS, SECRET, np.int64)
        pool.advise(a, "pageout")
        assert secret_pages(swap_path(pool)) > 0
        assert list(tmp_path.iterdir()) == []
        del a
    until(lambda: not Path(f"/proc/{pid}").exists(), "the swapper ends")
    assert list(tmp_path.iterdir()) == []

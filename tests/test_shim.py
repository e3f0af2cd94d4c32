"""Do system calls work on NumPy's paged arrays, whoever this user is, and is none silently short?

Run as an ordinary user, too, for whom the kernel may not fault pages in.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyswap

pytestmark = [pytest.mark.core, pytest.mark.user]

COUNT = 3 << 20
"""Items of the arrays here: 12 MiB, more than memory."""


@pytest.fixture(autouse=True)
def memory(pool: Any) -> Iterator[None]:
    with pyswap.numpy_memory(pool, "32 KiB"):
        yield


def pattern(salt: int = 0, count: int = COUNT) -> Any:
    return np.arange(salt, salt + count, dtype=np.int32)


def away(pool: Any, a: Any) -> Any:
    """Have an array's pages out of memory, so that no call finds them mapped."""
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    return a


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b))


# Files.


def test_do_fromfile_and_tofile_do_all_that_was_asked(pool: Any, tmp_path: Path) -> None:
    a = away(pool, pattern())
    a.tofile(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == a.nbytes
    b = np.fromfile(tmp_path / "a", np.int32)
    assert b.size == COUNT
    assert same(a, b)
    assert np.fromfile(tmp_path / "a", np.int32, count=1000, offset=400)[0] == 100


def test_do_save_and_load_do_all_that_was_asked(pool: Any, tmp_path: Path) -> None:
    a = away(pool, pattern(5))
    np.save(tmp_path / "a.npy", a)
    np.savez(tmp_path / "b.npz", a=a)
    assert same(np.load(tmp_path / "a.npy"), a)
    with np.load(tmp_path / "b.npz") as members:
        assert same(members["a"], a)


def test_do_readinto_and_write_do_all_that_was_asked(pool: Any, tmp_path: Path) -> None:
    a, b = pattern(1), np.zeros(COUNT, np.int32)
    with open(tmp_path / "a", "wb", buffering=0) as file:
        assert file.write(away(pool, a)) == a.nbytes
    with open(tmp_path / "a", "rb", buffering=0) as file:
        assert file.readinto(away(pool, b)) == b.nbytes
        assert file.readinto(b) == 0, "at the end of the file"
    assert same(a, b)
    b[:] = 0
    with open(tmp_path / "a", "rb") as buffered:
        assert buffered.readinto(away(pool, b)) == b.nbytes
    assert same(a, b)


def test_is_a_read_over_the_end_of_a_file_as_short_as_it_is(pool: Any, tmp_path: Path) -> None:
    a = away(pool, np.zeros(COUNT, np.int32))
    (tmp_path / "a").write_bytes(b"x" * 2_500_001)
    with opened(tmp_path / "a") as fd:
        assert os.preadv(fd, [a.data.cast("B")], 1) == 2_500_000
        assert os.preadv(fd, [a.data.cast("B")], 3_000_000) == 0
    raw = a.view(np.uint8)
    assert (raw[:2_500_000] == ord("x")).all()
    assert not raw[2_500_000:].any()


def test_do_vectors_of_buffers_work(pool: Any, tmp_path: Path) -> None:
    parts = [away(pool, pattern(k, 300_000)) for k in range(3)]
    plain = bytes(range(7))
    with opened(tmp_path / "a") as fd:
        wanted = sum(p.nbytes for p in parts) + 7
        assert os.writev(fd, [parts[0], plain, parts[1], parts[2]]) == wanted
        assert os.pwritev(fd, [parts[2]], 1) == parts[2].nbytes
        assert os.pwritev(fd, [parts[0], plain, parts[1], parts[2]], 0) == wanted
        back = [away(pool, np.zeros(300_000, np.int32)) for _ in range(3)]
        middle = bytearray(7)
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.readv(fd, [back[0], middle, back[1], back[2]]) == wanted
        assert middle == plain
        assert all(same(x, y) for x, y in zip(parts, back, strict=True))
        assert os.preadv(fd, [away(pool, back[0]), middle], 0, os.RWF_HIPRI) == back[0].nbytes + 7
        assert same(back[0], parts[0])


def test_is_an_error_the_one_that_it_is(pool: Any, tmp_path: Path) -> None:
    a = away(pool, pattern())
    with (
        opened(tmp_path / "a", os.O_RDONLY | os.O_CREAT) as fd,
        pytest.raises(OSError, match="descriptor"),
    ):
        os.write(fd, a)


def test_does_direct_io_lose_nothing(pool: Any, tmp_path: Path) -> None:
    a = pattern(3, 1 << 20)
    path = tmp_path / "a"
    a.tofile(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")
    try:
        b = away(pool, np.zeros(1 << 20, np.int32))
        assert os.preadv(fd, [b.data.cast("B")], 0) == b.nbytes
        away(pool, b)
        assert same(a, b)
        assert os.pwritev(fd, [away(pool, b)], mmap.PAGESIZE) == b.nbytes
    finally:
        os.close(fd)
    assert same(np.fromfile(path, np.int32, offset=mmap.PAGESIZE), a)


# Pipes and sockets.


def test_do_pipes_carry_more_than_they_hold(pool: Any) -> None:
    a, b = away(pool, pattern(9)), away(pool, np.zeros(COUNT, np.int32))
    out, into = os.pipe()

    def write() -> None:
        try:
            assert os.write(into, a) == a.nbytes, "a blocking write writes all"
        finally:
            os.close(into)

    writer = threading.Thread(target=write)
    writer.start()
    with open(out, "rb") as file:
        assert file.readinto(b) == b.nbytes
        assert file.read() == b""
    writer.join()
    assert same(a, b)


def test_does_a_pipe_give_what_is_there_and_wait_for_no_more(pool: Any) -> None:
    b = away(pool, np.zeros(COUNT, np.int32))
    out, into = os.pipe()
    try:
        os.write(into, b"y" * 5000)
        assert os.readv(out, [b]) == 5000
        os.set_blocking(into, False)
        written = os.write(into, away(pool, pattern()))
        assert 0 < written < COUNT * 4, "as much as there is room for"
        with pytest.raises(BlockingIOError):
            os.write(into, b)
        assert os.readv(out, [b]) == written
    finally:
        os.close(out)
        os.close(into)
    assert same(b.view(np.uint8)[:written], pattern().view(np.uint8)[:written])


def test_do_stream_sockets_work(pool: Any) -> None:
    here, there = socket.socketpair()
    a, b = away(pool, pattern(2)), away(pool, np.zeros(COUNT, np.int32))
    with here, there:
        sender = threading.Thread(target=here.sendall, args=(a,))
        sender.start()
        assert there.recv_into(b, 0, socket.MSG_WAITALL) == b.nbytes
        sender.join()
        assert same(a, b)
        here.send(b"abc")
        view = away(pool, b).view(np.uint8)
        assert there.recv_into(view, 0, socket.MSG_PEEK) == 3
        assert there.recv_into(away(pool, view)) == 3
        assert bytes(view[:3]) == b"abc"


def test_does_what_comes_beside_the_bytes_come_too(pool: Any) -> None:
    here, there = socket.socketpair()
    a, b = away(pool, pattern(2, 20_000)), away(pool, np.zeros(20_000, np.int32))
    with here, there:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [here.fileno()]))]
        assert here.sendmsg([a.data.cast("B")[:20_000], b"end"], rights) == 20_003
        got, beside, flags, _ = there.recvmsg_into([b], socket.CMSG_LEN(4))
        assert (got, flags & socket.MSG_CTRUNC) == (20_003, 0)
        (fd,) = array.array("i", beside[0][2])
        os.close(fd)
    assert same(b[:5_000], a[:5_000])
    assert bytes(b.view(np.uint8)[20_000:20_003]) == b"end"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_is_a_datagram_never_lost(pool: Any, family: int) -> None:
    if family == socket.AF_UNIX:
        here, there = socket.socketpair(family, socket.SOCK_DGRAM)
    else:
        here, there = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
        there.bind(("127.0.0.1", 0))
        here.connect(there.getsockname())
    there.settimeout(30)
    a = pattern(1, 15_000)
    with here, there:
        for _ in range(20):
            b = np.zeros(20_000, np.int32)
            assert here.send(away(pool, a)) == a.nbytes
            got, address = there.recvfrom_into(away(pool, b))
            assert got == a.nbytes
            assert same(a, b[:15_000])
            assert family == socket.AF_UNIX or address == here.getsockname()


def test_are_shared_arrays_of_the_pool_covered_too(pool: Any, tmp_path: Path) -> None:
    a = pool.array(pattern(4, 500_000))
    with opened(tmp_path / "a") as fd:
        assert os.write(fd, away(pool, a)) == a.nbytes
        b = away(pool, pool.zeros(500_000, np.int32))
        assert os.preadv(fd, [b.data.cast("B")], 0) == b.nbytes
        assert same(a, b)


def test_does_the_shim_let_other_memory_be(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as fd:
        assert os.write(fd, b"x" * 100) == 100
        small = bytearray(100)
        assert os.preadv(fd, [small], 0) == 100
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.read(fd, None, ctypes.c_size_t(1)) in (-1, 0), "a bad address is an error"

"""Do system calls work on arrays that are in swap?  With full userfaultfd the kernel faults."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import require

PAGES = 600


@pytest.fixture
def paged_out(pool: Any) -> Any:
    """An array of known bytes, none of which is resident."""
    require("uffd")
    a = pool.empty(PAGES * pool.page_size, np.uint8)
    a[:] = expected(a.size)
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    return a


def expected(n: int, salt: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return ((np.arange(n, dtype=np.uint64) * 2654435761 + salt) >> 7).astype(np.uint8)


def test_does_readinto_fill_pages_that_are_in_swap(
    pool: Any, paged_out: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_bytes(expected(paged_out.size, 1).tobytes())
    with open(path, "rb", buffering=0) as file:
        assert file.readinto(paged_out.data) == paged_out.size
    np.testing.assert_array_equal(paged_out, expected(paged_out.size, 1))
    pool.advise(paged_out, "pageout")
    np.testing.assert_array_equal(paged_out, expected(paged_out.size, 1))


def test_does_a_buffered_readinto_fill_pages_that_are_in_swap(
    paged_out: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    path.write_bytes(expected(paged_out.size, 2).tobytes())
    with open(path, "rb") as file:
        assert file.readinto(paged_out.data) == paged_out.size
    np.testing.assert_array_equal(paged_out, expected(paged_out.size, 2))


def test_does_recv_into_fill_pages_that_are_in_swap(pool: Any, paged_out: Any) -> None:
    left, right = socket.socketpair()
    sent = expected(paged_out.size, 3)
    sender = threading.Thread(target=lambda: (left.sendall(sent), left.close()))
    sender.start()
    view, at = paged_out.data, 0
    while n := right.recv_into(view[at:]):
        at += n
    sender.join()
    right.close()
    assert at == paged_out.size
    np.testing.assert_array_equal(paged_out, sent)


def test_does_preadv_scatter_over_pages_that_are_in_swap(paged_out: Any, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(expected(paged_out.size, 4).tobytes())
    half = paged_out.size // 2
    fd = os.open(path, os.O_RDONLY)
    try:
        n = os.preadv(fd, [paged_out[half:].data, paged_out[:half].data], 0)
    finally:
        os.close(fd)
    assert n == paged_out.size
    np.testing.assert_array_equal(
        paged_out[half:], expected(paged_out.size, 4)[: paged_out.size - half]
    )


def test_does_a_plain_write_see_bytes_that_are_in_swap(paged_out: Any, tmp_path: Path) -> None:
    path = tmp_path / "data"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        assert os.write(fd, paged_out.data) == paged_out.size
    finally:
        os.close(fd)
    assert path.read_bytes() == expected(paged_out.size).tobytes()


def test_does_numpys_own_tofile_and_fromfile_work(
    pool: Any, paged_out: Any, tmp_path: Path
) -> None:
    path = tmp_path / "data"
    np.asarray(paged_out).tofile(path)
    back = np.fromfile(path, np.uint8)
    np.testing.assert_array_equal(back, expected(paged_out.size))
    with open(path, "rb") as file:
        made = pool.fromfile(file, np.uint8)
        assert file.tell() == paged_out.size
    np.testing.assert_array_equal(made, back)


def test_are_faults_of_the_kernel_counted_as_faults(pool: Any, paged_out: Any) -> None:
    before = pool.stats()
    read, write = os.pipe()
    try:
        assert os.write(write, paged_out[:4096].data) == 4096
        assert os.read(read, 8192) == expected(paged_out.size)[:4096].tobytes()
    finally:
        os.close(read)
        os.close(write)
    assert pool.stats().slot_reads > before.slot_reads

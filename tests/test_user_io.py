"""What works for an ordinary user, where the kernel itself may not fault pages in?

Run as that user, and as root, with full userfaultfd, where all of it must work as well.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyswap

pytestmark = [pytest.mark.core, pytest.mark.user]

PAGES = 3000
"""More pages than the pool of these tests has frames."""


def filled(pool: Any, salt: int = 0) -> Any:
    a = pool.empty(PAGES * pool.page_size // 8, np.int64)
    a[:] = np.arange(a.size) * 7 + salt
    pool.advise(a, "pageout")
    assert not pool.residency(a).any()
    return a


def done_or_efault(call: Callable[[], int]) -> int:
    """Bytes that a system call says it has done; none where it fails with EFAULT."""
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return 0


def user_mode_only() -> bool:
    return pyswap.engine_mode().endswith("user mode only")


def test_is_user_mode_only_chosen_where_no_more_is_allowed(pool: Any) -> None:
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    may = os.geteuid() == 0 or allowed or os.access("/dev/userfaultfd", os.R_OK | os.W_OK)
    assert user_mode_only() == (not may)


def test_does_tofile_write_an_array_that_is_in_swap(pool: Any, tmp_path: Path) -> None:
    a = filled(pool)
    a.tofile(tmp_path / "a")
    np.testing.assert_array_equal(np.fromfile(tmp_path / "a", np.int64), np.arange(a.size) * 7)


def test_does_tofile_write_where_an_open_file_stands(pool: Any, tmp_path: Path) -> None:
    a = filled(pool)
    with open(tmp_path / "a", "wb") as file:
        file.write(b"head")
        a[:1000].tofile(file)
        file.write(b"tail")
    data = (tmp_path / "a").read_bytes()
    assert data == b"head" + (np.arange(1000) * 7).tobytes() + b"tail"


def test_does_np_save_write_an_array_that_is_in_swap(pool: Any, tmp_path: Path) -> None:
    a = filled(pool, 5).reshape(-1, pool.page_size // 8)
    np.save(tmp_path / "c.npy", a)
    np.save(tmp_path / "f.npy", a.T)
    want = (np.arange(a.size) * 7 + 5).reshape(a.shape)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), want)
    np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), want.T)


def test_does_fromfile_read_more_than_memory(pool: Any, tmp_path: Path) -> None:
    want = np.arange(PAGES * pool.page_size // 8) * 3
    want.tofile(tmp_path / "a")
    a = pool.fromfile(tmp_path / "a", np.int64)
    np.testing.assert_array_equal(a, want)
    part = pool.fromfile(tmp_path / "a", np.int64, count=100, offset=800)
    np.testing.assert_array_equal(part, want[100:200])
    with pytest.raises(EOFError):
        pool.fromfile(tmp_path / "a", np.int64, count=want.size + 1)
    assert pool.stats().pinned_pages == 0


def test_does_a_system_call_work_on_a_pinned_range(pool: Any, tmp_path: Path) -> None:
    a = filled(pool)
    (tmp_path / "a").write_bytes(bytes(range(256)) * 64)
    with pool.pin(a[:2048]), open(tmp_path / "a", "rb", buffering=0) as file:
        assert file.readinto(a[:2048].data.cast("B")) == 16384
    pool.advise(a, "pageout")
    assert a[:2048].tobytes() == bytes(range(256)) * 64


def test_is_a_system_call_without_a_pin_right_short_or_an_error(pool: Any, tmp_path: Path) -> None:
    """It fails with EFAULT, or tells the short count that POSIX allows; no byte is wrong."""
    a = filled(pool)
    view = a[: 4 * pool.page_size // 8]
    raw = bytes(range(256)) * (view.nbytes // 256)
    (tmp_path / "a").write_bytes(raw)
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        n = done_or_efault(lambda: os.preadv(fd, [view.data.cast("B")], 0))
    finally:
        os.close(fd)
    if not user_mode_only():
        assert n == len(raw)
    else:
        assert n < len(raw), "no page was resident, and the kernel may not fault them in"
    before = (np.arange(view.size) * 7).tobytes()
    assert view.tobytes() == raw[:n] + before[n:]


def test_does_a_write_without_a_pin_never_write_wrong_bytes(pool: Any, tmp_path: Path) -> None:
    a = filled(pool)
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        n = done_or_efault(lambda: os.write(fd, a[:4096].data))
        assert user_mode_only() or n == 32768
        assert os.pread(fd, 65536, 0) == (np.arange(4096) * 7).tobytes()[:n]
    finally:
        os.close(fd)

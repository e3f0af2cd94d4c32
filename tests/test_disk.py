"""What if the disk fails?  Writes go elsewhere or wait, reads are tried again, data stays right."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failpoints import Failpoint, until
from swapfile import SwapFile, ending, is_numbered, numbered, page_out

import pyswap

MANY = 1 << 30
READ_TRIES = 3
SUSPICIOUS = 4
"""Slots in a row that could not be written, after which an area rests."""
TESTS = Path(__file__).parent


@pytest.fixture
def tight(folder: Path) -> Iterator[Any]:
    """A pool of 256 frames of 4 KiB with 8 MiB of swap."""
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096, swap_path=folder) as made:
        yield made
        made.check()


# By injection: the write.


@pytest.mark.failpoint
def test_is_one_bad_slot_put_aside_and_its_neighbours_written(tight: Any) -> None:
    a = numbered(tight, 64)
    # The run of 64 fails, then its halves down to the first slot alone.
    with Failpoint(tight, "clean_write", "errno", error=errno.EIO, limit=7) as point:
        page_out(tight, a)
        assert point.hits == 7
    stats, (area,) = tight.stats(), tight.swaps()
    assert stats.write_errors == area.errors == 7
    assert area.bad == tight.page_size
    assert area.used == stats.swap_used_bytes == 64 * tight.page_size
    assert is_numbered(a)
    # It is not tried again: every slot of the area is written, over and over, and none fails.
    for _ in range(3):
        big = numbered(tight, 1900)
        page_out(tight, big)
        assert is_numbered(big)
        del big
    assert tight.swaps()[0].errors == 7
    assert tight.swaps()[0].bad == tight.page_size


@pytest.mark.failpoint
def test_does_what_was_put_aside_come_back_with_another_area(tight: Any, tmp_path: Path) -> None:
    a = numbered(tight, 64)
    with Failpoint(tight, "clean_write", "errno", error=errno.EIO, limit=7):
        page_out(tight, a)
    (old,) = tight.swaps()
    assert old.bad == tight.page_size
    tight.swapon(tmp_path, "8 MiB")
    tight.swapoff(old)
    assert [area.bad for area in tight.swaps()] == [0]
    tight.swapon(tmp_path, "8 MiB")
    big = numbered(tight, 3500)
    assert is_numbered(big)
    assert is_numbered(a)


@pytest.mark.failpoint
def test_does_a_full_file_system_cost_an_area_no_slot(tight: Any) -> None:
    a = numbered(tight, 64)
    with Failpoint(tight, "clean_write", "errno", error=errno.ENOSPC, limit=20) as point:
        page_out(tight, a)
        assert point.hits <= 20
    assert tight.swaps()[0].bad == 0
    assert tight.stats().write_errors == point.hits
    assert is_numbered(a)


@pytest.mark.failpoint
def test_does_an_area_that_fails_take_few_writes_and_no_slots(tight: Any) -> None:
    a = numbered(tight, 200)
    with Failpoint(tight, "clean_write", "errno", error=errno.EIO, limit=MANY) as point:
        tight.advise(a, "pageout")
        assert tight.residency(a).all()
        # Halves down to a slot, that and a few more; then a rest, and a try of so many again.
        assert 0 < point.hits < 100
        stats, (area,) = tight.stats(), tight.swaps()
        assert stats.write_errors == area.errors == point.hits
        assert area.bad < SUSPICIOUS * tight.page_size
        assert stats.dirty_pages == 200
        assert stats.swap_used_bytes == 0
    page_out(tight, a)
    assert is_numbered(a)


@pytest.mark.failpoint
def test_do_writers_wait_a_bounded_time_where_no_area_can_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyswap.config.FRAME_WAIT_MS", 1500)
    with pyswap.Pool("1 MiB", "8 MiB", page_size=4096, swap_path=folder) as pool:
        a = pool.zeros((1000, 512), np.int64, name="tides")
        a[:100] = np.arange(1, 101)[:, None]

        def write() -> None:
            for i in range(100, 1000):
                a[i] = i + 1

        with Failpoint(pool, "clean_write", "errno", error=errno.EIO, limit=MANY) as point:
            before = cpu_s(pool.swapper_pid), os.times().elapsed
            number, lines = ending(write, tmp_path / "told")
            after = cpu_s(pool.swapper_pid), os.times().elapsed
            assert number == signal.SIGBUS
            (line,) = [line for line in lines if "tides" in line]
            for part in ("no frame became free in time", str(folder), os.strerror(errno.EIO)):
                assert part in line
            # Nobody tried as fast as it could.
            assert point.hits < 300
            assert after[0] - before[0] < 0.6 * (after[1] - before[1])
            stats = pool.stats()
            assert stats.write_errors == point.hits
            assert stats.evictions == 0
            assert os.fstat(pool.fileno()).st_blocks * 512 <= pool.memory
            # What is in memory is right, and there for everybody.
            assert (a[:100] == np.arange(1, 101)[:, None]).all()
        # The disk works again: so does the pool.
        until(lambda: pool.stats().free_frames > 8, "reclaim has had its next try")
        a[:] = np.arange(1, 1001)[:, None]
        assert is_numbered(a)
        pool.check()


def cpu_s(pid: int) -> float:
    """CPU time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# A file that ends early: reads fail for real, and so does who needs them.


@pytest.mark.core
def test_what_if_the_swap_file_is_cut_off(tight: Any, tmp_path: Path, folder: Path) -> None:
    a = numbered(tight, 200, name="tides")
    tight.advise(a, "random")
    page_out(tight, a)
    with SwapFile(tight, folder) as swap:
        slot = swap.slot_of(150)
        content = swap.read(slot)
        rest = os.pread(swap.fd, swap.size, slot * 4096)
        whole = swap.size
        os.ftruncate(swap.fd, slot * 4096)
        number, lines = ending(a[149].sum, tmp_path / "told")
        assert number == signal.SIGBUS
        assert len(lines) == 1
        for part in ("tides, page 149", str(folder)[:127], os.strerror(errno.EIO)):
            assert part in lines[0]
        assert tight.stats().read_errors == tight.swaps()[0].errors == READ_TRIES
        # Others go on with what is there.
        assert (a[:100] == np.arange(1, 101)[:, None]).all()
        os.ftruncate(swap.fd, whole)
        # Zeros came in their place, which are no page of anybody's.
        number, lines = ending(a[149].sum, tmp_path / "told")
        assert number == signal.SIGBUS
        assert os.strerror(errno.EBADMSG) in lines[0]
        os.pwrite(swap.fd, rest, slot * 4096)
        os.fdatasync(swap.fd)
        assert swap.read(slot) == content
    assert is_numbered(a)


# The log.


@pytest.mark.failpoint
def test_is_the_log_told_of_an_area_that_fails(tmp_path: Path, folder: Path) -> None:
    told = run_script(
        f"""
        import errno
        import numpy as np, pyswap
        from failpoints import Failpoint, until
        from swapfile import numbered, page_out
        with pyswap.Pool("1 MiB", "8 MiB", page_size=4096, swap_path={str(folder)!r}) as pool:
            a = numbered(pool, 100)
            with Failpoint(pool, "clean_write", "errno", error=errno.EIO, limit=40) as point:
                page_out(pool, a)
                until(lambda: point.hits == 40 or not pool.residency(a).any(), "writes failed")
            log = {str(tmp_path / "log")!r}
            until(lambda: {str(folder)!r} in open(log).read(), "it was logged")
        """,
        tmp_path / "log",
    )
    lines = [line for line in told.splitlines() if "transfers failed" in line]
    # However many failed: it is said now and then.
    assert 1 <= len(lines) <= 2
    assert str(folder) in lines[0]
    assert os.strerror(errno.EIO) in lines[0]


def run_script(script: str, log: Path, before: str = "") -> str:
    """Run a script, in mounts of its own if `before` makes any; what it and its swapper say."""
    runner = ["sh", "-ec", f'{before}\nexec "$0" -', sys.executable]
    if before:
        runner = ["unshare", "--mount", "--propagation", "private", *runner]
    with log.open("w") as output:
        ended = subprocess.run(
            runner,
            input=textwrap.dedent(script),
            text=True,
            stdout=output,
            stderr=output,
            check=False,
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
            timeout=240,
        )
    told = log.read_text()
    assert ended.returncode == 0, told
    return told


# A real file system that fills up; it and its loop device go with the script's own mounts.


def test_what_if_a_real_file_system_is_full(tmp_path: Path, require: Callable[[str], None]) -> None:
    require("root")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m0", str(image)], check=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    told = run_script(
        FULL_FILE_SYSTEM, tmp_path / "log", f"mount -o loop {image} {mount}; cd {mount}"
    )
    assert "writes failed" in told
    assert f"swap area {mount}" in told
    assert os.strerror(errno.ENOSPC) in told

    def is_detached() -> bool:
        found = subprocess.run(["losetup", "-j", str(image)], check=True, capture_output=True)
        return not found.stdout

    until(is_detached, "the file system and its loop device are gone")


FULL_FILE_SYSTEM = """
import ctypes, errno, os
import numpy as np, pyswap
from failpoints import until
from swapfile import SwapFile, is_numbered, numbered, page_out

PUNCH = 3
libc = ctypes.CDLL(None, use_errno=True)
here = os.getcwd()
with pyswap.Pool("1 MiB", "32 MiB", page_size=4096, swap_path=here) as pool:
    a = numbered(pool, 3000)
    assert is_numbered(a)
    with SwapFile(pool, here) as swap:
        # The room behind what is used is given back, and another program takes all there is.
        end = 4096 * max(i for i, row in enumerate(swap.words()) if row.any()) + 4096
        arguments = (swap.fd, PUNCH, ctypes.c_long(end), ctypes.c_long(swap.size - end))
        assert libc.fallocate(*arguments) == 0, ctypes.get_errno()
    stranger = os.open("stranger", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(stranger, bytes(1 << 16))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    os.fsync(stranger)
    pool.swapon("/tmp", "32 MiB", -1)
    b = numbered(pool, 5000)
    assert is_numbered(a) and is_numbered(b)
    assert os.fstat(pool.fileno()).st_blocks * 512 <= pool.memory
    stats, (full, other) = pool.stats(), pool.swaps()
    assert full.errors == stats.write_errors > 0, (full, stats)
    assert other.used > 0 == other.errors
    assert full.bad == 0
    print(stats.write_errors, "writes failed,", other.used >> 20, "MiB went to the other area")
    # Room again: the area is written to again, by itself.
    os.ftruncate(stranger, 0)
    os.close(stranger)
    before = full.used

    def is_in_use():
        b[:] += 1
        return pool.swaps()[0].used > before

    until(is_in_use, "the area is used again")
    b -= b[0, 0] - 1
    assert is_numbered(a) and is_numbered(b)
    until(lambda: "swap area " + here in open(os.path.dirname(here) + "/log").read(), "the log")
    pool.check()
"""


def test_what_if_another_program_fills_dev_shm(
    tmp_path: Path, require: Callable[[str], None]
) -> None:
    require("root")
    told = run_script(
        FULL_SHM, tmp_path / "log", "mount -t tmpfs -o size=48m,nr_inodes=1000 tmpfs /dev/shm"
    )
    assert "frames found no memory" in told
    assert "offline at most" in told


FULL_SHM = """
import errno, os
import numpy as np, pyswap
from failpoints import until
from swapfile import is_numbered, numbered

with pyswap.Pool("16 MiB", "64 MiB", page_size=4096, swap_path="/tmp") as pool:
    a = pool.zeros((6000, 512), np.int64)
    a[:1000] = np.arange(1, 1001)[:, None]
    stranger = os.open("/dev/shm/stranger", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(stranger, bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    most = 0
    for i in range(1000, 6000):
        a[i] = i + 1
        if i % 100 == 0:
            most = max(most, pool.stats().offline_frames)
    assert most > 0
    print(most, "frames offline at most")
    assert is_numbered(a)
    stats = pool.stats()
    assert stats.poisoned_pages == 0
    assert os.fstat(pool.fileno()).st_blocks * 512 <= pool.memory
    resident = stats.resident_pages
    os.ftruncate(stranger, 0)
    os.close(stranger)
    os.unlink("/dev/shm/stranger")
    until(lambda: pool.stats().offline_frames == 0, "the frames are back")
    for _ in range(2):
        assert is_numbered(a)
    assert pool.stats().resident_pages > resident
    pool.check()
"""

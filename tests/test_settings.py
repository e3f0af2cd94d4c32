"""Settings: every argument of a pool is checked, in clear words, before anything changes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import require

from pyswap import errors, settings
from pyswap.settings import Settings, available_memory, is_tmpfs, resolve

KERNEL_PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534


def in_child(function: Callable[[], Any], *, as_nobody: bool = False) -> Any:
    """What `function` returns, or the exception it raises, in a forked child.

    With `as_nobody` the child of root is an ordinary user; that of an ordinary user is that user.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setegid(NOBODY)
                os.seteuid(NOBODY)
            try:
                answer = function()
            except Exception as error:  # noqa: BLE001 - it goes to the parent.
                answer = error
            os.write(writing, pickle.dumps(answer))
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return pickle.loads(answer)


@contextlib.contextmanager
def mounted(kind: str, point: Path, options: str = "rw") -> Iterator[Path]:
    """A file system in memory, mounted for the test alone."""
    require("root")
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, "pyswap-test", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own is closed to them."""
    folder = Path(tempfile.mkdtemp(prefix="pyswap-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# Exceptions


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.PoolClosedError, ValueError),
        (errors.GoneError, Exception),
        (errors.SwapFullError, MemoryError),
        (errors.SwapIOError, OSError),
    ],
)
def test_is_each_exception_also_the_builtin_one(
    kind: type[Exception], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin, match="why"):
        raise kind("why")
    assert issubclass(kind, errors.Error)
    assert str(pickle.loads(pickle.dumps(kind("why")))) == "why"


def test_does_a_swap_error_carry_errno_and_path() -> None:
    error = errors.SwapIOError(errno.EIO, "slot 7 cannot be read", "/swap")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.errno, copy.strerror, copy.filename) == (
        errno.EIO,
        "slot 7 cannot be read",
        "/swap",
    )


# Memory and page size


@pytest.mark.parametrize("memory", [64 << 20, "64 MiB", np.int64(64 << 20)])
def test_do_all_ways_to_write_a_budget_agree(memory: int | str, tmp_path: Path) -> None:
    found = resolve(memory, "1 MiB", tmp_path, 16384, "a", False)
    assert found == Settings(
        memory_bytes=64 << 20,
        page_size=16384,
        frame_count=4096,
        swap_bytes=1 << 20,
        slot_count=64,
        swap_path=tmp_path,
        swap_is_file=False,
        name="a",
        overcommit=False,
    )


def test_is_the_budget_rounded_down_and_swap_up_to_whole_pages(tmp_path: Path) -> None:
    found = resolve((8 << 20) + 65535, 65537, tmp_path, 65536)
    assert (found.memory_bytes, found.frame_count) == (8 << 20, 128)
    assert (found.swap_bytes, found.slot_count) == (2 * 65536, 2)


@pytest.mark.parametrize("fraction", [0.5, Fraction(1, 2), np.float32(0.5), np.float64(0.5)])
def test_is_a_float_a_fraction_of_the_memory_available(
    fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "available_memory", lambda: 100 << 20)
    assert resolve(fraction, 0).memory_bytes == 50 << 20


def test_is_all_memory_available_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "available_memory", lambda: 100 << 20)
    assert resolve(1.0, 0).memory_bytes == 100 << 20


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, 2e9, float("nan"), float("inf")])
def test_is_a_fraction_out_of_bounds_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^memory as a float is a fraction in \(0, 1\]"):
        resolve(fraction, 0)


@pytest.mark.parametrize("memory", [True, None, [1], b"1 MiB", 1j, np.True_, "many", -1, 1 << 50])
def test_is_no_budget_refused_by_name(memory: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^memory "):
        resolve(memory, 0)


def test_is_memory_0_refused() -> None:
    with pytest.raises(ValueError, match=r"^memory is 0"):
        resolve(0, 0)


def test_is_a_budget_over_ram_refused_with_both_numbers() -> None:
    ram_bytes = psutil.virtual_memory().total
    with pytest.raises(ValueError, match="this machine has only") as caught:
        resolve(ram_bytes + 1, 0)
    assert f"{ram_bytes + 1} bytes" in str(caught.value)
    assert f"{ram_bytes} bytes" in str(caught.value)


def test_is_a_budget_over_what_is_free_at_the_moment_only_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "available_memory", lambda: 1 << 20)
    with caplog.at_level(logging.WARNING, "pyswap"):
        assert resolve("16 MiB", 0).memory_bytes == 16 << 20
    assert "16777216 bytes" in caplog.text
    assert "1048576 bytes" in caplog.text


def test_are_fewer_than_128_frames_refused() -> None:
    assert resolve(128 * 65536, 0, page_size=65536).frame_count == 128
    with pytest.raises(ValueError, match=r"is 127 pages of 65536 bytes, but .* at least 128"):
        resolve(128 * 65536 - 1, 0, page_size=65536)


@pytest.mark.skipif(KERNEL_PAGE != 4096, reason="the kernel's pages are larger than 4 KiB")
@pytest.mark.parametrize("memory", [1 << 30, 128 * 4096])
def test_is_a_page_the_kernels_by_default(memory: int) -> None:
    found = resolve(memory, 0)
    assert found.page_size == 4096
    assert found.frame_count == memory // 4096


def test_is_a_budget_too_small_for_any_page_refused() -> None:
    with pytest.raises(ValueError, match="at least 128"):
        resolve(128 * KERNEL_PAGE - 1, 0)


@pytest.mark.parametrize("page_size", [65536, "64 KiB", "64k", np.int32(65536), 2 << 20])
def test_are_page_sizes_within_the_bounds_taken(page_size: int | str) -> None:
    assert resolve("256 MiB", 0, page_size=page_size).page_size in (65536, 2 << 20)


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4095, 4097, 12288, 3 << 16, 4 << 20, "3 KB"])
def test_is_a_page_size_out_of_bounds_refused(page_size: int | str) -> None:
    with pytest.raises(ValueError, match=r"^page_size must be a power of two from 4096 to 2097152"):
        resolve("64 MiB", 0, page_size=page_size)


@pytest.mark.parametrize("page_size", [65536.0, True, "big", -4096])
def test_is_no_page_size_refused_by_name(page_size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^page_size "):
        resolve("64 MiB", 0, page_size=page_size)


def test_is_a_page_below_the_kernels_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _: 65536)
    with pytest.raises(ValueError, match=r"below the kernel's page of 65536"):
        resolve("64 MiB", 0, page_size=4096)
    assert resolve("8 MiB", 0).page_size == 65536


# Swap's size, name, overcommit


def test_is_swap_four_budgets_by_default(tmp_path: Path) -> None:
    found = resolve((16 << 20) + 5, swap_path=tmp_path)
    assert found.swap_bytes == 64 << 20
    assert found.slot_count == 4 * found.frame_count


def test_needs_a_pool_without_swap_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSWAP_DIR", "/nowhere/at/all")
    found = resolve("16 MiB", 0)
    assert (found.swap_bytes, found.slot_count, found.swap_path) == (0, 0, None)


@pytest.mark.parametrize("swap", [-1, "lots", 1.5, True, 1 << 47, (1 << 47) - 1])
def test_is_no_swap_size_refused_by_name(swap: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"swap .*"):
        resolve("16 MiB", swap)


def test_are_made_up_names_unlike_each_other() -> None:
    names = {resolve("16 MiB", 0).name for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch(rf"pyswap-{os.getpid()}-[0-9a-f]{{8}}", name) for name in names)


@pytest.mark.parametrize("name", ["a", "My_pool-1.2", "x" * 64])
def test_is_a_plain_name_kept(name: str) -> None:
    assert resolve("16 MiB", 0, name=name).name == name


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "x" * 65, "\u00e9", "a\0"])
def test_is_a_name_with_other_characters_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name must be 1 to 64 ASCII letters"):
        resolve("16 MiB", 0, name=name)


@pytest.mark.parametrize("name", [b"a", 1, False])
def test_is_a_name_that_is_no_str_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=r"^name must be a str"):
        resolve("16 MiB", 0, name=name)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_, 0, 1, np.array(True)])
def test_is_a_truth_value_for_overcommit_made_a_bool(value: object) -> None:
    found = resolve("16 MiB", 0, overcommit=value).overcommit
    assert found is bool(value)


@pytest.mark.parametrize("value", ["no", "", None, 2, 1.0, np.array([True]), []])
def test_is_something_else_for_overcommit_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^overcommit must be True or False"):
        resolve("16 MiB", 0, overcommit=value)


# Where swap goes


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_is_a_folder_taken_as_text_path_or_bytes(
    kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    found = resolve("16 MiB", "1 MiB", kind(tmp_path))
    assert (found.swap_path, found.swap_is_file) == (tmp_path, False)


def test_is_a_missing_name_in_a_folder_a_new_file(tmp_path: Path) -> None:
    found = resolve("16 MiB", "1 MiB", tmp_path / "swap")
    assert (found.swap_path, found.swap_is_file) == (tmp_path / "swap", True)
    assert os.listdir(tmp_path) == []


def test_does_a_relative_path_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("16 MiB", "1 MiB", "swap").swap_path == tmp_path / "swap"
    assert resolve("16 MiB", "1 MiB", ".").swap_path == tmp_path


@pytest.mark.parametrize("below", ["missing/swap", "missing/"])
def test_is_a_missing_folder_refused(below: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"swap_path .*does not exist") as caught:
        resolve("16 MiB", "1 MiB", f"{tmp_path}/{below}")
    assert caught.value.filename == f"{tmp_path}/{below}".rstrip("/")
    assert os.listdir(tmp_path) == []


def test_is_an_existing_file_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("data")
    with pytest.raises(FileExistsError, match="swap_path exists already"):
        resolve("16 MiB", "1 MiB", file)
    assert file.read_text() == "data"


def test_is_a_file_taken_for_a_folder_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        resolve("16 MiB", "1 MiB", tmp_path / "file" / "swap")


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("target", [".", "dangling"])
def test_is_a_symbolic_link_refused(slash: str, target: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"^swap_path .* is a symbolic link"):
        resolve("16 MiB", "1 MiB", f"{tmp_path}/link{slash}")


def test_is_a_symbolic_link_in_the_middle_of_the_path_followed(tmp_path: Path) -> None:
    (tmp_path / "real" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    found = resolve("16 MiB", "1 MiB", tmp_path / "link" / "folder")
    assert found.swap_path == tmp_path / "link" / "folder"


def test_is_a_device_fifo_or_socket_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/null"):
            with pytest.raises(ValueError, match=r"^swap_path .* special file"):
                resolve("16 MiB", "1 MiB", path)


@pytest.mark.parametrize("path", ["", b"", "a\0b"])
def test_is_an_impossible_path_refused(path: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^swap_path must be the path"):
        resolve("16 MiB", "1 MiB", path)


@pytest.mark.parametrize("path", [1, True, ["/tmp"], 1.5])
def test_is_no_path_refused(path: Any) -> None:
    with pytest.raises(TypeError, match=r"^swap_path must be a path"):
        resolve("16 MiB", "1 MiB", path)


def test_is_a_path_checked_though_there_is_no_swap(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        resolve("16 MiB", 0, tmp_path / "missing" / "swap")


@pytest.mark.user
@pytest.mark.parametrize("mode", [0o500, 0o600, 0o000])
@pytest.mark.parametrize("below", ["", "swap"])
def test_is_a_folder_that_this_user_cannot_use_refused(
    mode: int, below: str, public_folder: Path
) -> None:
    folder = public_folder / "closed"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    folder.chmod(mode)
    error = in_child(lambda: resolve("16 MiB", "1 MiB", folder / below), as_nobody=True)
    folder.chmod(0o700)
    assert isinstance(error, PermissionError)
    assert error.errno == errno.EACCES
    assert str(folder) in str(error)


@pytest.mark.user
def test_is_the_kernel_asked_where_access_is_only_said_to_be_there(
    public_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = public_folder / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    monkeypatch.setattr(os, "access", lambda *_, **__: True)
    error = in_child(lambda: resolve("16 MiB", "1 MiB", folder), as_nobody=True)
    assert isinstance(error, PermissionError)


def test_is_a_read_only_file_system_refused(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "ro,size=64m") as disk:
        with pytest.raises(PermissionError, match="may not make files") as caught:
            resolve("16 MiB", "1 MiB", disk)
        assert caught.value.filename == str(disk)


@pytest.mark.parametrize("below", ["", "swap"])
def test_is_a_disk_without_the_room_refused_with_both_numbers(below: str, tmp_path: Path) -> None:
    room = os.statvfs(tmp_path)
    swap_bytes = (room.f_bavail * room.f_frsize // (1 << 30) + 64) << 30
    with pytest.raises(OSError, match="swap needs") as caught:
        resolve("16 MiB", swap_bytes, tmp_path / below)
    assert caught.value.errno == errno.ENOSPC
    numbers = [int(number) for number in re.findall(r"\((\d+) bytes\)", str(caught.value))]
    assert numbers[0] == swap_bytes
    assert numbers[1] < swap_bytes
    assert os.listdir(tmp_path) == []


def test_does_a_small_disk_refuse_exactly_what_is_over_its_room(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=8m") as disk:
        assert resolve("16 MiB", 8 << 20, disk).swap_bytes == 8 << 20
        with pytest.raises(OSError, match=r"\(8388608 bytes\) free"):
            resolve("16 MiB", (8 << 20) + 1, disk)


def test_takes_swap_half_of_a_small_disk_where_nobody_said_how_much(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "disk", "size=8m") as disk:
        for path in (disk, disk / "swap"):
            assert resolve("16 MiB", swap_path=path).swap_bytes == 4 << 20
        assert resolve("1 MiB", swap_path=disk).swap_bytes == 4 << 20
        (disk / "full").write_bytes(bytes(8 << 20))
        with pytest.raises(OSError, match="swap needs") as caught:
            resolve("16 MiB", swap_path=disk)
        assert caught.value.errno == errno.ENOSPC
    with mounted("ramfs", tmp_path / "disk") as disk:
        assert resolve("16 MiB", swap_path=disk).swap_bytes == 64 << 20


def test_is_a_file_system_that_does_not_know_its_room_believed(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "disk") as disk:
        assert os.statvfs(disk).f_blocks == 0
        assert resolve("16 MiB", "64 GiB", disk).swap_path == disk


def test_is_pyswap_dir_the_default_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSWAP_DIR", str(tmp_path))
    assert resolve("16 MiB", "1 MiB").swap_path == tmp_path
    monkeypatch.setenv("PYSWAP_DIR", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="PYSWAP_DIR"):
        resolve("16 MiB", "1 MiB")


def test_is_the_temporary_folder_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSWAP_DIR", raising=False)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
    assert resolve("16 MiB", "1 MiB").swap_path == tmp_path / "real"


def test_is_var_tmp_the_default_where_the_temporary_folder_is_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSWAP_DIR", raising=False)
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    monkeypatch.setattr(settings, "_DURABLE_FOLDER", disk)
    assert is_tmpfs("/dev/shm")
    assert resolve("16 MiB", "1 MiB").swap_path == disk
    monkeypatch.setattr(settings, "_DURABLE_FOLDER", tmp_path / "missing")
    assert resolve("16 MiB", "1 MiB").swap_path == Path("/dev/shm")


def test_leaves_a_refusal_no_file_descriptor_behind(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    resolve("16 MiB", "1 MiB", tmp_path)
    with pytest.raises(OSError, match="swap needs"):
        resolve("16 MiB", "64 TiB", tmp_path)
    assert os.listdir("/proc/self/fd") == before


# What the cgroups leave


def fake_proc(folder: Path, cgroup: str, mounts: str) -> Path:
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(cgroup)
    (proc / "self" / "mountinfo").write_text(mounts)
    return proc


def write_facts(folder: Path, **facts: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in facts.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_are_all_ancestors_of_a_version_2_cgroup_read(tmp_path: Path) -> None:
    top = tmp_path / "c group"
    write_facts(top)
    write_facts(top / "a", memory__max=1000, memory__high="max", memory__current=300)
    (top / "a" / "memory.stat").write_text(
        "anon 5\ninactive_file 40\nactive_file 50\nslab_reclaimable 10\nshmem 100\n"
    )
    write_facts(top / "a" / "b", memory__max="max", memory__high=700, memory__current=650)
    write_facts(top / "a" / "b" / "c", memory__max="max", memory__high="max", memory__current=9)
    point = str(top).replace(" ", "\\040")
    proc = fake_proc(
        tmp_path,
        "0::/a/b/c\n",
        f"30 20 0:30 / {point} rw,relatime shared:9 - cgroup2 cgroup2 rw\n",
    )
    levels = settings._cgroup_levels(proc)
    assert [(level.limit_bytes, level.available_bytes) for level in levels] == [
        (700, 50),
        (1000, 800),
    ]


def test_are_all_ancestors_of_a_version_1_cgroup_read(tmp_path: Path) -> None:
    top = tmp_path / "memory"
    unlimited = (1 << 63) - 4096
    write_facts(top, memory__limit_in_bytes=unlimited, memory__usage_in_bytes=10)
    write_facts(top / "a", memory__limit_in_bytes=5000, memory__usage_in_bytes=4000)
    (top / "a" / "memory.stat").write_text(
        "inactive_file 1\ntotal_inactive_file 600\ntotal_active_file 400\n"
    )
    write_facts(top / "a" / "b", memory__limit_in_bytes=9000, memory__usage_in_bytes=1000)
    (top / "a" / "b" / "memory.stat").write_text("hierarchical_memory_limit 4500\n")
    proc = fake_proc(
        tmp_path,
        "5:cpu,cpuacct:/x\n4:hugetlb,memory:/a/b\n0::/\n",
        f"31 20 0:31 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 20 0:32 / {top} rw - cgroup cgroup rw,memory,hugetlb\n",
    )
    levels = settings._cgroup_levels(proc)
    assert [(level.limit_bytes, level.available_bytes) for level in levels] == [
        (4500, 3500),
        (5000, 2000),
        (unlimited, unlimited - 10),
    ]


@pytest.mark.parametrize(
    ("cgroup", "root"),
    [
        ("/docker/1f", "/docker/1f"),
        ("/docker/1f", "/other"),
        ("/", "/"),
        ("/../../elsewhere", "/docker"),
    ],
)
def test_is_the_mounted_root_read_in_a_container(cgroup: str, root: str, tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    write_facts(top, memory__max=1000, memory__current=100)
    proc = fake_proc(
        tmp_path, f"0::{cgroup}\n", f"30 20 0:30 {root} {top} rw - cgroup2 cgroup2 rw\n"
    )
    levels = settings._cgroup_levels(proc)
    assert [(level.limit_bytes, level.available_bytes) for level in levels] == [(1000, 900)]


def test_is_a_machine_without_cgroups_unlimited(tmp_path: Path) -> None:
    assert settings._cgroup_levels(tmp_path) == []
    assert settings._cgroup_levels(fake_proc(tmp_path, "0::/\n", "")) == []


def test_is_the_smaller_of_machine_and_cgroup_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "cgroup"
    write_facts(top, memory__max=200 << 20, memory__current=100 << 20)
    proc = fake_proc(tmp_path, "0::/\n", f"30 20 0:30 / {top} rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(settings, "_PROC", proc)
    assert available_memory() == 100 << 20
    assert resolve(0.5, 0).memory_bytes == 50 << 20
    with pytest.raises(ValueError, match=r"its cgroup is limited to 200\.0 MiB \(209715200 bytes"):
        resolve("201 MiB", 0)
    write_facts(top, memory__max=1 << 60, memory__current=0)
    assert 0 < available_memory() <= psutil.virtual_memory().total
    write_facts(top, memory__max=1 << 20, memory__current=2 << 20)
    assert available_memory() == 0


def own_memory_cgroup() -> Path:
    """The folder that a cgroup for a test is made in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, cgroup = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / cgroup.lstrip("/")
    return Path("/sys/fs/cgroup")


def remove_cgroup(folder: Path) -> None:
    """Remove a cgroup; the kernel lets go of the last process a moment after its exit."""

    def is_busy() -> bool:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return True
        return False

    deadline_s = time.monotonic() + 10
    while is_busy():
        assert time.monotonic() < deadline_s, f"{folder} is still in use"


def test_does_a_real_limit_of_an_ancestor_bound_the_budget() -> None:
    require("memcg")
    outer = own_memory_cgroup() / f"pyswap-test-{os.getpid()}"
    outer.mkdir()
    try:
        v1 = outer / "memory.limit_in_bytes"
        (v1 if v1.exists() else outer / "memory.max").write_text(str(96 << 20))
        inner = outer / "inner"
        inner.mkdir()
        try:
            program = (
                "from pyswap.settings import available_memory, resolve\n"
                "assert 0 < available_memory() <= 96 << 20\n"
                "assert resolve(0.5, 0).memory_bytes <= 48 << 20\n"
                "assert resolve('90 MiB', 0).memory_bytes == 90 << 20\n"
                "try: resolve('97 MiB', 0)\n"
                "except ValueError as error: print(error)\n"
            )
            script = 'echo $$ > "$1/cgroup.procs" && exec "$2" -c "$3"'
            ran = subprocess.run(
                ["sh", "-c", script, "sh", str(inner), sys.executable, program],
                env={**os.environ, "PYTHONPATH": str(Path(settings.__file__).parents[1])},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            remove_cgroup(inner)
    finally:
        remove_cgroup(outer)
    assert ran.returncode == 0, ran.stderr
    assert "its cgroup is limited to 96.0 MiB" in ran.stdout


def test_is_a_folder_on_a_disk_told_from_one_in_memory(tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path / "memory") as memory:
        assert is_tmpfs(memory)
    assert stat.S_ISDIR(os.stat("/proc").st_mode)
    assert not is_tmpfs("/proc")
    with pytest.raises(FileNotFoundError):
        is_tmpfs(tmp_path / "missing")

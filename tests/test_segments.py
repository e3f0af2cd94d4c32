"""Segments and the swap file: what they are, what is refused, and that nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import posix_ipc
import pytest
from conftest import require
from test_settings import NOBODY, in_child, mounted, public_folder  # noqa: F401

from pyswap import segments
from pyswap.segments import create_segment, open_swap, remove_stale_segments
from pyswap.settings import Settings, resolve

SWAP_BYTES = 4 << 20


@contextmanager
def closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def made_names(folder: Path = Path("/dev/shm")) -> list[str]:
    """Names that this process made and has not unlinked."""
    return [name for name in os.listdir(folder) if f".{os.getpid()}." in name]


# Segments


@pytest.mark.user
@pytest.mark.parametrize("resident_bytes", [1 << 20, 1 << 45], ids=["dev_shm", "memfd"])
def test_is_a_segment_sparse_private_nameless_and_of_its_size(resident_bytes: int) -> None:
    with closing(create_segment("store", 1 << 46, resident_bytes)) as fd:
        found = os.fstat(fd)
        assert found.st_size == 1 << 46
        assert found.st_blocks == 0
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert found.st_uid == os.geteuid()
        assert found.st_nlink == 0
        assert not os.get_inheritable(fd)
        os.pwrite(fd, b"x", 1 << 45)
        assert os.pread(fd, 3, (1 << 45) - 1) == b"\0x\0"
        with mmap.mmap(fd, 1 << 20) as view:
            view[5] = 7
        assert os.pread(fd, 1, 5) == b"\7"
    assert made_names() == []


def test_has_a_segment_exactly_an_odd_size() -> None:
    with closing(create_segment("control", 12345, 12345)) as fd:
        assert os.fstat(fd).st_size == 12345


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_does_the_umask_leave_a_segment_as_it_is(umask: int) -> None:
    def modes() -> list[int]:
        os.umask(umask)
        fds = [create_segment("store", 4096, 4096), create_segment("store", 1 << 45, 1 << 45)]
        return [stat.S_IMODE(os.fstat(fd).st_mode) for fd in fds]

    assert in_child(modes) == [0o600, 0o600]


def is_memfd(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:pyswap.store")


def test_is_dev_shm_used_where_it_has_the_room() -> None:
    with closing(create_segment("store", 1 << 40, 1 << 20)) as fd:
        assert not is_memfd(fd)
        assert os.fstat(fd).st_dev == os.stat("/dev/shm").st_dev


def test_is_a_memfd_used_and_logged_where_dev_shm_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("tmpfs", tmp_path / "shm", "size=4m") as shm:
        monkeypatch.setattr(segments, "_SHM_FOLDER", shm)
        with (
            caplog.at_level(logging.INFO, "pyswap"),
            closing(create_segment("store", 1 << 30, (4 << 20) + 1)) as fd,
        ):
            assert is_memfd(fd)
    assert f"({(4 << 20) + 1} bytes)" in caplog.text
    assert f"({4 << 20} bytes)" in caplog.text


def test_is_a_memfd_used_and_logged_where_dev_shm_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for folder, reason in [(Path("/proc"), "no tmpfs"), (tmp_path / "missing", "No such file")]:
        monkeypatch.setattr(segments, "_SHM_FOLDER", folder)
        with (
            caplog.at_level(logging.INFO, "pyswap"),
            closing(create_segment("store", 4096, 4096)) as fd,
        ):
            assert is_memfd(fd)
        assert reason in caplog.text


@pytest.mark.parametrize(
    "error", [posix_ipc.PermissionsError("no permission"), OSError("no space for a name")]
)
def test_is_a_memfd_used_and_logged_where_making_a_name_fails(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)
    with (
        caplog.at_level(logging.INFO, "pyswap"),
        closing(create_segment("store", 4096, 4096)) as fd,
    ):
        assert is_memfd(fd)
    assert str(error) in caplog.text


def test_is_an_interrupt_after_the_name_is_made_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    make = posix_ipc.SharedMemory

    def interrupted(*arguments: Any, **options: Any) -> None:
        made = make(*arguments, **options)
        assert made.name.lstrip("/") in made_names()
        made.close_fd()
        raise KeyboardInterrupt

    monkeypatch.setattr(posix_ipc, "SharedMemory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_segment("store", 4096, 4096)
    assert made_names() == []


@pytest.mark.parametrize(
    ("size", "resident_bytes"),
    [(0, 0), (-1, 0), (4096, 4097), (4096, -1), ((1 << 46) + 1, 0)],
)
def test_is_a_segment_of_an_impossible_size_refused(size: int, resident_bytes: int) -> None:
    with pytest.raises(ValueError, match="a segment has 1 to"):
        create_segment("store", size, resident_bytes)


@pytest.mark.parametrize("label", ["", "a/b", "a.b", "x" * 33, "a\n"])
def test_is_a_label_that_makes_no_name_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        create_segment(label, 4096, 4096)


def limited(what: int, bound: int, function: Callable[[], Any]) -> Any:
    """What comes of `function` in a child with a resource limit."""

    def run() -> Any:
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (bound, hard))
        return function()

    return in_child(run)


def test_is_a_segment_over_the_limit_on_files_refused_before_it_is_made() -> None:
    def outcome() -> tuple[int, bool, list[str]]:
        before = os.listdir("/proc/self/fd")
        # The kernel's answer would be this signal, which by default ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        try:
            create_segment("store", (1 << 20) + 1, 4096)
        except OSError as error:
            is_clean = os.listdir("/proc/self/fd") == before
            return error.errno or 0, is_clean, str(error).split()
        os.close(create_segment("store", 1 << 20, 4096))
        return 0, False, []

    number, is_clean, words = limited(resource.RLIMIT_FSIZE, 1 << 20, outcome)
    assert number == errno.EFBIG
    assert is_clean
    assert {"(1048577", "1048576", "(RLIMIT_FSIZE,"} <= set(words)


def test_is_a_segment_as_large_as_the_limit_on_files_made() -> None:
    answer = limited(
        resource.RLIMIT_FSIZE, 1 << 20, lambda: os.fstat(create_segment("a", 1 << 20, 0)).st_size
    )
    assert answer == 1 << 20


def test_does_a_process_out_of_file_descriptors_read_why() -> None:
    def run() -> int:
        with suppress(OSError):
            while True:
                os.open("/dev/null", os.O_RDONLY)
        return create_segment("store", 4096, 4096)

    error = limited(resource.RLIMIT_NOFILE, 64, run)
    assert isinstance(error, OSError)
    assert error.errno == errno.EMFILE
    assert "cannot make the store segment" in str(error)
    assert "limited to 64, RLIMIT_NOFILE" in str(error)
    assert made_names() == []


def test_is_a_segment_that_is_not_as_it_was_made_refused_and_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "ftruncate", lambda *_: None)
    with pytest.raises(OSError, match="the store segment is not as it was made"):
        create_segment("store", 4096, 4096)
    assert os.listdir("/proc/self/fd") == before
    assert made_names() == []


# Names left behind


def killed_between_making_and_unlinking() -> tuple[int, str]:
    """A child that died there and still waits to be reaped; its pid, and the name it left."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:

        def die(name: str) -> None:
            assert os.path.exists(f"/dev/shm{name}")
            os.write(writing, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

        posix_ipc.unlink_shared_memory = die
        try:
            create_segment("store", 4096, 4096)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        name = pipe.read()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid, name


@pytest.mark.parametrize("is_reaped", [False, True])
def test_is_a_name_left_by_a_kill_removed(is_reaped: bool) -> None:
    pid, name = killed_between_making_and_unlinking()
    if is_reaped:
        os.waitpid(pid, 0)
    try:
        assert name.startswith(f"/pyswap.store.{pid}.")
        remove_stale_segments()
        assert not os.path.exists(f"/dev/shm{name}")
    finally:
        if not is_reaped:
            os.waitpid(pid, 0)


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev/shm, which other programs look through at the same time."""
    monkeypatch.setattr(segments, "_SHM_FOLDER", tmp_path)
    return tmp_path


def left(folder: Path, *, pid: int, start_time: int, label: str = "store") -> Path:
    path = folder / f"pyswap.{label}.{pid}.{start_time}.0123456789abcdef"
    path.touch()
    return path


def own_start_time() -> int:
    """Field 22 of this process's stat; our own program's name has no parentheses."""
    return int(Path("/proc/self/stat").read_text().split(") ")[1].split()[19])


def test_are_the_names_of_the_dead_removed_and_returned(shm: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    gone = left(shm, pid=pid, start_time=1)
    reused = left(shm, pid=os.getpid(), start_time=own_start_time() + 1)
    assert sorted(remove_stale_segments()) == sorted(f"/{path.name}" for path in (gone, reused))
    assert os.listdir(shm) == []


def test_is_the_name_of_a_living_maker_kept_for_a_minute(shm: Path) -> None:
    path = left(shm, pid=os.getpid(), start_time=own_start_time())
    assert remove_stale_segments() == []
    now = time.time()
    os.utime(path, (now, now - segments.STALE_AGE_S - 1))
    assert remove_stale_segments() == [f"/{path.name}"]
    assert os.listdir(shm) == []


def test_does_a_maker_whose_name_was_removed_early_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = posix_ipc.unlink_shared_memory

    def too_late(name: str) -> None:
        unlink(name)
        unlink(name)

    monkeypatch.setattr(posix_ipc, "unlink_shared_memory", too_late)
    with closing(create_segment("store", 4096, 4096)) as fd:
        assert not is_memfd(fd)
        assert os.pwrite(fd, b"x", 0) == 1


def test_is_what_others_made_left_alone(shm: Path) -> None:
    names = [
        "pyswap",
        "pyswap.store.1.1",
        "pyswap.store.1.1.0123456789abcde",
        "pyswap.store.1.1.0123456789abcdef.x",
        "pyswap.store.x.1.0123456789abcdef",
        "xpyswap.store.1.1.0123456789abcdef",
        "psm_0123",
    ]
    for name in names:
        (shm / name).touch()
    (shm / "pyswap.folder.1.1.0123456789abcdef").mkdir()
    (shm / "pyswap.link.1.1.0123456789abcdef").symlink_to("psm_0123")
    before = sorted(os.listdir(shm))
    assert remove_stale_segments() == []
    assert sorted(os.listdir(shm)) == before


def test_are_the_names_of_another_user_left_alone(shm: Path) -> None:
    require("root")
    path = left(shm, pid=os.getpid(), start_time=1)
    os.chown(path, NOBODY, NOBODY)
    assert remove_stale_segments() == []
    assert path.exists()


def test_is_a_name_that_cannot_be_removed_logged(
    shm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = left(shm, pid=os.getpid(), start_time=1)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refuse)
    assert remove_stale_segments() == []
    assert f"cannot remove {path}" in caplog.text


def test_does_a_missing_dev_shm_have_no_stale_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_SHM_FOLDER", tmp_path / "missing")
    assert remove_stale_segments() == []


# The swap file


def swap_settings(path: Path, swap: int = SWAP_BYTES, page_size: int = 4096) -> Settings:
    return resolve("16 MiB", swap, path, page_size)


def check_swap_file(fd: int, is_direct: bool, swap_bytes: int = SWAP_BYTES) -> None:
    """A nameless private file of its size that takes aligned transfers, direct as said."""
    found = os.fstat(fd)
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_size, found.st_nlink) == (swap_bytes, 0)
    assert not os.get_inheritable(fd)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    assert bool(flags & os.O_DIRECT) is is_direct
    assert not flags & os.O_APPEND
    with mmap.mmap(-1, 4096) as page, mmap.mmap(-1, 4096) as copy:
        assert os.preadv(fd, [copy], 0) == 4096
        assert copy[:] == bytes(4096)
        page[:] = os.urandom(4096)
        assert os.pwrite(fd, page, swap_bytes - 4096) == 4096
        assert os.preadv(fd, [copy], swap_bytes - 4096) == 4096
        assert copy[:] == page[:]


@pytest.mark.user
@pytest.mark.parametrize("below", ["", "swap"], ids=["folder", "new_file"])
@pytest.mark.parametrize("page_size", [4096, 65536])
def test_is_the_swap_file_nameless_reserved_and_as_direct_as_said(
    below: str, page_size: int, tmp_path: Path
) -> None:
    fd, is_direct = open_swap(swap_settings(tmp_path / below, page_size=page_size))
    with closing(fd):
        assert os.listdir(tmp_path) == []
        assert os.fstat(fd).st_blocks * 512 >= SWAP_BYTES
        check_swap_file(fd, is_direct)


@pytest.mark.user
def test_is_giving_the_swap_file_a_name_later_refused(tmp_path: Path) -> None:
    fd, _ = open_swap(swap_settings(tmp_path))
    # Only with a folder's descriptor does Python call linkat, which follows the link.
    with (
        closing(fd),
        closing(os.open(tmp_path, os.O_RDONLY)) as folder,
        pytest.raises(FileNotFoundError),
    ):
        os.link(f"/proc/self/fd/{fd}", "swap", dst_dir_fd=folder, follow_symlinks=True)
    assert os.listdir(tmp_path) == []


def test_is_swap_0_no_file(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    assert open_swap(swap_settings(tmp_path, 0)) == (-1, False)
    assert open_swap(replace(swap_settings(tmp_path, 0), swap_path=None)) == (-1, False)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_is_a_new_file_that_exists_by_now_left_alone(kind: str, tmp_path: Path) -> None:
    settings = swap_settings(tmp_path / "swap")
    if kind == "file":
        (tmp_path / "swap").write_text("precious")
    else:
        (tmp_path / "swap").symlink_to("nowhere")
    with pytest.raises(FileExistsError) as caught:
        open_swap(settings)
    assert caught.value.filename == str(tmp_path / "swap")
    assert os.listdir(tmp_path) == ["swap"]
    if kind == "file":
        assert (tmp_path / "swap").read_text() == "precious"


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file system without O_TMPFILE; the list fills with the names that files are made by."""
    real_open = os.open
    names: list[str] = []

    def refusing_open(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(path))
        if flags & os.O_CREAT:
            names.append(os.fspath(path))
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing_open)
    return names


@pytest.mark.parametrize("below", ["", "swap"], ids=["folder", "new_file"])
def test_is_a_named_file_unlinked_at_once_where_there_are_no_nameless_ones(
    below: str, tmp_path: Path, no_tmpfile: list[str]
) -> None:
    fd, is_direct = open_swap(swap_settings(tmp_path / below))
    with closing(fd):
        assert os.listdir(tmp_path) == []
        check_swap_file(fd, is_direct)
    name = no_tmpfile[0]
    assert len(no_tmpfile) == 1
    assert Path(name).parent == tmp_path
    assert Path(name).name == below or Path(name).name.startswith(f"pyswap.swap.{os.getpid()}.")


def test_is_a_file_that_appears_at_the_last_moment_left_alone(
    tmp_path: Path, no_tmpfile: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = swap_settings(tmp_path / "swap")
    (tmp_path / "swap").write_text("precious")
    monkeypatch.setattr(os.path, "lexists", lambda _: False)
    with pytest.raises(FileExistsError):
        open_swap(settings)
    assert (tmp_path / "swap").read_text() == "precious"


def test_are_old_swap_files_of_the_dead_removed_where_names_are_needed(
    tmp_path: Path, no_tmpfile: list[str]
) -> None:
    settings = swap_settings(tmp_path)
    old = left(tmp_path, pid=os.getpid(), start_time=1, label="swap")
    young = left(tmp_path, pid=os.getpid(), start_time=2, label="swap")
    now = time.time()
    os.utime(old, (now, now - segments.STALE_AGE_S - 1))
    fd, _ = open_swap(settings)
    os.close(fd)
    assert os.listdir(tmp_path) == [young.name]


def test_is_swap_buffered_and_logged_on_a_file_system_that_can_neither_reserve_nor_bypass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("ramfs", tmp_path / "disk") as disk:
        # Large enough for a library that writes to every block instead to be seen in st_blocks.
        fd, is_direct = open_swap(swap_settings(disk, 1 << 30))
        with closing(fd):
            assert not is_direct
            assert os.fstat(fd).st_blocks * 512 < 1 << 20
            check_swap_file(fd, is_direct, 1 << 30)
        assert os.listdir(disk) == []
    assert "cannot reserve the 1.0 GiB of swap" in caplog.text
    assert "no O_DIRECT" in caplog.text
    assert "is on a tmpfs" in caplog.text


def test_is_swap_buffered_where_the_flag_is_taken_and_the_transfer_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        fd, is_direct = open_swap(swap_settings(tmp_path))
    with closing(fd):
        assert not is_direct
        check_swap_file(fd, is_direct)
    assert "no O_DIRECT" in caplog.text


def test_does_a_disk_that_filled_up_meanwhile_answer_with_both_numbers(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with mounted("tmpfs", tmp_path / "disk", "size=8m") as disk:
        settings = swap_settings(disk, 8 << 20)
        (disk / "other").write_bytes(bytes(1 << 20))
        with pytest.raises(OSError, match="cannot reserve") as caught:
            open_swap(settings)
        assert os.listdir(disk) == ["other"]
        assert os.listdir("/proc/self/fd") == before
    assert caught.value.errno == errno.ENOSPC
    assert "(8388608 bytes)" in str(caught.value)
    assert "(7340032 bytes)" in str(caught.value)


def test_does_a_sparse_file_over_the_file_systems_bound_answer_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    def too_large(*_: object) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(os, "ftruncate", too_large)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"cannot reserve 4\.0 MiB .*: File too large"):
        open_swap(swap_settings(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_is_an_input_error_while_swap_is_made_raised_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="Input/output error"):
        open_swap(swap_settings(tmp_path))
    assert os.listdir("/proc/self/fd") == before
    assert os.listdir(tmp_path) == []


def test_is_swap_over_the_limit_on_files_refused_before_it_is_made(tmp_path: Path) -> None:
    settings = swap_settings(tmp_path)
    error = limited(resource.RLIMIT_FSIZE, SWAP_BYTES - 1, lambda: open_swap(settings))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG
    assert "the swap file takes a file of 4.0 MiB (4194304 bytes)" in str(error)
    fd, _ = limited(resource.RLIMIT_FSIZE, SWAP_BYTES, lambda: open_swap(settings))
    assert fd >= 0


@pytest.mark.user
def test_is_a_folder_that_was_closed_meanwhile_refused(public_folder: Path) -> None:  # noqa: F811
    folder = public_folder / "open"
    folder.mkdir()
    settings = swap_settings(folder)
    folder.chmod(0o555)
    error = in_child(lambda: open_swap(settings), as_nobody=True)
    folder.chmod(0o755)
    assert isinstance(error, PermissionError)

"""Does the doctor see what a machine allows, say what happens there, and name what helps?

Each line is looked at in a place that shows it; where a command is said to help, it is run there.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import memcg_candidates, memcg_parent, missing, require
from test_settings import fake_proc, in_child, write_facts

from pyswap import doctor, settings
from pyswap.doctor import Finding

DOCTOR = shlex.join([sys.executable, "-m", "pyswap", "doctor"])

# Refuses the system call, and the ioctl by which root gets one from /dev/userfaultfd.
REFUSE = """
import ctypes, os, struct, sys
number = {"x86_64": (323, 16), "aarch64": (282, 29)}[os.uname().machine]
ALLOW, EPERM = 0x7FFF0000, 0x00050001
code = [
    (0x20, 0, 0, 0), (0x15, 4, 0, number[0]), (0x15, 0, 2, number[1]),
    (0x20, 0, 0, 24), (0x15, 1, 0, 0xAA00), (0x06, 0, 0, ALLOW), (0x06, 0, 0, EPERM),
]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program, 0, 0) == 0, "PR_SET_SECCOMP"
os.execvp(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class Told:
    status: int
    findings: dict[str, Finding]


def parsed(text: str) -> dict[str, Finding]:
    """What the doctor printed, by topic."""
    found: dict[str, Finding] = {}
    head = r"^(\S.{17})(good|limited|refused) +(.*)\n    (.*)(?:\n    \$ (.*))?$"
    for column, verdict, what, therefore, better in re.findall(head, text, re.MULTILINE):
        topic = column.strip()
        found[topic] = Finding(topic, what, verdict, therefore, better or None)
    return found


def ask(setup: str = "true", *before: str, in_namespace: bool = False) -> Told:
    """Run the doctor in a shell after `setup`, started by `before`, in its own mounts if wanted."""
    shell = [*before, "sh", "-ec", f"{setup}\nexec {DOCTOR}"]
    if in_namespace:
        require("root")
        shell = ["unshare", "--mount", "--propagation", "private", *shell]
    answer = subprocess.run(
        shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )
    assert answer.returncode in (0, 1), answer.stderr
    assert answer.stderr == ""
    findings = parsed(answer.stdout)
    assert len(findings) >= 6, answer.stdout
    return Told(answer.returncode, findings)


def after(command: str | None) -> str:
    """A command that the doctor named, as this user runs it: tests are root where it matters."""
    assert command is not None
    return command.replace("sudo ", "")


def test_are_all_lines_there_and_true_of_this_machine() -> None:
    told = ask()
    assert list(told.findings) == [
        "userfaultfd",
        "/dev/shm",
        "memory",
        "swap folder",
        "O_DIRECT",
        "swap speed",
        "vm.max_map_count",
        "open files",
        "file size",
        "a pool",
    ]
    found = told.findings
    assert found["userfaultfd"].found == ("user mode only" if missing("uffd") else "full")
    assert found["vm.max_map_count"].found == Path("/proc/sys/vm/max_map_count").read_text().strip()
    speeds = re.findall(r"\d[\d,]*", found["swap speed"].found)
    assert all(int(number.replace(",", "")) > 0 for number in speeds)
    assert found["a pool"].verdict == "good"
    assert told.status == 0


def test_is_a_filter_that_refuses_userfaultfd_seen() -> None:
    told = ask("true", sys.executable, "-c", REFUSE)
    found = told.findings["userfaultfd"]
    assert (found.verdict, found.found) == ("refused", f"none: {os.strerror(errno.EPERM)}")
    assert found.better == "docker run --security-opt seccomp=unconfined ..."
    # It does what was said.
    assert "Error" in found.therefore
    assert told.findings["a pool"].verdict == "refused"
    assert "seccomp" in told.findings["a pool"].found
    assert told.status == 1


def test_is_a_small_dev_shm_seen_and_its_command_right() -> None:
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    told = ask(mount, in_namespace=True)
    found = told.findings["/dev/shm"]
    assert found.verdict == "limited"
    assert found.found == "64.0 MiB, 64.0 MiB free"
    assert "memfd" in found.therefore
    assert told.status == 0
    better = ask(f"{mount}\n{after(found.better)}", in_namespace=True)
    assert better.findings["/dev/shm"].verdict == "good"


def test_is_a_dev_shm_that_is_no_tmpfs_seen(tmp_path: Path) -> None:
    told = ask(f"mount --bind {tmp_path} /dev/shm", in_namespace=True)
    assert told.findings["/dev/shm"].verdict == "limited"
    assert "memfd" in told.findings["/dev/shm"].therefore
    assert told.findings["a pool"].verdict == "good"


def test_are_few_open_files_seen_and_the_processes_right_that_they_allow() -> None:
    found = ask("ulimit -n 64").findings["open files"]
    assert found.verdict == "limited"
    assert found.found == "64 (ulimit -n), 64 at most"
    match = re.search(r"at most (\d+) processes", found.therefore)
    assert match is not None
    most = int(match[1])
    assert 4 <= most <= 16
    # As many as were said, and not twice as many, can use an array.
    code = """
import os, sys, pyswap
pool = pyswap.Pool("64 MiB", 0)
a = pool.zeros(int(sys.argv[1]))
def use(i):
    if i == len(a):
        return 0
    child = os.fork()
    if child == 0:
        a[i] = 1
        os._exit(use(i + 1))
    return os.waitpid(child, 0)[1] != 0
use(1)
print(int(a.sum()) + 1)
"""
    line = shlex.join([sys.executable, "-W", "ignore", "-c", code])

    def processes(wanted: int) -> int:
        answer = subprocess.run(
            ["sh", "-ec", f"ulimit -n 64; exec {line} {wanted}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return int(answer.stdout or 0)

    assert processes(most) == most
    assert processes(2 * most) < 2 * most


def test_does_the_command_for_open_files_help() -> None:
    found = ask("ulimit -n 64").findings["open files"]
    match = re.fullmatch(r"sudo prlimit --pid \$\$ --nofile=(\d+):\1", found.better or "")
    assert match is not None
    better = ask(f"ulimit -n {match[1]}").findings["open files"]
    assert better.verdict == "good"
    assert better.therefore.endswith("enough for 256")


def test_is_swap_on_a_tmpfs_seen_and_its_command_right() -> None:
    mount = "mount -t tmpfs -o size=32m tmpfs /mnt; export PYSWAP_DIR=/mnt"
    found = ask(mount, in_namespace=True).findings["swap folder"]
    assert found.verdict == "limited"
    assert found.found == "/mnt: tmpfs, 32.0 MiB free"
    assert "memory" in found.therefore
    better = ask(f"{mount}\n{after(found.better)}", in_namespace=True).findings["swap folder"]
    assert better.verdict == "good"


def test_is_a_file_system_without_o_direct_seen() -> None:
    # Kernels differ in which file systems in memory take the flag; ramfs refused it on 6.18.
    mount = "mount -t ramfs ramfs /mnt; export PYSWAP_DIR=/mnt"
    told = ask(mount, in_namespace=True).findings
    direct = can_direct("ramfs")
    assert told["O_DIRECT"].found == ("yes" if direct else "no")
    assert told["O_DIRECT"].verdict == ("good" if direct else "limited")


def can_direct(kind: str) -> bool:
    code = "import os; os.close(os.open('/mnt/x', os.O_CREAT | os.O_RDWR | os.O_DIRECT))"
    line = shlex.join([sys.executable, "-c", code])
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f"mount -t {kind} {kind} /mnt; exec {line}"],
        capture_output=True,
        check=False,
    )
    return answer.returncode == 0


def test_is_a_folder_that_is_not_there_seen() -> None:
    told = ask("export PYSWAP_DIR=/nowhere")
    assert told.findings["swap folder"].verdict == "refused"
    assert "PYSWAP_DIR" in told.findings["swap folder"].found
    assert told.status == 1


def test_are_few_mappings_seen_and_the_command_right(tmp_path: Path) -> None:
    setting = tmp_path / "max_map_count"
    setting.write_text("30000\n")
    mount = f"mount --bind {setting} /proc/sys/vm/max_map_count"
    found = ask(mount, in_namespace=True).findings["vm.max_map_count"]
    assert (found.found, found.verdict) == ("30000", "limited")
    assert "15,000 pages" in found.therefore
    if shutil.which("sysctl") is None:
        assert found.better == "sudo sysctl -w vm.max_map_count=1048576"
        return
    told = ask(f"{mount}\n{after(found.better)} >/dev/null", in_namespace=True)
    better = told.findings["vm.max_map_count"]
    assert (better.found, better.verdict, better.better) == ("1048576", "good", None)


def test_is_a_limit_of_files_sizes_seen_and_the_command_right() -> None:
    told = ask("ulimit -S -f 2097152")
    found = told.findings["file size"]
    assert (found.found, found.verdict) == ("1.0 GiB (ulimit -f)", "refused")
    assert "OSError" in found.therefore
    assert "OSError" in told.findings["a pool"].found
    better = ask(f"ulimit -S -f 2097152\n{after(found.better)}")
    assert better.findings["file size"].verdict == "good"
    assert better.status == 0


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path]:
    """A control group of version 1 or 2 with a memory limit."""
    require("memcg")
    parent = memcg_parent()
    assert parent is not None
    name = next(limit for where, limit in memcg_candidates() if where == parent)
    group = parent / f"pyswap-doctor-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(limit_bytes))
        yield group / name
    finally:
        group.rmdir()


def test_is_the_limit_of_a_cgroup_seen_and_the_command_right() -> None:
    with limited_group(1 << 29) as limit:
        # Swap's room is written through this process's page cache, which the limit bounds.
        enter = f"echo $$ > {limit.parent}/cgroup.procs"
        found = ask(enter).findings["memory"]
        assert found.verdict == "limited"
        assert "is limited to 512.0 MiB" in found.found
        assert f"version {1 if limit.name == 'memory.limit_in_bytes' else 2}" in found.found
        assert "refused" in found.therefore
        better = ask(f"{enter}\n{{ {after(found.better)}; }} >/dev/null").findings["memory"]
        assert better.verdict == "good"


@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_is_the_limit_of_a_version_2_cgroup_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "cgroup"
    write_facts(top, memory__max="max", memory__high="max", memory__current=100 << 20)
    (top / name).write_text(f"{300 << 20}\n")
    proc = fake_proc(tmp_path, "0::/\n", f"30 20 0:30 / {top} rw - cgroup2 cgroup2 rw\n")
    monkeypatch.setattr(settings, "_PROC", proc)
    found = doctor._memory()
    assert found.found == "a cgroup (version 2) is limited to 300.0 MiB, 200.0 MiB available"
    assert found.therefore.startswith("Pool(0.5) takes 100.0 MiB")
    assert found.better == f"echo max | sudo tee {top / name}"


@pytest.mark.user
def test_does_another_user_see_what_it_may() -> None:
    findings = in_child(doctor.examine, as_nobody=True)
    assert isinstance(findings, list), findings
    found = {each.topic: each for each in findings}
    allowed = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if allowed.exists() and allowed.read_text().strip() == "1":
        assert found["userfaultfd"].found == "full"
    else:
        assert found["userfaultfd"].found == "user mode only"
        assert found["userfaultfd"].verdict == "limited"
        assert found["userfaultfd"].better == "sudo sysctl -w vm.unprivileged_userfaultfd=1"
        assert "pool.pin" in found["userfaultfd"].therefore
    if os.geteuid() != 0:
        # A child of root that became another user may not run root's Python.
        assert found["a pool"].verdict == "good", found["a pool"]


@pytest.mark.user
def test_is_a_folder_that_another_user_may_not_use_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv("PYSWAP_DIR", str(closed))
    found = {each.topic: each for each in in_child(doctor.examine, as_nobody=True)}
    assert found["swap folder"].verdict == "refused"
    assert "Permission denied" in found["swap folder"].found


def test_does_the_examination_leave_nothing(request: pytest.FixtureRequest) -> None:
    # The fixture that runs after every test compares files, processes and names.
    look: Callable[[], list[Finding]] = doctor.examine
    assert all(each.verdict != "refused" for each in look())

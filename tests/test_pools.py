"""Are this user's live pools found and told of, and nobody else's?"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from test_settings import in_child
from workers import until

import pyswap
from pyswap.pools import live_pools

LIMIT_S = 60


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyswap", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


def names() -> list[str]:
    return [pool.name for pool in live_pools()]


@pytest.mark.user
def test_is_a_pool_listed_as_long_as_it_lives() -> None:
    name = f"listed-{os.getpid()}"
    with pyswap.Pool("8 MiB", "16 MiB", page_size=4096, name=name) as pool:
        a = pool.ones(1 << 20, np.uint8)
        told = command("ls")
        (row,) = [line for line in told.stdout.splitlines() if line.startswith(name)]
        assert row.split() == [
            *(name, "8.0", "MiB", "1.0", "MiB", "16.0", "MiB", "0", "B", "1.0", "MiB"),
            *("1", str(pool.swapper_pid)),
        ]
        assert name in names()
    # Arrays that live keep it alive.
    assert name in names()
    del a
    until(lambda: name not in names(), "the pool ends")


@pytest.mark.user
def test_are_a_pools_numbers_its_own(pool: Any) -> None:
    a = pool.ones(20 << 20, np.uint8)
    pool.advise(a, "pageout")
    told = command("stat", pool.name)
    assert told.returncode == 0, told.stderr
    rows = dict(line.split(None, 1) for line in told.stdout.splitlines() if " " in line)
    stats = pool.stats()
    assert rows["slot_writes"].strip() == f"{stats.slot_writes:,}"
    assert rows["evictions"].strip() == f"{stats.evictions:,}"
    assert rows["memory_bytes"].strip() == "8.0 MiB"
    assert rows["processes"].strip() == str(os.getpid())
    assert set(stats.__dataclass_fields__) < set(rows)
    (found,) = [each for each in live_pools() if each.name == pool.name]
    assert found.stats() == pool.stats()


def test_are_pools_of_one_name_told_apart_by_their_swappers() -> None:
    name = f"twice-{os.getpid()}"
    with pyswap.Pool("8 MiB", 0, name=name) as one, pyswap.Pool("9 MiB", 0, name=name) as two:
        told = command("stat", name)
        assert told.returncode == 1
        assert str(one.swapper_pid) in told.stderr
        assert str(two.swapper_pid) in told.stderr
        assert "9.0 MiB" in command("stat", str(two.swapper_pid)).stdout


def test_is_a_pool_that_is_not_there_an_error_of_one_line() -> None:
    told = command("stat", "nobody-has-this-one")
    assert told.returncode == 1
    assert told.stderr.startswith("Error: no one live pool of this user is 'nobody-has-this-one'")
    assert len(told.stderr.splitlines()) == 1


def test_does_another_user_see_nothing(pool: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    assert pool.name in names()
    assert pool.name not in in_child(names, as_nobody=True)


class Terminal:
    """What a command shows on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "60"}
        command = [sys.executable, "-m", "pyswap", *words]
        self._process = subprocess.Popen(command, stdin=slave, stdout=slave, env=environment)
        os.close(slave)
        self.shown = ""

    def look(self) -> None:
        """Take what was shown since."""
        if select.select([self._master], [], [], 0.01)[0]:
            try:
                self.shown += os.read(self._master, 1 << 16).decode()
            except OSError:
                # The terminal's other end is closed: the command has ended.
                return

    def status(self) -> int | None:
        self.look()
        return self._process.poll()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def test_does_a_watch_follow_a_pool_to_its_end() -> None:
    name = f"watched-{os.getpid()}"
    with pyswap.Pool("8 MiB", "64 MiB", page_size=4096, name=name) as pool:
        terminal = Terminal("stat", "--watch", name)
        try:
            until(lambda: terminal.look() or "a second" in terminal.shown, "the first look")
            pool.ones(4 << 20, np.uint8)
            # The change of the number of faults.
            until(lambda: terminal.look() or "+" in terminal.shown, "the next look")
            pool.close()
            until(lambda: terminal.status() is not None, "the watch ends with the pool")
            assert terminal.status() == 0
        finally:
            terminal.end()

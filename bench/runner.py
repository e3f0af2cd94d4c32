"""`Runner`: starts measured runs, one process tree at a time, and keeps what they tell."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cgroup import Cgroup
from .limits import LIMITS
from .peers import PEERS, Peer
from .plan import Plan
from .rows import Failures, Results, Run
from .undo import undone

__all__ = ["RunFailedError", "Runner"]

_log = logging.getLogger("pyswap.bench")
_ROOT = Path(__file__).resolve().parent.parent
_RUN_TIMEOUT_S = 1800.0


class RunFailedError(Exception):
    """A measured run ended without a result, or with a wrong one."""


class RunKilledError(RunFailedError):
    """The kernel killed a measured run at its control group's limit."""


class Runner:
    """Interleaves the peers of a workload, round after round.

    Parameters
    ----------
    plan : Plan
        What all runs have in common; workload and peer are filled in.
    tell : callable
        Told in a few words what is run next.
    """

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.results: Results = {}
        self.settings: dict[str, dict[str, object]] = {}
        self.left_out: dict[str, str] = {}
        self.failures: Failures = {}
        self._tell = tell
        self._script_bytes: dict[tuple[str, str], int] = {}

    def measure(self, workload: str, peers: list[str], rounds: int) -> None:
        """Run a workload on all peers, A B A B, a fresh process each time.

        A run that fails is noted in `failures`, and the next one follows.
        """
        able = [peer for peer in peers if self._can_run(peer)]
        for number in range(1, rounds + 1):
            for peer in able:
                self._tell(f"{workload}: {peer}, round {number} of {rounds}")
                plan = self.plan.for_run(workload, peer)
                self._attempt(plan, PEERS[peer].attempts if peer in PEERS else 1)

    def _attempt(self, plan: Plan, attempts: int) -> None:
        """Run a plan until it is not killed; keep what it told, or why it failed."""
        while attempts > 0:
            attempts -= 1
            try:
                is_limit = plan.peer in LIMITS
                told = self._spawn(plan) if is_limit else self._run(PEERS[plan.peer], plan)
                _check_moved(plan, told)
            except RunFailedError as error:
                _log.warning("%s", error)
                failed = self.failures.setdefault(plan.workload, {})
                failed.setdefault(plan.peer, []).append(str(error))
                if not isinstance(error, RunKilledError):
                    return
            else:
                self.results.setdefault(plan.workload, {}).setdefault(plan.peer, []).append(told)
                return

    def _can_run(self, peer: str) -> bool:
        """Ask the peer, once; why it cannot is noted, and said in the end."""
        if peer in self.left_out:
            return False
        reason: str | None = None
        if peer in LIMITS:
            needs_native = peer != "memory-copy"
            reason = "its helpers were not built" if needs_native and not self.plan.native else None
        else:
            reason = PEERS[peer].missing()
            if reason is None and PEERS[peer].limits_memory:
                reason = _cgroup_refusal()
        if reason:
            self.left_out[peer] = reason
        return reason is None

    def _run(self, peer: Peer, plan: Plan) -> Run:
        """Run a plan with all that its peer needs, and take that away again."""
        group: Cgroup | None = None
        with contextlib.ExitStack() as stack:
            settings: dict[str, object] = dict(peer.environment)
            if peer.limits_memory:
                script_bytes = self._measure_script(peer, plan)
                limit_bytes = plan.budget_bytes + script_bytes
                group = stack.enter_context(Cgroup.made(limit_bytes))
                plan = dataclasses.replace(plan, cgroup=str(group.folder))
                settings |= {"script_bytes": script_bytes, "cgroup": group.settings()}
            try:
                settings |= stack.enter_context(peer.arranged(plan))
            except OSError as error:
                raise RunFailedError(f"{peer.title} cannot be set up: {error}") from error
            self.settings[f"{plan.workload}: {peer.name}"] = settings
            try:
                return self._spawn(plan, peer.environment)
            except RunFailedError as error:
                kills = group.kills() if group else 0
                if kills == 0:
                    raise
                raise RunKilledError(f"{error}: the kernel killed {kills} at the limit") from None

    def _measure_script(self, peer: Peer, plan: Plan) -> int:
        """Peak resident bytes of the same run on an empty array, measured once."""
        key = (plan.workload, peer.name)
        if key not in self._script_bytes:
            told = self._spawn(plan.on_empty_array(), peer.environment)
            self._script_bytes[key] = int(told["peak_bytes"])
        return self._script_bytes[key]

    def _spawn(self, plan: Plan, environment: dict[str, str] | None = None) -> Run:
        """Start a run in a session of its own, wait for it, and read what it printed."""
        told = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYSWAP_DIR": plan.folder,
            **(environment or {}),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.child", plan.to_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=told,
            start_new_session=True,
        )

        def end() -> None:
            # What it forked is in its group, and may outlive a run that failed.
            if child.returncode != 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()

        what = f"{plan.workload} on {plan.peer}"
        with undone(end), child:
            try:
                out, errors = child.communicate(timeout=_RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                end()
                raise RunFailedError(f"{what} took over {_RUN_TIMEOUT_S} s") from None
            except BaseException:
                end()
                raise
        if errors.strip():
            _log.warning("%s said:\n%s", what, errors.strip())
        if child.returncode != 0:
            raise RunFailedError(f"{what} ended with {child.returncode}")
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result


def _check_moved(plan: Plan, told: Run) -> None:
    """Refuse the numbers of a run whose pages never left memory."""
    if not told.get("moved", True):
        raise RunFailedError(f"{plan.workload} on {plan.peer}: no page was swapped out and in")


def _cgroup_refusal() -> str | None:
    """Why this user may make no memory control group; None where that works."""
    try:
        with Cgroup.made(1 << 30):
            return None
    except OSError as error:
        return f"no memory control group: {error}"

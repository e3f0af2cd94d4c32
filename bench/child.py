"""One measured run, in a process of its own: `python -m bench.child PLAN` prints a JSON object."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cgroup
from .clock import cpu_seconds
from .plan import Plan

if TYPE_CHECKING:
    from .peers import Peer
    from .share import Array, Share
    from .workloads import Workload


def _own_cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak_bytes() -> int:
    """Return the most that was resident; ru_maxrss may be that of who started this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def _own_bytes() -> int:
    """What this process has that no other one shares."""
    import psutil

    return int(psutil.Process().memory_full_info().uss)


def _serve(workload: Workload, a: Array, share: Share, barrier: Any, pipe: Any) -> None:
    """Do one forked process's share and send what became of it."""
    if workload.warm_up is not None:
        workload.warm_up(a, share)()
    timed = workload.work(a, share)
    barrier.wait()
    share.begin()
    timed()
    pipe.send((share.thinned(), _own_bytes()))


def _received(pipes: list[Any]) -> list[Any]:
    """What the processes send, in any order, until all have or one ends without."""
    sent, pending = [], list(pipes)
    while pending:
        for pipe in multiprocessing.connection.wait(pending):
            try:
                sent.append(pipe.recv())  # type: ignore[union-attr,call-arg]
            except EOFError:
                return sent
            pending.remove(pipe)
    return sent


def _run_forked(workload: Workload, a: Array, plan: Plan) -> tuple[list[Any], int]:
    """Run the timed part in forked processes, started together; their points and own bytes."""
    from .share import Share

    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workload.processes)
    workers, pipes, sent = [], [], []
    for rank in range(workload.processes):
        receiver, sender = context.Pipe(duplex=False)
        share = Share(plan, rank, workload.processes)
        worker = context.Process(target=_serve, args=(workload, a, share, barrier, sender))
        worker.start()
        sender.close()
        workers.append(worker)
        pipes.append(receiver)
    try:
        sent = _received(pipes)
    finally:
        # Only after a failure is one still at work, or waiting for who failed.
        for worker in workers:
            if len(sent) < len(workers):
                worker.kill()
            worker.join()
    if len(sent) < len(workers):
        raise RuntimeError("a forked process failed or was killed")
    return [points for points, _ in sent], sum(own for _, own in sent)


def _run_here(workload: Workload, a: Array, plan: Plan) -> list[Any]:
    from .share import Share

    share = Share(plan, 0, 1)
    if workload.warm_up is not None:
        workload.warm_up(a, share)()
    timed = workload.work(a, share)
    share.begin()
    timed()
    return [share.thinned()]


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def _run_workload(peer: Peer, plan: Plan) -> dict[str, Any]:
    """Make the array, prepare it, and run the timed part."""
    from .share import Share
    from .workloads import WORKLOADS

    workload = WORKLOADS[plan.workload]
    shape, dtype = workload.shape(plan)
    others_bytes = 0
    with peer.opened(plan) as make:
        before = peer.counters()
        a = make(shape, dtype, workload.kind)
        if workload.prepare is not None:
            workload.prepare(a, Share(plan, 0, 1))()
        middle = peer.counters()
        swapper = peer.swapper_pid()
        swapper_s = cpu_seconds(swapper) if swapper else 0.0
        own_s = _own_cpu_seconds()
        if workload.processes == 1:
            points = _run_here(workload, a, plan)
        else:
            points, others_bytes = _run_forked(workload, a, plan)
        own_s = _own_cpu_seconds() - own_s
        swapper_s = cpu_seconds(swapper) - swapper_s if swapper else 0.0
        grown = _grown(middle, peer.counters())
        if workload.verify is not None:
            workload.verify(a, Share(plan, 0, 1))
        after = peer.counters()
        del a
    begin = min(curve[0][0] for curve in points)
    elapsed_s = max(curve[-1][0] for curve in points) - begin
    units = sum(curve[-1][1] for curve in points)
    return {
        "elapsed_s": elapsed_s,
        "units": units,
        "rate": units / elapsed_s,
        "points": [[(t - begin, done) for t, done in curve] for curve in points],
        "counters": grown,
        "totals": after,
        "moved": peer.moved(_grown(before, after)),
        "cpu_s": {"workers": own_s, "swapper": swapper_s},
        "peak_bytes": _peak_bytes() + others_bytes,
    }


def _run_kernels(peer: Peer, plan: Plan) -> dict[str, Any]:
    from .kernels import measure

    with peer.opened(plan) as make:
        return {"kernels": measure(lambda shape, dtype: make((shape,), dtype, "alone"), plan)}


def _run_minor_fault(peer: Peer, plan: Plan) -> dict[str, Any]:
    from .minor_fault import measure

    return {"nanoseconds": measure(peer, plan)}


def _run_forks(peer: Peer, plan: Plan) -> dict[str, Any]:
    from .forks import measure

    return measure(peer, plan, writing=plan.workload == "forks-write")


def _run_scale(peer: Peer, plan: Plan) -> dict[str, Any]:
    from .scale import measure

    return measure(plan)


_SPECIAL = {
    "kernels": _run_kernels,
    "minor-fault": _run_minor_fault,
    "forks-read": _run_forks,
    "forks-write": _run_forks,
    "scale": _run_scale,
}
"""What is no work on one array larger than memory."""


def main() -> None:
    """Run the plan on the command line and print what became of it."""
    plan = Plan.from_json(sys.argv[1])
    if plan.cgroup:
        cgroup.join(plan.cgroup)
    begin = time.monotonic()
    from .limits import LIMITS
    from .peers import PEERS

    if plan.peer in LIMITS:
        limit = LIMITS[plan.peer]
        key = "nanoseconds" if limit.unit == "nanoseconds" else "rate"
        told: dict[str, Any] = {key: limit.measure(plan)}
    else:
        told = _SPECIAL.get(plan.workload, _run_workload)(PEERS[plan.peer], plan)
    told["whole_s"] = time.monotonic() - begin
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()

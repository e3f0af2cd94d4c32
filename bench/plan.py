"""`Plan`: all that one measured run is told, in a form that crosses a process boundary."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

__all__ = ["ROW_BYTES", "Plan"]

ROW_BYTES = 4096
"""What one random access reads or writes: a row of an array of 512 words."""

_EMPTY_BYTES = 1 << 20


@dataclass(frozen=True)
class Plan:
    """One run of one workload on one peer.

    Attributes
    ----------
    workload, peer : str
        Their names.
    budget_bytes, array_bytes, swap_bytes : int
        What may be in memory; the array; the room for swap, the same on every side.
    operations : int
        Random accesses in the timed part, of all processes together; as many warm up.
    repeats : int
        How often a NumPy kernel is timed within a run.
    most_seconds : float
        When random accesses and the column-major pass stop, at the end of a batch or column; what
        was done until then is what counts.
    seed : int
        What every generator starts from.
    folder : str
        Where swap files and memory-mapped files are made.
    area : str
        A file in `folder`, written once in full: the kernel's swap, and what the device is
        measured with.
    native : str
        The compiled helpers, or "" where they could not be built.
    graph : str
        A file with the graph for an array of this size, or "" to make it in the run.
    cgroup : str
        The control group that the run joins first, or "" for none.
    """

    workload: str
    peer: str
    budget_bytes: int
    array_bytes: int
    swap_bytes: int
    operations: int
    repeats: int
    most_seconds: float
    seed: int
    folder: str
    area: str
    native: str
    graph: str = ""
    cgroup: str = ""

    def to_json(self) -> str:
        """Return what `from_json` takes."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Make the plan that `to_json` described."""
        return cls(**json.loads(text))

    def for_run(self, workload: str, peer: str) -> Plan:
        """Return the plan of one run; a fork's arrays are resident, which takes a larger budget."""
        is_resident = workload.startswith("forks-")
        budget_bytes = self.array_bytes * 5 // 4 if is_resident else self.budget_bytes
        return dataclasses.replace(self, workload=workload, peer=peer, budget_bytes=budget_bytes)

    def on_empty_array(self) -> Plan:
        """Return the same work on next to nothing, which shows what the script itself takes."""
        return dataclasses.replace(self, array_bytes=_EMPTY_BYTES, graph="")

"""Check the model with spin: the protocol holds in every state, and each mutant is found out.

    python run.py [--quick | --short] [NAME ...]

--quick searches the quick configurations alone, --short all but the long ones, and the mutants; or
what is named is searched.  Those that have too many states are sampled for a while, in an order
that differs from run to run.

Prints for each search the states, the depth, the seconds and the verdict; exits with 1 where one
is wrong.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
MEMORY_MB = 6000
DEPTH = 20_000_000
SEARCH_S = 1800
"""How long one search may take, in seconds."""
SAMPLE_MINUTES = 1
"""How long a configuration is sampled."""
COMPLETE, NOT_TO_THE_END = "complete", "not searched to the end"

WRITERS: list[str] = []
PRIVATE = ["-DFORKS=1", "-DZEROS=0", "-DEVICTS=0"]
TWINS = [*PRIVATE, "-DTWINS=1", "-DFRAMES=2"]
COPIES = [*PRIVATE, "-DFRAMES=3", "-DPAGES=3"]
FORK = [*COPIES, "-DBOTH_BORN=0", "-DMAY_BEAR=1", "-DSNAPSHOT=1"]
ONE_FORK = [*PRIVATE, "-DBOTH_BORN=0", "-DMAY_BEAR=1", "-DFRAMES=2"]
EVICTED = ["-DEVICTS=1", "-DFRAMES=2", "-DWRITE_AHEAD=0"]
SWAPPER_DIES = ["-DSWAPPER_DIES=1", "-DBOTH_BORN=0"]
WORKER_DIES = ["-DWORKER_DIES=1"]
BOTH_DIE = ["-DSWAPPER_DIES=1", *WORKER_DIES]
FINE = "-DFINE=1"

PROTOCOL: dict[str, list[str]] = {
    "two writers, eviction": WRITERS,
    "copies by both sharers": COPIES,
    "faults of two threads at a copy": TWINS,
    "fork while pages are copied": FORK,
    "copies and eviction": [*PRIVATE, *EVICTED],
    "fork, copies and eviction": [*ONE_FORK, *EVICTED],
    "eviction, a worker dies": WORKER_DIES,
    "copies, a worker dies": [*PRIVATE, "-DFRAMES=2", *WORKER_DIES],
    "eviction, the swapper dies": SWAPPER_DIES,
}
"""What is searched to the end, and with which switches."""
QUICK = [
    "two writers, eviction",
    "faults of two threads at a copy",
    "copies, a worker dies",
    "eviction, the swapper dies",
]
LONG = ["copies and eviction", "fork, copies and eviction", "eviction, a worker dies"]
"""Two minutes and more, and up to 5 GB of memory."""

SAMPLED: dict[str, list[str]] = {
    "two writers, the swapper dies": ["-DSWAPPER_DIES=1"],
    "copies, the swapper dies": [*COPIES, "-DSWAPPER_DIES=1"],
    "copies and eviction, a worker dies": [*PRIVATE, *EVICTED, *WORKER_DIES],
    "copies and eviction, both die": [*PRIVATE, *EVICTED, *BOTH_DIE],
    "fork, copies, eviction, both die": [*ONE_FORK, *EVICTED, *BOTH_DIE],
}
"""What has more states than memory holds."""

MUTANTS: dict[str, list[str]] = {
    "NO_PROTECT": WRITERS,
    "PUNCH_LATE": WRITERS,
    "NO_RECHECK": WRITERS,
    "CLEAN_UNPROTECT": WRITERS,
    "FORGET_MAPPER": WRITERS,
    "NO_REDIRTIED": WRITERS,
    "BLIND_INSTALL": WRITERS,
    "NO_WAKE": WRITERS,
    "NO_GENERATION": WRITERS,
    "KEEP_SLOT": WRITERS,
    "DIRTY_LATE": [FINE],
    "FREE_FIRST": [FINE],
    "CLEAN_FIRST": [FINE],
    "CLEAN_BEFORE_SLOT": [FINE],
    "NO_MAP_CHECK": TWINS,
    "DROP_EARLY": COPIES,
    "COPY_LATE": [*COPIES, FINE],
    "NO_PIN": [*COPIES, "-DEVICTS=1", "-DFRAMES=2"],
    "HOLD_SPARE": [*PRIVATE, *EVICTED],
    "SHARE_PINNED": FORK,
    "FORK_WRITABLE": ONE_FORK,
    "NO_GATE": [*ONE_FORK, FINE],
    "MAPPER_LATE": SWAPPER_DIES,
    "REPAIR_NO_PUNCH": SWAPPER_DIES,
    "REPAIR_NO_SLOTS": SWAPPER_DIES,
    "SWEEP_NO_PUNCH": COPIES,
    "COPIES_NOT_ENDED": [*PRIVATE, "-DFRAMES=2", *WORKER_DIES],
    "NO_REMINDER": [*COPIES, "-DSWAPPER_DIES=1"],
    "NO_WAKE_ALL": SWAPPER_DIES,
    "REPAIR_FOREIGN_SLOT": SWAPPER_DIES,
    "REPAIR_BLIND": [*SWAPPER_DIES, "-DFRAMES=2"],
}
"""A guard that is taken out, and the switches of the search that has to meet what follows."""


@dataclass
class Search:
    """What spin said of one search."""

    verdict: str
    states: int = 0
    depth: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.states:>10} states {self.depth:>8} deep {self.seconds:>6.1f} s  {self.verdict}"
        )


def command(name: str, arguments: list[str], folder: Path) -> str:
    """Run a command in a folder; one that takes too long is ended, and has no verdict."""
    with subprocess.Popen(
        [name, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            return process.communicate(timeout=SEARCH_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return f"{NOT_TO_THE_END} in {SEARCH_S} s"


def laws() -> dict[str, str]:
    """The invariants by number, as the model names them."""
    text = (HERE / "pyswap.pml").read_text()
    return dict(re.findall(r"#define L_\w+ +(\d+) +/\* (.*) \*/", text))


def broken(message: str) -> str:
    """Name what pan found: the law's number begins the assertion's text."""
    law = re.match(r"assertion violated \(+(\d+)==0\)", message)
    return laws()[law[1]] if law else message


def search(switches: list[str], seed: int | None = None) -> Search:
    """Search all states, or up to the first error; with a seed, at random for a while."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for source in HERE.glob("*.pml"):
            shutil.copy(source, folder)
        # The last of two switches of one name counts.
        named = {switch.split("=")[0]: switch for switch in switches}
        said = command("spin", [*named.values(), "-a", "pyswap.pml"], folder)
        # There is rendezvous in an unless, so partial orders are not reduced; the model takes
        # steps together that nobody sees apart.
        options = ["-O1", "-w", "-DSAFETY", "-DNOREDUCE", "-DVECTORSZ=1024"]
        searched = ["-n", "-w26", f"-m{DEPTH}"]
        if seed is None:
            options += ["-DCOLLAPSE", f"-DMEMLIM={MEMORY_MB}"]
        else:
            # A state is three bits of a table, so that none is searched twice, and few are missed.
            options += ["-DBITSTATE", "-DP_RAND", "-DT_RAND"]
            searched = ["-n", "-w32", "-k3", f"-Q{SAMPLE_MINUTES}", f"-RS{seed}", f"-m{DEPTH // 5}"]
        said += command("cc", [*options, "-o", "pan", "pan.c"], folder)
        said += command(str(folder / "pan"), searched, folder)
    states = re.search(r"(\S+) states, stored", said)
    depth = re.search(r"depth reached (\d+)", said)
    seconds = re.search(r"elapsed time (\S+)", said)
    error = re.search(r"pan:1: (.*?)(?: \(at depth|\n)", said)
    if states is None or depth is None or seconds is None:
        return Search("no verdict: " + said.strip()[-200:])
    verdict = COMPLETE
    if error:
        verdict = broken(error[1])
    elif "not completed" in said or "too small" in said or "errors: 0" not in said:
        verdict = NOT_TO_THE_END
    return Search(verdict, int(float(states[1])), int(depth[1]), float(seconds[1]))


def main(arguments: list[str]) -> int:
    """Check everything, the short configurations, or what is named."""
    if shutil.which("spin") is None:
        print("spin is not there (on Debian and Ubuntu: apt install spin)")
        return 1
    names = [a for a in arguments if not a.startswith("--")]
    quick = "--quick" in arguments
    left_out = LONG if "--short" in arguments else []
    chosen = QUICK if quick else [name for name in PROTOCOL if name not in left_out]
    wrong = found = mutants = 0
    for name, switches in PROTOCOL.items():
        if name in (names or chosen):
            result = search(switches)
            wrong += result.verdict != COMPLETE
            print(f"{name:34} {result}", flush=True)
    seed = time.time_ns() % 1_000_000
    for name, switches in SAMPLED.items():
        if name in names or not (names or quick):
            result = search(switches, seed)
            wrong += result.verdict not in (COMPLETE, NOT_TO_THE_END)
            print(f"{name:34} {result}: seed {seed}", flush=True)
    for name, switches in MUTANTS.items():
        if name in names or not (names or quick):
            result = search([*switches, f"-DM_{name}"])
            mutants += 1
            survives = result.verdict in (COMPLETE, NOT_TO_THE_END)
            found += not survives and not result.verdict.startswith("no verdict")
            print(f"mutant {name:27} {result}{', and SURVIVES' if survives else ''}", flush=True)
    if mutants:
        print(f"{found} of {mutants} mutants found")
    return int(wrong > 0 or found < mutants)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

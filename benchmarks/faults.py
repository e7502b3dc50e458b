"""Faults that `benchmarks.chaos` does to a job that runs, and the moments at which it does them.

A fault **hits** if its target was there and the run was not complete when it came. Targets are found in /proc, among the
processes that descend from the harness, so other people's Ray on the same machine is never touched.

Left out: a machine that loses power between a write and the disk, and memory that runs out.
"""

import contextlib
import ctypes
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TARGETS = {
    "replica": "ray::MapWorker(MapBatches(Replica))",
    "decoder": "ray::MapBatches(decode_chunk)",
    "writer": "ray::MapWorker(MapBatches(Replica))",
    "witness": "ray::Suspects",
    "raylet": "/raylet/raylet",
    "node": "/raylet/raylet",
    "gcs": "/gcs_server",
}
"""What the command line of the process that a kind of fault kills contains. `node` is the second of two raylets, with its
workers."""

SURVIVED = ("replica", "decoder", "writer", "witness")
"""Kinds that a job on Ray survives, so that several fit into one run."""

KINDS = {
    "ray": (*SURVIVED, "raylet", "gcs", "driver", "group", "machine", "sigint", "sigterm", "disk", "refused"),
    "local": ("driver", "machine", "sigint", "sigterm", "disk", "refused"),
    "nodes": ("node",),
}
"""By where the job runs. group: SIGKILL of the driver's process group. machine: SIGKILL of every process at once. disk: the
disk of the run fills. refused: every write below the run is refused. The others are a SIGKILL, or the signal of their name."""

TABLES = ("images", "activations", "maps")

BEGIN_STEPS = (
    "open plan.parquet 1",
    "rename plan.parquet 1",
    "renamed plan.parquet 1",
    "rename run.json 1",
    "renamed run.json 1",
)

FINISH_STEPS = (
    *(f"{stage} manifest.parquet 1" for stage in ("open", "rename", "renamed")),
    *(f"{stage} README.md 1" for stage in ("rename", "renamed")),
    *(f"{stage} run.json {time}" for time in (2, 3) for stage in ("rename", "renamed")),
    *(f"{stage} preview.png 1" for stage in ("open", "rename", "renamed")),
)
"""Steps of a first session between its last commit and its end, in the words of `benchmarks.watched`."""


class Moment(NamedTuple):
    """When a fault comes: at a step, or so many seconds after so many commits are there."""

    name: str
    """`start`, `begin`, `between`, `step`, `last` or `finish`."""
    commits: int = 0
    """-1: not even run.json has to be there. Of a step, about how many there will be."""
    delay: float = 0.0
    step: str = ""


class Fault(NamedTuple):
    """What happens, and when."""

    where: str
    """`ray` or `local`."""
    kind: str
    moment: Moment


def moment(dice: random.Random, where: str, kind: str, n_chunks: int, part: tuple[float, float]) -> Moment:
    """A random moment of a job's life. Kinds that a job survives come within `part`, a range of the share of chunks done."""
    if kind in SURVIVED:
        first, last = (min(int(share * n_chunks), n_chunks - 1) for share in part)
        if kind == "writer":
            return at_commit(dice, dice.randrange(first, max(last, first + 1)))
        if kind == "decoder":
            return Moment("begin", 0, dice.uniform(0, 1))  # few images are all decoded soon
        name = "begin" if first == 0 else "between" if last < n_chunks - 1 else "last"
        return Moment(name, dice.randrange(first, max(last, first + 1)), dice.uniform(0, 0.1))
    start, begin = (3.0, 0.2) if where == "local" else (6.0, 3.0)
    name = dice.choice(("start", "begin", "between", "between", "step", "step", "last", "finish"))
    if kind in ("node", "raylet", "gcs") and name == "start":
        name = "between"  # these processes are not there yet
    match name:
        case "start" if dice.random() < 0.5:
            return Moment(name, step=dice.choice(BEGIN_STEPS))
        case "start":
            return Moment(name, -1, dice.uniform(0.1, start))
        case "begin":
            return Moment(name, 0, dice.uniform(0, begin))
        case "between":
            return Moment(name, dice.randrange(1, n_chunks - 1), dice.uniform(0, 0.1))
        case "last":
            return Moment(name, n_chunks - 1, dice.uniform(0, 0.05))
        case "finish":
            return Moment(name, step=dice.choice(FINISH_STEPS))
    return at_commit(dice, dice.randrange(n_chunks))


def at_commit(dice: random.Random, chunk: int) -> Moment:
    """A step of the commit of a chunk."""
    files = [f"{table}/chunk-{chunk:08d}.parquet" for table in TABLES] + [f"commits/chunk-{chunk:08d}.json"]
    return Moment("step", chunk, step=f"{dice.choice(('open', 'rename', 'renamed'))} {dice.choice(files)} 1")


# ---- Processes.


def adopt() -> None:
    """Let processes that lose their parent become children of this one, so that none of a job's gets out of sight."""
    set_child_subreaper = 36  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1)


def family(root: int) -> dict[int, str]:
    """All living processes below `root` with their command lines. Ray's workers write there what they are at."""
    parents, lines = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    found, layer = list[int](), [root]
    while layer:
        layer = [child for child, parent in parents.items() if parent in layer]
        found += layer
    for pid in found:
        with contextlib.suppress(OSError):
            lines[pid] = (
                (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
    return lines


def bury(but: int) -> None:
    """Take notice of the end of adopted processes, so that they do not stay zombies; not of the process `but`."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state == "Z" and int(parent) == os.getpid() and int(entry.name) != but:
                os.waitpid(int(entry.name), os.WNOHANG)


# ---- The fault.


class Struck(NamedTuple):
    """A fault that came."""

    kind: str
    moment: str
    hit: bool
    at: int
    """Nanoseconds since 1970, just after it."""
    committed: list[int]
    """The chunks that were committed just before it."""


class Place(NamedTuple):
    """What a fault needs to know of the job that it comes to."""

    job: subprocess.Popen[bytes]
    run: Path
    meet: Path
    """The folder of `benchmarks.watched`."""

    def commits(self) -> int:
        """How many chunks are committed, -1 if the run has not begun."""
        if not (self.run / "run.json").exists():
            return -1
        return len(self.committed())

    def committed(self) -> list[int]:
        """The chunks that are."""
        return [int(path.stem.removeprefix("chunk-")) for path in (self.run / "commits").glob("*.json")]

    def waiting(self) -> int | None:
        """The process that waits at the step that was asked for."""
        return next((int(path.name.removeprefix("waiting-")) for path in self.meet.glob("waiting-*")), None)


def inject(fault: Fault, place: Place, seconds: float) -> Struck:
    """Wait for the fault's moment, for so many seconds at most, and let the fault come."""
    for path in (*place.meet.glob("waiting-*"), *place.meet.glob("wait"), *place.meet.glob("go")):
        path.unlink()
    if fault.moment.step:
        (place.meet / "asked").write_text(fault.moment.step)
        (place.meet / "asked").rename(place.meet / "wait")
    for _ in until(place.job, seconds):
        if place.waiting() is not None if fault.moment.step else place.commits() >= fault.moment.commits:
            break
    time.sleep(fault.moment.delay)
    name, committed = fault.moment.step or fault.moment.name, place.committed()
    is_reached = place.job.poll() is None and (not fault.moment.step or place.waiting() is not None)
    hit = is_reached and strike(fault, place)
    return Struck(fault.kind, name, hit, time.time_ns(), committed)


def strike(fault: Fault, place: Place) -> bool:
    """Let the fault come now; whether there was something that it could hit."""
    if fault.kind in TARGETS:
        return kill_target(fault, place)
    if place.job.poll() is not None:
        return False
    match fault.kind:
        case "driver":
            place.job.kill()
        case "group":
            os.killpg(place.job.pid, signal.SIGKILL)
        case "machine":
            for pid in family(os.getpid()):
                kill(pid)
        case "sigint":
            release(place)
            os.killpg(place.job.pid, signal.SIGINT)  # as from a terminal
        case "sigterm":
            release(place)
            place.job.terminate()
        case "refused":
            (place.meet / "refuse").touch()
            release(place)
        case "disk":
            fill(place.run.parent)
            release(place)
        case other:
            raise ValueError(f"{other}: no such fault")
    return True


def fill(disk: Path) -> None:
    """A file that takes what is left of a disk, while the job writes there too."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 16))


def kill_target(fault: Fault, place: Place) -> bool:
    """SIGKILL the process that the kind is named for, as soon as there is one; a writer that waits at a step is the one."""
    if fault.kind == "writer" and (pid := place.waiting()) is not None:
        return kill(pid)
    for _ in until(place.job, 30):  # a replica takes seconds to come, or to come back
        found = [
            pid for pid, line in family(os.getpid()).items() if TARGETS[fault.kind] in line and is_meant(fault, line)
        ]
        if found:
            others = family(found[-1]) if fault.kind == "node" else {}  # a machine takes its workers along
            killed = [kill(pid) for pid in (found[-1], *others)]
            release(place)
            return killed[0]
    return False


def is_meant(fault: Fault, line: str) -> bool:
    """Of two raylets, the one that is not the head's."""
    return fault.kind != "node" or "--head" not in line.split()


def kill(pid: int) -> bool:
    """SIGKILL; whether the process was still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def release(place: Place) -> None:
    """Let a process that waits at a step go on: the fault has come, and it is not this process that dies of it."""
    (place.meet / "go").touch()


def until(job: "subprocess.Popen[bytes]", seconds: float) -> Iterator[None]:
    """Yield again and again while the job is there, for so many seconds."""
    deadline = time.monotonic() + seconds
    while job.poll() is None and time.monotonic() < deadline:
        yield
        time.sleep(0.005)  # a look at /proc takes as long


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of a few megabytes at `folder`; `PermissionError` where this user may mount none."""
    import pytest

    from tests.helpers import disks

    try:
        with disks.mounted(folder) as disk:
            yield disk
    except pytest.skip.Exception as refused:
        raise PermissionError(str(refused)) from refused

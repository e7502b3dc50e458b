"""Faults at random moments of a run, and what becomes of its rows: they are compared with those of an undisturbed run.

    reference runs -> rounds (a job, its faults, at most one more run of the same command) -> one table, and yes or NO

A round starts `python -m jobs.explain` as a user would, lets one to three faults come (`benchmarks.faults`), and runs the same
command again if the job did not end well. Then every table is compared with the undisturbed run's, value by value and file by
file. Work counts as **done again** if a replica explains a chunk a second time; if the chunk was committed before the fault,
finished work was done again, which must not happen. What was in flight at a fault (begun, not committed) may be done again.

Moments and kinds follow from the seed and the number of the round. At which chunk a fault really comes is up to the machine.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import faults, watched
from benchmarks.aftermath import again, compared
from benchmarks.faults import Fault, Place, Struck
from saecore.demo import writing
from saecore.runs.record import read_record

ROOT = Path(__file__).parent.parent

END_SECONDS = 240.0
"""A job that goes on for so long after its last fault hangs: it is ended, and its run counts as lost."""

GONE_SECONDS = 60.0
"""Processes of a job that are still there so long after its end are left behind."""

AGENTS, AGENT_SECONDS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent"), 15.0
"""Ray's agents outlive a killed driver or raylet by a minute or two, in which they try to report to a head that is gone. They
know nothing of the run. They are ended after these seconds, and not counted."""

SURVIVORS_FIRST = {"last": 4, "finish": 4, "between": 2, "step": 2}
"""How many faults that a job survives come before one that ends it, by the moment of the latter."""

TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print(cluster.address, flush=True)
sys.stdin.read()
"""
"""A program: two raylets on this machine, until its standard input ends."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all rounds have in common."""

    folder: Path
    """For images, reference runs, and the run of a round."""
    images: int
    chunk_size: int
    seed: int
    kinds: tuple[str, ...]
    """Kinds of faults; empty means all."""
    where: tuple[str, ...]
    """`ray`, `local`, `nodes`."""

    @property
    def n_chunks(self) -> int:
        """Chunks of a run: the images lie in four shards."""
        return 4 * -(-(self.images // 4) // self.chunk_size)

    def command(self, where: str, run: Path) -> list[str]:
        """The job, as a user starts it."""
        how = {"ray": ["--ray"], "local": ["--local"], "nodes": ["--ray", "--replicas", "2"]}[where]
        models = ["--clip", "demo", "--sae", "demo", "--keep-embeddings", "--chunk-size", str(self.chunk_size)]
        images = ["--images", str(self.folder / f"scenes-{self.images}")]
        return [sys.executable, "-m", "jobs.explain", *images, *models, "--out", str(run), *how]


def rounds(settings: Settings) -> Iterator[list[Fault]]:
    """The faults of round 0, 1, 2, ..: every kind that ends a job comes once before any comes twice."""
    dice, number = random.Random(settings.seed), 0
    chosen = {
        where: [kind for kind in faults.KINDS[where] if kind in settings.kinds or not settings.kinds]
        for where in settings.where
    }
    ends = [(where, kind) for where in chosen for kind in chosen[where] if kind not in faults.SURVIVED]
    survived = [kind for kind in chosen.get("ray", []) if kind in faults.SURVIVED]
    if not ends and not survived:
        raise ValueError(f"--kinds {' '.join(settings.kinds)}: no such faults --where {' '.join(settings.where)}")
    while True:
        deck = [*ends, *[("ray", "")] * bool(survived)]
        dice.shuffle(deck)
        for where, kind in deck:
            last = Fault(where, kind, faults.moment(dice, where, kind, settings.n_chunks, (0, 1))) if kind else None
            n_before = SURVIVORS_FIRST.get(last.moment.name, 0) if last else 6
            share = last.moment.commits / settings.n_chunks if last and last.moment.commits else 0.8
            # Several chunks apart, so that no chunk meets two of them; none before a fault that comes early or without Ray.
            n_before = min(n_before, int(share * settings.n_chunks / 2)) if survived and where == "ray" else 0
            n_before *= last is None or last.moment.name in ("last", "finish") or last.moment.commits > 1
            parts = [(part / n_before * share, (part + 1) / n_before * share) for part in range(n_before)]
            before = []
            for part in parts:
                kind, number = survived[number % len(survived)], number + 1
                before.append(Fault(where, kind, faults.moment(dice, where, kind, settings.n_chunks, part)))
            yield [*sorted(before, key=in_order), *([last] if last else [])]


def in_order(fault: Fault) -> tuple[bool, int]:
    """Decoding is over long before the last commit."""
    return fault.kind != "decoder", fault.moment.commits


# ---- One round.


class Scene(NamedTuple):
    """Where a job runs that is disturbed."""

    settings: Settings
    where: str
    run: Path
    meet: Path
    """The folder of `benchmarks.watched`."""
    address: str = ""
    """Of a Ray that was there before the job."""
    cluster: int = 0
    """The process that started it."""


def play(settings: Settings, planned: list[Fault]) -> dict[str, Any]:
    """One round: a job, its faults, the same command again, the comparison; a line of the log."""
    where = planned[0].where
    with tempfile.TemporaryDirectory(dir=settings.folder) as work, contextlib.ExitStack() as stack:
        meet = Path(work) / "meet"
        meet.mkdir()
        base = Path(work) / "disk"
        if any(fault.kind == "disk" for fault in planned):
            stack.enter_context(faults.small_disk(base))
        base.mkdir(exist_ok=True)
        scene, told = Scene(settings, where, base / "run", meet), list[Struck]()
        if where == "nodes":
            scene = stack.enter_context(two_nodes(scene))
        (meet / "explained").touch()
        sessions = [session(scene, planned, told)]
        for path in (base / "filler", meet / "refuse"):
            path.unlink(missing_ok=True)
        if sessions[0]["code"] != 0:
            sessions.append(session(scene, [], told))
        undisturbed = reference(settings, where)
        found = compared(scene.run, undisturbed) | again(undisturbed, meet, told)
    return {"where": where, "faults": [each._asdict() for each in told], "sessions": sessions, **found}


def session(scene: Scene, planned: list[Fault], told: list[Struck]) -> dict[str, Any]:
    """The command once, with its faults, which are added to `told`; its exit code, last words and seconds to end."""
    before = set(faults.family(os.getpid()))
    with (scene.meet / "said").open("wb") as said:
        job = subprocess.Popen(
            scene.settings.command(scene.where, scene.run),
            cwd=ROOT,
            env=environment(scene),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        place, hangs = Place(job, scene.run, scene.meet), True
        try:
            told += [faults.inject(fault, place, END_SECONDS) for fault in planned]
            since = told[-1].at if planned else time.time_ns()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(END_SECONDS)
                hangs = False
            seconds = (time.time_ns() - since) / 1e9
        finally:
            left, gone = after_end(job, before, scene.cluster, at_once=hangs)
    if planned and told[-1].hit and job.returncode != 0:
        # A job that is asked to end goes on for a while: what was in flight, and what was finished, is known at its end.
        told[-1] = told[-1]._replace(at=time.time_ns(), committed=place.committed())
    words = (scene.meet / "said").read_text(errors="replace").strip().splitlines()
    return {
        "code": None if hangs else job.returncode,
        "seconds": round(seconds, 2),
        "gone_seconds": round(gone, 2),
        "left": left,
        "said": words[-1][:300] if words else "",
    }


def after_end(job: "subprocess.Popen[bytes]", before: set[int], cluster: int, at_once: bool) -> tuple[list[str], float]:
    """Wait until no process of the job is there; those that are left behind, which are ended, and the seconds that it took.

    A cluster that was there before the job keeps its workers.
    """
    ended = time.monotonic()
    while True:
        faults.bury(job.pid)
        others = before | (faults.family(cluster).keys() if cluster else set())
        living = {pid: line for pid, line in faults.family(os.getpid()).items() if pid not in others}
        seconds = time.monotonic() - ended
        if not living or at_once or seconds > GONE_SECONDS:
            break
        if seconds > AGENT_SECONDS and all(line.startswith(AGENTS) for line in living.values()):
            for pid in living:
                faults.kill(pid)
        time.sleep(0.05)
    for pid in living:
        faults.kill(pid)
    return [line[:100] for line in living.values()], seconds


@contextlib.contextmanager
def two_nodes(scene: Scene) -> Iterator[Scene]:
    """The same with a Ray of two raylets on this machine, whose workers are watched."""
    before = set(faults.family(os.getpid()))
    with subprocess.Popen(
        [sys.executable, "-c", TWO_NODES],
        cwd=ROOT,
        env=environment(scene),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            yield scene._replace(address=cluster.stdout.readline().decode().strip(), cluster=cluster.pid)
        finally:
            cluster.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                cluster.wait(30)
            after_end(cluster, before, 0, at_once=True)


def environment(scene: Scene) -> dict[str, str]:
    """Of a job whose processes are watched."""
    site = scene.meet / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text("from benchmarks.watched import watch\n\nwatch()\n")
    path = os.pathsep.join(filter(None, (str(site), str(ROOT), os.environ.get("PYTHONPATH", ""))))
    own = {"PYTHONPATH": path, watched.FOLDER: str(scene.meet), watched.RUN: str(scene.run), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own} | ({"RAY_ADDRESS": scene.address} if scene.address else {})


def reference(settings: Settings, where: str) -> Path:
    """The undisturbed run, made when it is first asked for. It runs where the disturbed ones do: bits depend on threads."""
    out = settings.folder / f"undisturbed-{where}-{settings.images}-{settings.chunk_size}"
    if not (out / "run.json").exists() or not read_record(str(out)).is_complete:
        if not (images := settings.folder / f"scenes-{settings.images}").exists():
            writing.write_shards(images, settings.images, 4)
        scene = Scene(settings, where, out, out.with_name(f"{out.name}-meet"))
        scene.meet.mkdir(exist_ok=True)
        with two_nodes(scene) if where == "nodes" else contextlib.nullcontext(scene) as ready:
            done = session(ready, [], [])
        if done["code"] != 0:
            raise RuntimeError(f"the undisturbed run failed: {done}")
    return out


# ---- All rounds.


def measure(settings: Settings, n_faults: int, log: Path | None, seconds: float) -> Iterator[dict[str, Any]]:
    """The rounds until so many faults have hit: those of the log first, then new ones, which are appended to the log.

    No round is begun after `seconds`. The kind `disk` is left out where this user may mount no small disk.
    """
    faults.adopt()
    settings.folder.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log and log.exists() else []
    yield from done
    hits = sum(fault["hit"] for each in done for fault in each["faults"])
    deadline = time.monotonic() + seconds
    for where in settings.where:
        reference(settings, where)
    for planned in itertools.islice(rounds(settings), len(done), None):
        if hits >= n_faults or time.monotonic() > deadline:
            return
        played = play(settings, planned)
        hits += sum(fault["hit"] for fault in played["faults"])
        if log:
            with log.open("a") as file:
                file.write(json.dumps(played) + "\n")
        yield played


HEAD = (
    "",
    "faults",
    "late",
    "rows compared",
    "lost",
    "double",
    "unequal",
    "stray",
    "again",
    "finished again",
    "left",
    "s",
    "codes",
)

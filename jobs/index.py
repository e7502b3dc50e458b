"""A finished run to by_latent/ and the statistics of latents.parquet, so that one latent is one small read.

    python -m jobs.index --run runs/photos
    ray job submit --working-dir . -- python -m jobs.index --run s3://bucket/run --segments 16

    update -> sort new chunks by latent, copy what showing the first images takes (`saecore.query.indexing`) -> index ->
    statistics

The same command again does nothing; for a run that grew it indexes what is new. One machine sorts on disk what does not fit
into memory, and suffices for 10^8 images by the rates in docs/benchmarks.md. With `--segments` above 1, Ray sorts parts side by
side; a look-up then reads one place in each part.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from saecore.query import by_latent, indexing, results, statistics
from saecore.query.by_latent import Segment
from saecore.runs import card, latents
from saecore.runs.files import read_manifest
from saecore.runs.record import Record, read_complete
from saecore.storage import join_uri, resolved
from saecore.upkeep.lock import Lock

from . import cluster, commands, console, locks
from .hints import after_index

Build = Callable[[np.ndarray, indexing.Budget], Segment]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sort a finished run by latent, and count what each latent does."""

    run: str
    """Folder of a complete run of jobs.explain: a local path, s3:// or gs://."""
    top: int = 100
    """Images of each latent whose maps are copied into one place, so that they are shown fast."""
    segments: int = 1
    """Parts in which new chunks are sorted; with more than one, side by side on Ray."""
    memory: float = 2.0
    """GB that DuckDB may hold for one part; the process takes up to 1 GB more, and what does not fit goes to --scratch."""
    threads: int = 0
    """CPU threads for one part; 0 means all of this machine, or 1 on Ray."""
    scratch: str = ""
    """Folder on a fast disk for what does not fit into --memory; by default a temporary folder of the system."""
    rebuild: bool = False
    """Index everything again, from the beginning."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        commands.at_least(self, top=statistics.LISTED_IMAGES, segments=1, threads=0)
        if self.memory < 0.5:
            raise ValueError(f"--memory {self.memory:g}: must be at least 0.5 GB")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: index(sys.argv[1:] if argv is None else list(argv)))


def index(argv: list[str]) -> int:
    """Check everything, index what is new, count, say what came of it."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "index")
        record = read_complete(arguments.run)
        held, update = state(arguments, record)
    if held is not None and not update.groups and statistics.written(arguments.run, held):
        print(f"{arguments.run} is indexed: nothing to do")
        card.write(arguments.run, record)
    else:
        with locks.held("--run", arguments.run, "index") as lock:
            renew(arguments, record, lock)
    commands.propose(after_index(arguments.run, record))
    return 0


def state(arguments: Arguments, record: Record) -> tuple[by_latent.Index | None, indexing.Update]:
    """The index if it is there and whole, and what brings it up to date; ValueError for an index of another run or version."""
    before = None if arguments.rebuild else index_before(arguments, record)
    update = indexing.update_of(read_manifest(arguments.run), before, arguments.top, arguments.segments)
    is_whole = before is not None and not update.groups and update.kept == before.segments
    return before if is_whole else None, update


def renew(arguments: Arguments, record: Record, lock: Lock) -> None:
    """Index what is new, and count."""
    with commands.mistakes():
        held, update = state(
            arguments, record
        )  # again, since another job may have written it before this one held the lock
    held = held or make(arguments, record, update, lock)
    started = time.perf_counter()
    if not statistics.written(arguments.run, held):
        with commands.mistakes():
            commands.check_writable("--run", arguments.run)
        run = results.open(arguments.run)
        lock.check()
        statistics.write(run)
        seconds, where = time.perf_counter() - started, join_uri(arguments.run, latents.NAME)
        print(f"counted       {run.n_latents:,} latents in {seconds:.1f} s: {where}")
    card.write(arguments.run, record)


def index_before(arguments: Arguments, record: Record) -> by_latent.Index | None:
    """The index that is there, None if there is none; ValueError for that of another run, or of another version."""
    try:
        return by_latent.read_index(arguments.run, record.fingerprint)
    except ValueError as error:
        raise ValueError(f"{error} (--rebuild)") from error


def make(arguments: Arguments, record: Record, update: indexing.Update, lock: Lock) -> by_latent.Index:
    """The segments that are not there yet, and the index that names all of them."""
    build = functools.partial(
        indexing.build_segment, resolved(arguments.run), record.fingerprint, record.n_latents, arguments.top
    )
    with commands.mistakes():
        commands.check_writable("--run", arguments.run)
        if arguments.scratch:
            commands.check_writable("--scratch", arguments.scratch)
    started, work = time.perf_counter(), on_ray if arguments.segments > 1 else in_process
    made = work(build, update.groups, arguments)
    held = by_latent.Index(record.fingerprint, arguments.top, [*update.kept, *made])
    lock.check()
    by_latent.write_index(arguments.run, held)
    print(outline(made, held, time.perf_counter() - started), flush=True)
    return held


def in_process(build: Build, groups: list[np.ndarray], arguments: Arguments) -> list[Segment]:
    """One segment after the other."""
    budget = indexing.Budget(arguments.memory, arguments.threads, arguments.scratch)
    return [build(group, budget) for group in groups]


def on_ray(build: Build, groups: list[np.ndarray], arguments: Arguments) -> list[Segment]:
    """Each segment a task of its own."""
    with console.quiet():
        with commands.mistakes():
            connect(arguments)
        import ray

        threads = arguments.threads or 1
        budget = indexing.Budget(arguments.memory, threads, arguments.scratch)
        task = ray.remote(num_cpus=threads, memory=needed(arguments))(lambda group: build(group, budget))
        return ray.get([task.remote(group) for group in groups])


def connect(arguments: Arguments) -> None:
    """Join or start Ray; ValueError if none of its nodes can take a segment: its task would wait for ever."""
    cluster.connect(replicas=1)
    nodes = cluster.nodes()
    if max(node.memory for node in nodes) < needed(arguments):
        raise ValueError(
            f"--memory {arguments.memory:g}: no node of this cluster has {needed(arguments) / 1e9:g} GB for Ray"
        )
    if max(node.cpus for node in nodes) < arguments.threads:
        raise ValueError(f"--threads {arguments.threads}: no node of this cluster has that many CPUs")


def needed(arguments: Arguments) -> int:
    """Bytes that one segment takes, on Ray's books."""
    return int((arguments.memory + 1) * 1e9)


def outline(made: list[Segment], held: by_latent.Index, seconds: float) -> str:
    """What was indexed, as a person reads it."""
    rows = sum(file.rows for segment in made for file in segment.rows)
    size = {
        name: sum(file.bytes for segment in held.segments for file in getattr(segment, name))
        for name in ("rows", "top")
    }
    chunks = sum(last - first + 1 for segment in made for first, last in segment.chunks)
    return (
        f"indexed       {rows:,} rows of {chunks:,} chunks in {seconds:.1f} s, {rows / seconds:,.0f} rows/s\n"
        f"on disk       {by_latent.ROWS} {size['rows'] / 1e6:,.1f} MB, {by_latent.TOP} {size['top'] / 1e6:,.1f} MB, "
        f"in {len(held.segments)} segments"
    )


if __name__ == "__main__":
    sys.exit(main())

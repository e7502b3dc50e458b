"""The flow of a run over images, on Ray Data or in this process.

One row of Ray Data for each chunk of images; a job brings the stage that its replicas hold:

    plan -> decode_chunk (CPU tasks) -> Replica (actors), which also writes -> progress

From the top: the flow; the work from the first pending chunk to the last. Left out: what the steps do
(`saecore.pipeline.steps`), what a stage computes (`saecore.pipeline.stages`), and how a run begins (`jobs.collection`).
"""

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from saecore import numbering
from saecore.images.chunks import count_images
from saecore.pipeline.clock import Clock
from saecore.pipeline.isolation import Suspects
from saecore.pipeline.stages import Decode
from saecore.pipeline.steps import Replica, decode_chunk
from saecore.runs.commits import fit_of
from saecore.runs.fit import Fit
from saecore.runs.record import Record, write_record
from saecore.runs.run import Run
from saecore.upkeep.lock import Lock

from . import cluster, commands, console, events, signals
from .pool import Pool, decode_memory

STOP_SECONDS = 2.0
"""For so long a run that is stopped waits for an image that is being read or decoded."""

MAX_BLOCKS = 10_000
"""Blocks of the pipeline's input: one per chunk up to here, then several chunks each, since Ray's driver tracks every block."""

CALLS = 4
"""Chunks inside one replica: one is computed while up to three are written, since an object store answers slowly. If the
replica or the driver dies, these are computed again."""


# ---- The flow.


class Job(NamedTuple):
    """A checked command, ready to run."""

    run: Run
    decode: Decode
    stage: functools.partial[Any]
    """Makes a replica's `Stage` in the replica's own process."""
    tags: dict[str, str]
    """Go into the metadata of every Parquet file."""
    pool: Pool
    lock: Lock = Lock()
    """Of the run folder, held while the job writes there; by default none."""


def on_ray(job: Job, pending: pa.Table) -> Generator[dict[str, Any], None, None]:
    """The steps as a Ray Data pipeline; yields the rows of `Replica` as they come.

    A replica writes what it computed. Writing was a pool of CPU tasks, and these waited until all was decoded: Ray Data 2.60
    reserves CPUs for the pools in their order, so on two cores nothing was left for the last. Of 128 chunks, all were computed
    before the first was committed, and a kill of the driver would have lost them. Asking for less than a CPU did not help.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray's own would lose it on the way
    witness = cluster.RemoteSuspects()
    per_block = math.ceil(pending.num_rows / MAX_BLOCKS)
    images = int(numbering.lengths(pending).max())
    blocks = [pending.slice(start, per_block) for start in range(0, pending.num_rows, per_block)]
    committed = (
        ray.data.from_arrow(blocks)
        .map_batches(
            decode_chunk,
            fn_args=(job.decode, witness),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            # What a chunk takes, and a demand that differs from the replica's: Ray would fuse the two, and decode there.
            memory=decode_memory(cluster.nodes(), images, job.decode.preprocess.bytes),
        )
        .map_batches(
            Replica,
            fn_constructor_args=(job.stage, witness, job.run, job.tags),
            batch_size=1,
            batch_format="pyarrow",
            # All are asked for at once, also on nodes that are still to come: with two GPU nodes that came one after the other,
            # the second replica had its first chunk 5.7 s after its node came, and 12.4 s in a pool of min_size 1, max_size 2.
            compute=ray.data.ActorPoolStrategy(
                size=job.pool.replicas,
                max_concurrent_calls_per_actor=CALLS,
                max_tasks_in_flight_per_actor=CALLS + 1,
                enable_true_multi_threading=True,  # `Replica` computes one chunk at a time
            ),
            num_cpus=job.pool.cpus_per_replica,
            num_gpus=job.pool.gpus_per_replica,
        )
    )
    yield from committed.iter_rows()


def in_process(job: Job, pending: pa.Table) -> Generator[dict[str, Any], None, None]:
    """The same steps without Ray: a chunk is decoded while the one before it is computed and written."""
    rows = (pending.slice(index, 1) for index in range(pending.num_rows))
    with contextlib.closing(_decoded_ahead(job.decode, rows)) as decoded:
        replica = Replica(job.stage, Suspects(), job.run, job.tags)
        for chunk in decoded:
            yield replica(chunk).to_pylist()[0]


def _decoded_ahead(decode: Decode, rows: Iterator[pa.Table]) -> Generator[pa.Table, None, None]:
    """`decode_chunk` of each row; the next one begins in a thread when a chunk is taken.

    Most of the time the thread waits for storage, or for the process that decodes. On two cores the demo's efficiency was 0.84
    in place of 0.67 (`python -m benchmarks job`, means of 3); without `share_cores` it was 0.68.
    """
    stopped, witness = threading.Event(), Suspects()
    decode = decode.until(stopped)

    def start() -> "_Decoding | None":
        row = next(rows, None)
        return None if row is None else _Decoding(functools.partial(decode_chunk, row, decode, witness))

    ahead = start()
    try:
        while ahead is not None:
            chunk = ahead.result()
            ahead = start()
            yield chunk
    finally:
        stopped.set()
        if ahead is not None:
            ahead.join(STOP_SECONDS)


class _Decoding(threading.Thread):
    """Decodes a chunk. A daemon: storage that hangs does not keep the process from ending."""

    def __init__(self, work: Callable[[], pa.Table]) -> None:
        super().__init__(name="decode", daemon=True)
        self.work = work
        self.start()

    def run(self) -> None:
        try:
            self.made, self.raised = self.work(), None
        except BaseException as error:
            self.raised = error

    def result(self) -> pa.Table:
        """The chunk, once it is there; raises what the work raised."""
        self.join()
        if self.raised is not None:
            raise self.raised
        return self.made


def share_cores() -> None:
    """Let PyTorch's threads sleep while they wait, here and in the workers of a Ray that starts here.

    By default they spin, and so take a core from the process that decodes. Call this before PyTorch loads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# ---- The work, from the first pending chunk to the last.


class AlarmError(Exception):
    """A run is stopped since its results would be worth nothing; says why."""


def no_alarm(fit: Fit) -> None:
    """For a job that has nothing to judge."""


class Told(Protocol):
    """What `complete` needs to know of a command."""

    @property
    def out(self) -> str: ...
    @property
    def stop_seconds(self) -> float: ...
    @property
    def log_json(self) -> str: ...


def complete(job: Job, arguments: Told, clock: Clock, watch: Callable[[Fit], None] = no_alarm) -> bool:
    """Run what is pending and complete the run; False if it was complete before. `clock` runs since the command began.

    `watch` is told how well the images so far are reconstructed, those of earlier sessions too, and may raise an `AlarmError`.
    """
    done = job.run.commits()
    pending, fit = job.run.pending(done), fit_of(done)
    if not pending.num_rows:
        print(f"{arguments.out} is complete: nothing to do")
        if job.run.is_finished(done):
            return False
        job.run.finish(0, 0.0)  # stopped between the last chunk and the end
        return True
    del done  # one for every chunk: not to be held for hours
    watch(fit)
    total, left = count_images(job.run.plan()), count_images(pending)
    if left < total:
        print(f"resuming: {total - left:,} of {total:,} images are done")
    if job.pool.why:
        print(job.pool.why, flush=True)
    flow = on_ray if job.pool.on_ray else in_process
    clock.lap("start")
    progress = console.Progress(total, total - left)
    try:
        # Closed at once where the loop is left: a replica of a stopped run must not hold its CPUs or GPUs.
        with (
            contextlib.closing(flow(job, pending)) as rows,
            signals.finishing(job.pool.replicas, arguments.stop_seconds) as done_one,
            events.watching(arguments.out, progress, arguments.log_json, job.pool.on_ray) as watchers,
        ):
            for row in rows:
                job.lock.check()
                progress.add(row["images"], row["refused"])
                watchers.tell(row)
                fit = fit.plus(Fit(*row["fit"]))
                watch(fit)
                done_one()
        progress.close()
        clock.lap("images")
        job.lock.check()
        job.run.finish(left, clock.seconds["images"])
    except AlarmError:
        progress.close()
        raise
    except (Exception, KeyboardInterrupt) as error:
        progress.leave()
        raise commands.UnfinishedError(commands.RESUMES) from error
    return True


def close(job: Job, clock: Clock) -> Record:
    """Note how long the session that completed the run took; returns the run's record."""
    clock.lap("close")
    seconds = {part: round(value, 3) for part, value in clock.seconds.items()}
    record = dataclasses.replace(job.run.record(), session_seconds=seconds)
    write_record(job.run.uri, record)
    return record

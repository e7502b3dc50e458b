"""What jobs over images share: their arguments, the three steps of the flow, on Ray Data or in this process.

One row of Ray Data per chunk of images; a job brings the stage that its replicas hold:

    plan -> decode_chunk (CPU tasks) -> Replica (actors) -> write_chunk (CPU tasks) -> progress

Left out: what a stage computes (`saecore.pipeline.stages`), and what a job does before and after (`jobs.explain`,
`jobs.embed`).
"""

import dataclasses
import functools
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from saecore import schema
from saecore.images.changes import since
from saecore.images.chunks import plan_chunks, read_chunk
from saecore.images.decode import MAX_PIXELS, blank
from saecore.images.listing import Shard, list_shards
from saecore.methods import dtype_of
from saecore.pipeline.clock import Clock
from saecore.pipeline.isolation import Suspects, Witness, pieces, refuse, survive
from saecore.pipeline.stages import Decode
from saecore.runs.fit import Fit
from saecore.runs.record import Record, write_record
from saecore.runs.run import Run, check_place, fit_of, listing_hash, open_run, run_at
from saecore.storage import resolved

from . import cluster, commands, console, origin

MAX_BLOCKS = 10_000
"""Blocks of the pipeline's input: one per chunk up to here, then several chunks each, since Ray's driver tracks every block."""

DECODE_MEMORY = 512 << 20
"""Bytes of memory asked for to decode a chunk: 64 MiB encoded, 77 MB of pixels for 512 images at 224, in two copies."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every job over images is told."""

    out: str
    """Folder of the run, local or s3:// or gs://. The same command again resumes it."""
    images: tuple[str, ...] = ()
    """Tar shards, folders, Parquet files or single images: paths, globs, s3:// or gs:// addresses."""
    clip: str = ""
    """CLIP or SigLIP: a Hugging Face id, a folder in transformers format, or `demo`."""
    batch_size: int = 64
    """Images per forward of a replica. Changes speed and memory, not results."""
    chunk_size: int = 512
    """Images per chunk, the unit of work, retry and commitment."""
    replicas: int = 0
    """Actors that hold the models; 0 is as many as the GPUs carry, or one where there is no GPU."""
    gpus_per_replica: float = -1.0
    """GPUs per replica, may be a fraction; -1 is 1 where there are GPUs and 0 elsewhere."""
    limit: int = 0
    """Take only the first so many images of the plan; 0 is all."""
    image_column: str = ""
    """Parquet column that holds the images, where it cannot be guessed."""
    max_pixels: int = MAX_PIXELS
    """Pixels above which an image is refused before it is decoded."""
    local: bool = False
    """Run in this process, without Ray, as a small collection does by itself."""
    ray: bool = False
    """Run on Ray, as a large collection does by itself."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""
        if self.local and self.ray:
            raise ValueError("--local is without Ray: give either --local or --ray")
        if self.local and self.replicas > 1:
            raise ValueError(f"--replicas {self.replicas} needs Ray: leave --local away")
        commands.at_least(self, batch_size=1, chunk_size=1, replicas=0, limit=0, max_pixels=1)
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: at most {MAX_PIXELS}, above which Pillow decodes nothing"
            )


# ---- The three steps: a one-row table in, a new one out.


class Stage(Protocol):
    """DECODED -> a payload that `Run.write_chunk` takes."""

    step: str

    def __call__(self, decoded: pa.Table) -> pa.Table: ...


def decode_chunk(row: pa.Table, decode: Decode, witness: Witness) -> pa.Table:
    """PLAN -> chunk_id, payload (DECODED), seconds. Encoded images are read as a stream and dropped once decoded."""
    chunk = row.to_pylist()[0]
    chunk_id, clock = chunk["chunk_id"], Clock()
    work = witness.begin("decode", chunk_id, chunk["end"] - chunk["start"])
    parts, position = [], 0
    for raw in clock.each("read", "decode", read_chunk(chunk)):
        for start, end in pieces(witness, "decode", chunk_id, work, position, position + raw.num_rows):
            piece = refuse(raw.slice(start - position, end - start), start, work.refused, "data")
            parts.append(survive(decode, piece, "data", lambda _: blank()))
        position += raw.num_rows
    witness.done("decode", chunk_id)
    return _pack(chunk_id, pa.concat_tables(parts), clock.seconds)


class Replica:
    """chunk_id, payload (DECODED), seconds -> the same with the stage's output. Its models stay on its device."""

    def __init__(self, stage: Callable[[], Stage], witness: Witness) -> None:
        self.stage = stage()
        self.witness = witness

    def __call__(self, row: pa.Table) -> pa.Table:
        chunk_id, decoded, seconds = _unpack(row)
        step, clock = self.stage.step, Clock()
        work = self.witness.begin(step, chunk_id, decoded.num_rows)
        parts = [
            survive(
                self.stage, refuse(decoded.slice(start, end - start), start, work.refused, "pixels"), "pixels", _black
            )
            for start, end in pieces(self.witness, step, chunk_id, work, 0, decoded.num_rows)
        ]
        self.witness.done(step, chunk_id)
        clock.lap(step)
        return _pack(chunk_id, pa.concat_tables(parts), seconds | clock.seconds)


def _black(pixels: bytes) -> bytes:
    """As many pixels, all black."""
    return bytes(len(pixels))


def write_chunk(row: pa.Table, run: Run, tags: dict[str, str]) -> pa.Table:
    """chunk_id, payload, seconds -> images, refused, fit: a small row for the driver. The chunk is committed."""
    chunk_id, payload, seconds = _unpack(row)
    commit = run.write_chunk(chunk_id, payload, seconds, tags)
    return pa.table({"images": [commit.images], "refused": [sum(commit.refused.values())], "fit": [list(commit.fit)]})


def _pack(chunk_id: int, table: pa.Table, seconds: dict[str, float]) -> pa.Table:
    return pa.table({"chunk_id": [chunk_id], "payload": schema.pack(table), "seconds": [json.dumps(seconds)]})


def _unpack(row: pa.Table) -> tuple[int, pa.Table, dict[str, float]]:
    return row["chunk_id"][0].as_py(), schema.unpack(row["payload"]), json.loads(row["seconds"][0].as_py())


# ---- The flow.


class Job(NamedTuple):
    """A checked command, ready to run."""

    run: Run
    decode: Decode
    stage: functools.partial[Any]
    """Makes a replica's `Stage` in the replica's own process."""
    tags: dict[str, str]
    pool: cluster.Pool


def on_ray(job: Job, pending: pa.Table) -> Iterator[dict[str, Any]]:
    """The three steps as a Ray Data pipeline; yields the rows of `write_chunk` as they come."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray's own would lose it on the way
    witness = cluster.RemoteSuspects()
    per_block = math.ceil(pending.num_rows / MAX_BLOCKS)
    blocks = [pending.slice(start, per_block) for start in range(0, pending.num_rows, per_block)]
    results = (
        ray.data.from_arrow(blocks)
        .map_batches(
            decode_chunk,
            fn_args=(job.decode, witness),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            # What a chunk takes, and a demand that differs from the replica's: Ray would fuse the two, and decode there.
            memory=DECODE_MEMORY,
        )
        .map_batches(
            Replica,
            fn_constructor_args=(job.stage, witness),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=job.pool.replicas),
            num_cpus=job.pool.cpus_per_replica,
            num_gpus=job.pool.gpus_per_replica,
        )
        .map_batches(write_chunk, fn_args=(job.run, job.tags), batch_size=1, batch_format="pyarrow", num_cpus=1)
    )
    yield from results.iter_rows()


def in_process(job: Job, pending: pa.Table) -> Iterator[dict[str, Any]]:
    """The same three steps one after the other, without Ray."""
    witness = Suspects()
    replica = Replica(job.stage, witness)
    for index in range(pending.num_rows):
        decoded = decode_chunk(pending.slice(index, 1), job.decode, witness)
        yield write_chunk(replica(decoded), job.run, job.tags).to_pylist()[0]


class AlarmError(Exception):
    """A run is stopped since its results would be worth nothing; says why."""


def no_alarm(fit: Fit) -> None:
    """Of a job that has nothing to judge."""


def complete(job: Job, arguments: Arguments, clock: Clock, watch: Callable[[Fit], None] = no_alarm) -> bool:
    """Run what is pending and close the run; False if it was complete before. `clock` runs since the command began.

    `watch` is told how well the images so far are reconstructed, those of earlier sessions too, and may raise an `AlarmError`.
    """
    done = job.run.commits()
    pending, fit = job.run.pending(done), fit_of(done)
    del done  # one for every chunk: not to be held for hours
    if not pending.num_rows:
        print(f"{arguments.out} is complete: nothing to do")
        if job.run.record().is_complete:
            return False
        job.run.finish(0, 0.0)  # stopped between the last chunk and the end
        return True
    watch(fit)
    total, left = (pc.sum(pc.subtract(chunks["end"], chunks["start"])).as_py() for chunks in (job.run.plan(), pending))
    if left < total:
        print(f"resuming: {total - left:,} of {total:,} images are done")
    if job.pool.why:
        print(job.pool.why, flush=True)
    flow = on_ray if job.pool.on_ray else in_process
    clock.lap("start")
    progress = console.Progress(total, total - left)
    try:
        for row in flow(job, pending):
            progress.add(row["images"], row["refused"])
            fit = fit.plus(Fit(*row["fit"]))
            watch(fit)
        progress.close()
        clock.lap("images")
        job.run.finish(left, clock.seconds["images"])
    except AlarmError:
        progress.close()
        raise
    except (Exception, KeyboardInterrupt) as error:
        progress.leave()
        raise commands.UnfinishedError(commands.RESUMES) from error
    return True


def close(job: Job, clock: Clock) -> Record:
    """Note what the session that completed the run took; returns the run's record."""
    clock.lap("close")
    seconds = {part: round(seconds, 3) for part, seconds in clock.seconds.items()}
    record = dataclasses.replace(job.run.record(), session_seconds=seconds)
    write_record(job.run.uri, record)
    return record


# ---- What a job's `prepare` puts together.


SMALL_IMAGES, SMALL_BYTES, SMALL_AT_ANY_SIZE = 2000, 250 << 20, 100
"""What one process does in the time that Ray takes to start, 10 s: of the demo's scenes 200 a second on the least of two cores,
of larger JPEGs 25 MB a second, of 12 megapixels 6 to 10 a second. With --limit, the bytes are those of whole shards."""


def check_outside(arguments: Arguments) -> None:
    """ValueError for an --out that takes no run, or a cluster that does not answer: before anything is loaded."""
    if not arguments.dry_run:
        check_place(resolved(arguments.out))
        if not arguments.local:
            cluster.check_answers()


def make_pool(arguments: Arguments, shards: Sequence[Shard], make_plan: Callable[[], pa.Table]) -> cluster.Pool:
    """Where the replicas run: as told, or in this process if the images are few. Results do not depend on it."""
    import torch

    told = arguments.ray or arguments.replicas > 1 or arguments.gpus_per_replica not in (-1, 0, 1)
    if arguments.dry_run or arguments.local:
        return cluster.here(arguments.gpus_per_replica if arguments.local else min(arguments.gpus_per_replica, 0))
    if told or cluster.asked_for() or torch.cuda.device_count() > 1:
        return cluster.make_pool(arguments.replicas, arguments.gpus_per_replica)
    if images := few(arguments, shards, make_plan):
        why = f"in this process: {images:,} images take less time than the start of Ray (--ray takes it nevertheless)"
        return cluster.here(arguments.gpus_per_replica)._replace(why=why)
    why = "on Ray: there are more images than it takes time to start (--local stays in this process)"
    return cluster.make_pool(arguments.replicas, arguments.gpus_per_replica)._replace(why=why)


def few(arguments: Arguments, shards: Sequence[Shard], make_plan: Callable[[], pa.Table]) -> int:
    """How many images the plan has, if one process is through with them before Ray has started; 0 if there are more.

    The plan of a large collection, which takes long to make, is not made for this.
    """
    small = sum(shard.bytes for shard in shards) <= SMALL_BYTES
    if not small and not 0 < arguments.limit <= SMALL_AT_ANY_SIZE:
        return 0
    planned = make_plan()
    images = int(pc.sum(pc.subtract(planned["end"], planned["start"])).as_py() or 0)
    return images if images <= SMALL_IMAGES else 0


def address(name: str) -> str:
    """A model's address as it may travel: a path made absolute, anything else as it stands."""
    return resolved(name) if Path(name).exists() else name


def listed(arguments: Arguments, images: Sequence[str]) -> list[Shard]:
    """The shards of --images. Where a run was made of the same, what is missing now is for `begin_run` to judge."""
    run = run_at(resolved(arguments.out))
    is_known = run is not None and run.record().config.get("images") == list(images)
    return list_shards(images, say=print, may_lack=is_known)


def plan(arguments: Arguments, shards: Sequence[Shard]) -> pa.Table:
    """The chunks of a new run."""
    return plan_chunks(shards, arguments.chunk_size, arguments.limit or None, arguments.image_column or None)


def parts(arguments: Arguments, shards: Sequence[Shard], pool: cluster.Pool) -> dict[str, Any]:
    """What every run's fingerprint is made of, beside its models."""
    return {
        "schema": schema.VERSION,
        "dtype": dtype_of(pool.device),
        "max-pixels": arguments.max_pixels,
        "chunk-size": arguments.chunk_size,
        "limit": arguments.limit,
        "inputs": f"{len(shards)} shards, {sum(shard.bytes for shard in shards):,} bytes, {listing_hash(shards)[:16]}",
    }


def begin_run(
    arguments: Arguments,
    parts: dict[str, Any],
    made_by: dict[str, Any],
    shards: Sequence[Shard],
    make_plan: Callable[[], pa.Table],
) -> Run:
    """The run at --out, new or taken up; of a complete one it is said what has changed in its inputs since.

    ValueError if it was made otherwise, if inputs are new, or if they have changed before it was complete.
    """
    out = resolved(arguments.out)
    run = run_at(out)
    if run is None or {**run.parts, "inputs": parts["inputs"]} != parts or run.parts == parts:
        return open_run(out, parts, made_by, make_plan)
    changes = since(run.plan(), shards, is_limited=arguments.limit > 0)
    what = str(changes) or f"inputs beyond --limit {arguments.limit} are others"
    if run.pending().num_rows:
        raise ValueError(
            f"--out {arguments.out} is not complete, and its inputs have changed since it began: {what}; the same command "
            "resumes once they are as they were, or name another folder for a new run"
        )
    if changes.new:
        raise ValueError(
            f"--out {arguments.out} is complete, and its inputs have changed since: {what}; what is new needs a folder of its "
            "own for now: name another --out, and the new inputs alone in --images"
        )
    print(f"inputs have changed since the run was made: {what}")
    return run


def made_by(module: str, argv: Sequence[str], config: Any, images: Sequence[str], pool: cluster.Pool) -> dict[str, Any]:
    """What run.json says of a run's making, whatever it makes."""
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "config": dataclasses.asdict(config) | {"images": list(images)},
        "replicas": pool.replicas,
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }

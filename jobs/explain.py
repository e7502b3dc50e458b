"""Images to latents and relevance maps: the main job.

    python -m jobs.explain --demo --out runs/demo
    python -m jobs.explain --images photos/ 'shards/*.tar' --clip openai/clip-vit-base-patch16 --sae SAE --out runs/photos

The flow, one row of Ray Data per chunk of images:

    plan -> decode_chunk (CPU tasks) -> ExplainChunk (replicas) -> write_chunk (CPU tasks) -> progress

The same command again resumes, or says that the run is complete. `--local` runs the same three steps in this process.
"""

import dataclasses
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from jobs import session
from saecore import report, runs, schema
from saecore.demo import scenes
from saecore.images import MAX_PIXELS
from saecore.isolation import Suspects, Witness, pieces, refuse
from saecore.listing import list_shards
from saecore.shards import plan_chunks, read_chunk
from saecore.stages import Decode, Explain, ExplainConfig, load_models
from saecore.storage import resolved

MAX_BLOCKS = 10_000
"""Blocks of the pipeline's input: one per chunk up to here, then several chunks each, since Ray's driver tracks every block."""

DECODE_MEMORY = 512 << 20
"""Bytes of memory asked for to decode a chunk: 64 MiB encoded, 77 MB of pixels for 512 images at 224, in two copies."""

DEFAULT_K = 32

DEMO_SCENES, DEMO_SHARDS = 512, 4


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Images to latents and relevance maps."""

    out: str
    """Folder of the run, local or s3:// or gs://. The same command again resumes it."""
    images: tuple[str, ...] = ()
    """Tar shards, folders, Parquet files or single images: paths, globs, s3:// or gs:// addresses."""
    clip: str = ""
    """CLIP: a Hugging Face id, a folder in transformers format, or `demo`."""
    sae: str = ""
    """SAE: a folder, an MSAE .pth file, hf://OWNER/REPOSITORY[/PATH][@REVISION], or `demo`."""
    k: int = 0
    """Latents kept per image; 0 is 32, or as many as the SAE lets fire where these are fewer."""
    batch_size: int = 64
    """Images per forward of a replica. Changes speed and memory, not results."""
    chunk_size: int = 512
    """Images per chunk, the unit of work, retry and commitment."""
    replicas: int = 0
    """Actors that hold CLIP and SAE; 0 is as many as the GPUs carry, or one where there is no GPU."""
    gpus_per_replica: float = -1.0
    """GPUs per replica, may be a fraction; -1 is 1 where there are GPUs and 0 elsewhere."""
    method: str = "contrib"
    """How maps are computed; `contrib` is the exact signed decomposition."""
    embeddings: bool = False
    """Write the CLIP embeddings too."""
    limit: int = 0
    """Explain only the first so many images of the plan; 0 is all."""
    image_column: str = ""
    """Parquet column that holds the images, where it cannot be guessed."""
    max_pixels: int = MAX_PIXELS
    """Pixels above which an image is refused before it is decoded."""
    local: bool = False
    """Run in this process, without Ray."""
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    demo: bool = False
    """Explain 512 drawn scenes with the embedded CLIP and SAE."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""
        if not self.demo and not (self.images and self.clip and self.sae):
            raise ValueError("give --images, --clip and --sae, or --demo for all three")
        for name, least in (
            ("k", 0),
            ("batch_size", 1),
            ("chunk_size", 1),
            ("replicas", 0),
            ("limit", 0),
            ("max_pixels", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: at most {MAX_PIXELS}, above which Pillow decodes nothing"
            )


# ---- The three steps: a one-row table in, a new one out.


def decode_chunk(row: pa.Table, decode: Decode, witness: Witness) -> pa.Table:
    """PLAN -> chunk_id, payload (DECODED), seconds. Encoded images are read as a stream and dropped once decoded."""
    chunk = row.to_pylist()[0]
    chunk_id, clock = chunk["chunk_id"], session.Clock()
    work = witness.begin("decode", chunk_id, chunk["end"] - chunk["start"])
    parts, position = [], 0
    for raw in clock.each("read", "decode", read_chunk(chunk)):
        for start, end in pieces(witness, "decode", chunk_id, work, position, position + raw.num_rows):
            parts.append(decode(refuse(raw.slice(start - position, end - start), start, work.refused, "data")))
        position += raw.num_rows
    witness.done("decode", chunk_id)
    return _pack(chunk_id, pa.concat_tables(parts), clock.seconds)


class ExplainChunk:
    """chunk_id, payload (DECODED), seconds -> the same with EXPLAINED. One replica; its CLIP and SAE stay on its device."""

    def __init__(self, config: ExplainConfig, witness: Witness) -> None:
        self.explain = Explain(config)
        self.witness = witness

    def __call__(self, row: pa.Table) -> pa.Table:
        chunk_id, decoded, seconds = _unpack(row)
        clock = session.Clock()
        work = self.witness.begin("explain", chunk_id, decoded.num_rows)
        parts = [
            self.explain(refuse(decoded.slice(start, end - start), start, work.refused, "pixels"))
            for start, end in pieces(self.witness, "explain", chunk_id, work, 0, decoded.num_rows)
        ]
        self.witness.done("explain", chunk_id)
        clock.lap("explain")
        return _pack(chunk_id, pa.concat_tables(parts), seconds | clock.seconds)


def write_chunk(row: pa.Table, run: runs.Run, tags: dict[str, str]) -> pa.Table:
    """chunk_id, payload (EXPLAINED), seconds -> images, refused: a small row for the driver. The chunk is committed."""
    chunk_id, explained, seconds = _unpack(row)
    commit = run.write_chunk(chunk_id, explained, seconds, tags)
    return pa.table({"images": [commit.images], "refused": [sum(commit.refused.values())]})


def _pack(chunk_id: int, table: pa.Table, seconds: dict[str, float]) -> pa.Table:
    return pa.table({"chunk_id": [chunk_id], "payload": schema.pack(table), "seconds": [json.dumps(seconds)]})


def _unpack(row: pa.Table) -> tuple[int, pa.Table, dict[str, float]]:
    return row["chunk_id"][0].as_py(), schema.unpack(row["payload"]), json.loads(row["seconds"][0].as_py())


# ---- The flow.


class Job(NamedTuple):
    """A checked command, ready to run."""

    run: runs.Run
    decode: Decode
    config: ExplainConfig
    tags: dict[str, str]
    pool: session.Pool


def on_ray(job: Job, pending: pa.Table) -> Iterator[dict[str, Any]]:
    """The three steps as a Ray Data pipeline; yields the rows of `write_chunk` as they come."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    witness = session.RemoteSuspects()
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
            ExplainChunk,
            fn_constructor_args=(job.config, witness),
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
    explain = ExplainChunk(job.config, witness)
    for index in range(pending.num_rows):
        decoded = decode_chunk(pending.slice(index, 1), job.decode, witness)
        yield write_chunk(explain(decoded), job.run, job.tags).to_pylist()[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return session.run_job(lambda: explain(sys.argv[1:] if argv is None else list(argv)))


def parse(argv: list[str]) -> Arguments:
    """The command line's arguments; SystemExit 2 for one that does not exist, ValueError for one that cannot be."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m jobs.explain", config=(tyro.conf.FlagCreatePairsOff,))
    arguments.check()
    return arguments


def explain(argv: list[str]) -> int:
    """Check everything, run what is pending, say what came of it."""
    with session.mistakes():
        arguments = parse(argv)
    with session.quiet(arguments.out):
        with session.mistakes():
            job = prepare(arguments, argv)
        if job is None:
            return 0
        pending = job.run.pending()
        if pending.num_rows:
            finish(job, pending, in_process if arguments.local else on_ray)
        else:
            print(f"{arguments.out} is complete: nothing to do")
            if job.run.record()["status"] != "complete":  # stopped between the last chunk and the end
                job.run.finish(0, 0.0)
                report.write_preview(job.run)
    print(report.summary(arguments.out, job.run.record()))
    print(report.next_steps(arguments.out))
    return 0


def finish(job: Job, pending: pa.Table, flow: Callable[[Job, pa.Table], Iterator[dict[str, Any]]]) -> None:
    """Run the pending chunks through the flow and close the run."""
    total, left = (pc.sum(pc.subtract(chunks["end"], chunks["start"])).as_py() for chunks in (job.run.plan(), pending))
    if left < total:
        print(f"resuming: {total - left:,} of {total:,} images are done")
    progress = session.Progress(total, total - left)
    try:
        for row in flow(job, pending):
            progress.add(row["images"], row["refused"])
    except (Exception, KeyboardInterrupt):
        progress.close()
        print("stopped: the same command resumes from here")
        raise
    progress.close()
    job.run.finish(left, progress.seconds())
    report.write_preview(job.run)


# ---- Before any actor starts.


def prepare(arguments: Arguments, argv: list[str]) -> Job | None:
    """Resolve the arguments to a `Job`, or print what it would be for --dry-run; ValueError for what the user can mend."""
    from saecore.inference import METHODS  # and with it PyTorch: --help and the workers that decode do without

    if arguments.method not in METHODS:
        raise ValueError(f"--method {arguments.method}: must be one of {', '.join(METHODS)}")
    images = arguments.images or demo_images(arguments.out)
    clip, sae_address = (
        resolved(name) if Path(name).exists() else name for name in (arguments.clip or "demo", arguments.sae or "demo")
    )
    tower, sae = load_models(clip, sae_address)
    sae.firing_threshold()  # a BatchTopK SAE may have none yet
    most = sae.config.k if sae.config.architecture == "topk" else sae.config.n_latents
    if arguments.k > most:
        raise ValueError(f"--k {arguments.k}: this SAE lets {most} latents fire, so at most that many can be kept")
    k = arguments.k or min(DEFAULT_K, most)
    shards = list_shards(images)
    pool = session.make_pool(arguments.replicas, arguments.gpus_per_replica, arguments.local or arguments.dry_run)
    config = ExplainConfig(
        clip=clip,
        sae=sae_address,
        k=k,
        batch_size=arguments.batch_size,
        device=pool.device,
        method=arguments.method,
        embeddings=arguments.embeddings,
        threads=pool.threads,
    )
    parts: dict[str, Any] = {
        "schema": schema.VERSION,
        "clip": tower.sha256()[:16],
        "sae": sae.sha256()[:16],
        "k": k,
        "method": arguments.method,
        "dtype": "bfloat16" if pool.device == "cuda" else "float32",
        "embeddings": arguments.embeddings,
        "max-pixels": arguments.max_pixels,
        "chunk-size": arguments.chunk_size,
        "limit": arguments.limit,
        "inputs": f"{len(shards)} shards, {sum(shard.bytes for shard in shards):,} bytes, {runs.listing_hash(shards)[:16]}",
    }
    height, width = tower.grid
    tags = {
        "clip": clip,
        "clip_sha256": parts["clip"],
        "sae": sae_address,
        "sae_sha256": parts["sae"],
        "method": arguments.method,
        "grid_height": str(height),
        "grid_width": str(width),
    }

    def make_plan() -> pa.Table:
        return plan_chunks(shards, arguments.chunk_size, arguments.limit or None, arguments.image_column or None)

    if arguments.dry_run:
        print(report.outline(make_plan(), arguments.out, dataclasses.asdict(config)))
        return None
    made_by = {
        "command": shlex.join(["python", "-m", "jobs.explain", *argv]),
        "config": dataclasses.asdict(config) | {"images": list(images)},
        "replicas": pool.replicas,
        "grid": [height, width],
        "n_latents": sae.config.n_latents,
        "sae": sae.describe(),
        "versions": session.versions(),
        "git_commit": session.git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    run = runs.open_run(resolved(arguments.out), parts, made_by, make_plan)
    return Job(run, Decode(tower.preprocess, arguments.max_pixels), config, tags, pool)


def demo_images(out: str) -> tuple[str, ...]:
    """The demo's scenes beside the run, drawn if they are not there yet."""
    if "://" in out:
        raise ValueError(f"--demo draws its images beside the run, so --out {out} must be a local folder")
    folder = Path(out + "-images")
    if not folder.exists():
        # Under another name until all of it is there: an interrupted start must not leave half of the images.
        unfinished = Path(tempfile.mkdtemp(prefix=folder.name, dir=_made(folder.parent)))
        scenes.write_shards(unfinished, DEMO_SCENES, DEMO_SHARDS)
        unfinished.rename(folder)
    return (str(folder),)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())

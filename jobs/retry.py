"""Read images again that a run refused, where the reason may have passed: a disk that was not there, a worker that was killed.

    python -m jobs.retry runs/photos
    python -m jobs.retry runs/photos --reason missing-file --dry-run

The steps are those that made the run, over these images only, with the configuration that run.json holds:

    chunks with such images -> decode -> stage -> write with the other rows of before -> manifest

Every image has one row before, meanwhile and after. A chunk gets files under new names, so that whoever reads the run goes on
to see the files of before until all is done. Stopped at any time, the same command goes on.

Left out: images in a tar or Parquet file that has another size than when the run began. One of the same size is taken for it.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from saecore import schema
from saecore.images.changes import other_files, shortened
from saecore.images.effort import MAX_PIXELS
from saecore.pipeline.clock import Clock
from saecore.pipeline.config import EmbedConfig, ExplainConfig, ModelDigests, parts_of, restored
from saecore.pipeline.decoder import IMAGE_SECONDS
from saecore.pipeline.stages import Decode, Embed, Explain
from saecore.report.preview import write_preview
from saecore.runs.commits import Commit
from saecore.runs.record import Record
from saecore.runs.refusals import MAY_PASS, refusals, refused_chunks
from saecore.runs.run import Run, run_at
from saecore.storage import resolved

from . import cluster, collection, commands, console, decoding, locks, pipeline
from .hints import after_vectors
from .pool import Pool, Wishes
from .summaries import refused_images, run_summary


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Read images again that a run refused, where the reason may have passed.

    Needs the folder of a complete run of jobs.explain or jobs.embed.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run: a path, or an s3:// or gs:// address."""
    reason: str = ",".join(MAY_PASS)
    """Reasons, joined by commas: images that were refused for one of them are read again."""
    replicas: int = 0
    """Actors that hold the models. 0 is as many as the GPUs carry, or one if there is no GPU."""
    gpus_per_replica: float = -1.0
    """GPUs of each replica; a fraction is allowed. -1 is one GPU if there are GPUs, else none."""
    wait_minutes: float = 10.0
    """Minutes to wait for nodes that the cluster at RAY_ADDRESS starts on demand. 0 refuses at once what does not fit."""
    image_seconds: float = IMAGE_SECONDS
    """An image whose decoder takes longer is refused. 0 sets no limit."""
    local: bool = False
    """Run in this process, without Ray. A few images do so by themselves."""
    ray: bool = False
    """Run on Ray. Many images do so by themselves."""
    dry_run: bool = False
    """Say how many images would be read again, and do nothing."""

    @property
    def wishes(self) -> Wishes:
        """What is asked of the pool."""
        return Wishes(self.replicas, self.gpus_per_replica)

    @property
    def reasons(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(reason.strip() for reason in self.reason.split(",") if reason.strip()))

    def check(self) -> None:
        """See `commands.Checked.check`."""
        commands.at_least(self, replicas=0, wait_minutes=0, image_seconds=0)
        with commands.given_fields(self):
            self.wishes.check()
        if not self.reasons:
            raise ValueError(f"--reason names none: give some of {', '.join(MAY_PASS)}, for example")
        if self.local and (self.ray or self.replicas > 1):
            raise ValueError("--local is without Ray: omit --ray and --replicas, or omit --local")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: retry(sys.argv[1:] if argv is None else list(argv)))


def retry(argv: list[str]) -> int:
    """Check everything, read the images again, say what came of it."""
    clock = Clock()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "retry")
        run, commits = complete_run(arguments.run)
        chunks = without_others(refused_chunks(run, commits, arguments.reasons))
        if chunks.num_rows and not arguments.dry_run:
            commands.check_writable("RUN", arguments.run)
    n_images = count(chunks)
    if arguments.dry_run or not n_images:
        print(f"to read again: {n_images:,} images of {chunks.num_rows:,} chunks ({', '.join(arguments.reasons)})")
        if not (arguments.dry_run or run.is_finished(commits)):
            run.finish(0, 0.0)  # stopped between the last chunk and the end
        return 0
    before = run.record()
    with console.quiet() as log, locks.held("RUN", arguments.run, "retry") as lock:
        with commands.mistakes():
            job = prepare(arguments, run, commits, n_images)._replace(lock=lock)
        log.run = run.uri
        work(job, chunks, clock)
        if before.kind == "explain":
            write_preview(run.uri)
        record = pipeline.close(job, clock)
    print(run_summary(arguments.run, record))
    print(f"regained      {before.n_refused - record.n_refused:,} of {n_images:,} images")
    if record.n_refused:
        print(refused_images(arguments.run, refusals(run), is_explained=record.kind == "explain"))
    commands.propose(after_retry(arguments.run, record))
    return 0


def complete_run(out: str) -> tuple[Run, list[Commit]]:
    """A run all of whose chunks are done, and their commit records; ValueError if there is none."""
    run = run_at(resolved(out))
    if run is None:
        raise ValueError(f"{out} holds no run: there is no run.json")
    commits, record = run.commits(), run.record()
    if not record.is_complete or run.pending(commits).num_rows:
        raise ValueError(
            f"{out} is not complete; the command that began it, given again, ends it first: {record.command}"
        )
    return run, commits


def without_others(chunks: pa.Table) -> pa.Table:
    """The chunks whose shards can hold what was planned; others are told."""
    if others := other_files(chunks):
        print(f"passed over {len(others):,} shards that are gone, or have changed in size ({shortened(others)})")
    return chunks.filter(pc.invert(pc.is_in(chunks["uri"], pa.array(others, pa.string()))))


def count(chunks: pa.Table) -> int:
    """The images that are read again."""
    return int(pc.sum(pc.list_value_length(chunks["only"])).as_py() or 0)


def prepare(arguments: Arguments, run: Run, commits: Sequence[Commit], n_images: int) -> pipeline.Job:
    """The job that made the run, as its record holds it; ValueError if its models are not to be had as they were."""
    record = run.record()
    try:
        config = restored(record.kind, record.config)
    except TypeError as error:
        raise ValueError(f"run.json of {arguments.run} does not say how it was made: {error}") from error
    preprocess, digests = models(arguments.run, config)
    pool = make_pool(arguments, n_images)
    # `auto` may come to something else on this device than it did on that of the run.
    precision = record.dtype or config.precision
    config = dataclasses.replace(config, device=pool.device, threads=pool.threads, precision=precision)
    check_same(arguments.run, record, {"schema": schema.VERSION, **parts_of(config, digests)})
    stage: Any = Explain if isinstance(config, ExplainConfig) else Embed
    max_pixels, resize = record.parts.get("max-pixels", MAX_PIXELS), decoding.held(record.parts)
    decode = Decode(preprocess, max_pixels, arguments.image_seconds, resize)
    again = dataclasses.replace(run, again=1 + max(commit.again for commit in commits))
    # No tags: the metadata of the files of before stays.
    return pipeline.Job(again, decode, functools.partial(stage, config), {}, pool)


def models(out: str, config: EmbedConfig) -> tuple[Any, ModelDigests]:
    """How CLIP's images are preprocessed, and the hashes of the models; ValueError if one cannot be loaded any more."""
    from saecore.removal.saved import digest_of, load_head
    from saecore.sae.checkpoints import load_running_sae
    from saecore.towers.loading import load_tower

    try:
        tower = load_tower(config.clip)
        held = ModelDigests(tower.sha256()[:16])
        if isinstance(config, ExplainConfig):
            sae = load_running_sae(config.sae, config.site)
            head = digest_of(load_head(config.head)) if config.head else ""
            held = held._replace(sae=sae.sha256()[:16], site=sae.config.site, head=head)
    except ValueError as error:
        raise ValueError(f"the models that made {out} are needed again: {error}") from error
    return tower.preprocess, held


def make_pool(arguments: Arguments, n_images: int) -> Pool:
    """Where the replicas run: as told, or in this process if the images are few."""
    is_told = arguments.ray or arguments.replicas > 1 or cluster.asked_for()
    if arguments.local or (n_images <= collection.SMALL_IMAGES and not is_told):
        return cluster.here(arguments.gpus_per_replica)
    return cluster.make_pool(arguments.wishes, arguments.wait_minutes)


def check_same(out: str, record: Record, parts: dict[str, Any]) -> None:
    """ValueError, which names what differs, if the run was made with something else than `parts`."""
    if changed := [
        f"{key} was {record.parts.get(key)!r}, is now {value!r}"
        for key, value in parts.items()
        if record.parts.get(key) != value
    ]:
        raise ValueError(f"{out} was made with other models, or in another way ({'; '.join(changed)})")


def work(job: pipeline.Job, chunks: pa.Table, clock: Clock) -> None:
    """Read the images again, and make their rows those of the run."""
    flow = pipeline.on_ray if job.pool.on_ray else pipeline.in_process
    clock.lap("start")
    progress = console.Progress(chunks.num_rows, 0, "chunks")
    try:
        with contextlib.closing(flow(job, chunks)) as rows:
            for _ in rows:
                progress.add(1, 0)
        progress.close()
        clock.lap("images")
        job.run.finish(count(chunks), clock.seconds["images"])
    except (Exception, KeyboardInterrupt) as error:
        progress.leave()
        raise commands.UnfinishedError(commands.RESUMES) from error


def after_retry(out: str, record: Record) -> str:
    """What to do next, since images that came back are in no index, and in no memory map."""
    if record.embedded_site:
        return after_vectors(out)
    if record.kind == "embed":
        return f"next          {record.command}    # says that the run is complete, and writes its memory map"
    return f"next          {commands.line('index', '--run', out)}    # sorts again what was read again"


if __name__ == "__main__":
    sys.exit(main())

"""What jobs over images are told, and how a run begins from it: inputs, pool, fingerprint, run.

From the top: arguments; a job's parts from its arguments. Left out: what a run then does (`jobs.pipeline`), and what a job does
before and after (`jobs.explain`, `jobs.embed`).
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from saecore import schema
from saecore.images.changes import Changes, since
from saecore.images.chunks import count_images, plan_chunks
from saecore.images.effort import MAX_PIXELS
from saecore.images.listing import list_shards
from saecore.methods import check_precision
from saecore.pipeline.config import EmbedConfig, ModelDigests, Part, changes_results, keeps_results, parts_of
from saecore.pipeline.decoder import IMAGE_SECONDS
from saecore.pipeline.growth import Divided, divide, groups_of, grown, new_chunks
from saecore.runs.files import write_plan
from saecore.runs.record import Record
from saecore.runs.run import Run, check_place, listing_hash, open_run, refuse_other, run_at
from saecore.schema import growths_of
from saecore.storage import check_writable, resolved

from . import cluster, commands, decoding, events, exits, origin
from .pool import Pool, Wishes, crowded

SMALL_IMAGES, SMALL_BYTES, SMALL_AT_ANY_SIZE = 2000, 250 << 20, 100
"""What one process does in the time that Ray takes to start, 10 s: of the demo's scenes 200 a second on the least of two cores,
of larger JPEGs 25 MB a second, of 12 megapixels 6 to 10 a second. With --limit, the bytes are those of whole shards."""

_IN_CONFIG = keeps_results("the stage's configuration holds it")
_IN_INPUTS = keeps_results("the part `inputs` holds the listing")
_ONLY_WHERE = keeps_results("it says where the work is done; the device is in the stage's configuration")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What every job over images is told."""

    out: str = dataclasses.field(metadata=keeps_results("a run may be moved"))
    """Folder of the run: a path, or an s3:// or gs:// address. The same command again resumes the run."""
    images: tuple[str, ...] = dataclasses.field(default=(), metadata=_IN_INPUTS)
    """Tar shards, folders, Parquet files or single images: paths, globs, s3://, gs:// or hf://datasets/ addresses; single files
    also by https://."""
    clip: str = dataclasses.field(default="", metadata=_IN_CONFIG)
    """CLIP or SigLIP: a Hugging Face id, a folder in transformers format, or `demo`."""
    batch_size: int = dataclasses.field(default=0, metadata=_IN_CONFIG)
    """Images per forward of a replica. It changes speed and memory, not results. 0 is 32 on a CPU and 256 on a GPU."""
    precision: str = dataclasses.field(default="auto", metadata=_IN_CONFIG)
    """Precision of the image tower: float32, bfloat16 (twice as fast on some CPUs, slower on others; some images keep other
    latents), or auto, which is bfloat16 on a GPU, unless a method needs float32, and float32 on a CPU."""
    chunk_size: int = dataclasses.field(default=512, metadata=changes_results(Part("chunk-size")))
    """Images per chunk, the unit of work, of retry and of commitment."""
    replicas: int = dataclasses.field(default=0, metadata=_ONLY_WHERE)
    """Actors that hold the models. 0 is as many as the GPUs carry, or one for each node if there is no GPU."""
    gpus_per_replica: float = dataclasses.field(default=-1.0, metadata=_ONLY_WHERE)
    """GPUs of each replica; a fraction is allowed. -1 is one GPU if there are GPUs, else none."""
    min_replicas: int = dataclasses.field(default=0, metadata=_ONLY_WHERE)
    """Begin with so many replicas, and with more up to --replicas as the cluster starts nodes. 0 begins with all."""
    wait_minutes: float = dataclasses.field(default=10.0, metadata=keeps_results("it is a time before the work"))
    """Minutes to wait for nodes that the cluster at RAY_ADDRESS starts on demand. 0 refuses at once what does not fit."""
    limit: int = dataclasses.field(default=0, metadata=changes_results(Part("limit")))
    """Take only the first images of the plan, so many. 0 takes all."""
    image_column: str = dataclasses.field(
        default="", metadata=keeps_results("the plan holds it from the first start on")
    )
    """The Parquet column that holds the images, if the program cannot guess it."""
    max_pixels: int = dataclasses.field(default=MAX_PIXELS, metadata=changes_results(Part("max-pixels")))
    """An image with more pixels is refused before it is decoded."""
    resize: str = dataclasses.field(default="auto", metadata=keeps_results("the part `resize` holds what it comes to"))
    """How images are resized: `exact`, by Pillow, or `fast`, in a third of the time or less. Fast pixels are Pillow's, but
    0.3 % of the values differ by one level of grey. `auto` is as the run at --out has it; for a new run, fast where the machine
    can."""
    image_seconds: float = dataclasses.field(
        default=IMAGE_SECONDS,
        metadata=keeps_results("no image that can be decoded comes near it; else its row says so"),
    )
    """An image whose decoder takes longer is refused. 0 sets no limit, and decodes in the workers' own processes, which is a
    little faster."""
    max_error_share: float = dataclasses.field(default=1.0, metadata=keeps_results("it changes the exit code"))
    """Exit with code 3 if a larger part of the images is refused, from 0 to 1. The run is complete nevertheless."""
    stop_seconds: float = dataclasses.field(default=10.0, metadata=keeps_results("it says when a run is interrupted"))
    """Seconds that a first Ctrl-C or SIGTERM leaves for the chunks that are worked on, so that they are not lost. 0 ends at
    once."""
    log_json: str = dataclasses.field(default="", metadata=keeps_results("it is written besides the run"))
    """Append a line of JSON for each chunk to this local file; `-` prints it."""
    local: bool = dataclasses.field(default=False, metadata=_ONLY_WHERE)
    """Run in this process, without Ray. A small collection does so by itself."""
    ray: bool = dataclasses.field(default=False, metadata=_ONLY_WHERE)
    """Run on Ray. A large collection does so by itself."""
    grow: bool = dataclasses.field(default=False, metadata=keeps_results("the plan tells how it grew"))
    """Take new images into the run that --out holds. Its rows and their numbers stay as they are."""
    dry_run: bool = dataclasses.field(default=False, metadata=keeps_results("it writes nothing"))
    """Say what the command would do, and do nothing."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""
        if self.local and self.ray:
            raise ValueError("--local is without Ray: give either --local or --ray")
        if self.local and self.replicas > 1:
            raise ValueError(f"--replicas {self.replicas} needs Ray: omit --local")
        if self.grow and self.limit:
            raise ValueError("--grow takes in all images that are new, and --limit holds a run to its first: omit one")
        least = {"batch_size": 0, "chunk_size": 1, "replicas": 0, "min_replicas": 0, "wait_minutes": 0, "limit": 0}
        commands.at_least(self, **least, max_pixels=1, image_seconds=0, stop_seconds=0)
        with commands.given_fields(self):
            wishes(self).check()
            check_precision(self.precision)
        if "://" in self.log_json:
            raise ValueError(
                f"--log-json {self.log_json}: a store cannot be appended to; name a local file, or - to print"
            )
        decoding.check(self.resize)
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"--max-error-share {self.max_error_share:g}: must be from 0 to 1")
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: at most {MAX_PIXELS}, since Pillow decodes nothing larger"
            )


def judged(arguments: Arguments, record: Record) -> int:
    """The exit code of a complete run; says so where more of its images are refused than is allowed."""
    if record.n_refused <= arguments.max_error_share * record.images:
        return exits.COMPLETE
    share = f"{record.n_refused:,} of {record.images:,} images are refused"
    print(f"{share}, more than --max-error-share {arguments.max_error_share:g} allows: exit code {exits.REFUSED}")
    return exits.REFUSED


# ---- A run from its arguments.


def check_outside(arguments: Arguments) -> None:
    """ValueError for an --out that takes no run, or a cluster that does not answer: before anything is loaded."""
    if not arguments.dry_run:
        with commands.given("--out"):
            check_place(resolved(arguments.out))
        if arguments.log_json and arguments.log_json != events.STDOUT:
            commands.check_file("--log-json", arguments.log_json)
            if arguments.grow:
                check_writable(resolved(arguments.out))
        if not arguments.local:
            cluster.check_answers()


def address(name: str) -> str:
    """A model's address as it may travel: a path made absolute, anything else as it stands."""
    return resolved(name) if Path(name).exists() else name


class Inputs:
    """The images of a command: their shards, and their plan, which is made when it is first asked for."""

    def __init__(self, arguments: Arguments, images: Sequence[str]) -> None:
        self.arguments, self.images = arguments, list(images)
        with commands.given("--out"):
            self.run = run_at(resolved(arguments.out))
        """The run at --out, None if there is none yet."""
        # Of a run that was made of the same inputs, `begin_run` judges what is missing now.
        self.is_known = self.run is not None and self.images in inputs_of(self.run)
        with commands.given("--images"):
            self.shards = list_shards(images, say=print, may_lack=self.is_known)

    @property
    def grown(self) -> Run | None:
        """The run that is to grow, if there is one."""
        return self.run if self.arguments.grow else None

    @functools.cached_property
    def plan(self) -> pa.Table:
        """The chunks of a new run; of a run that grows, those that come after its own."""
        given = self.arguments
        with commands.given_fields(given):
            if self.grown is not None:
                return new_chunks(self.grown.plan(), self.divided.new, given.chunk_size, given.image_column or None)
            return plan_chunks(self.shards, given.chunk_size, given.limit or None, given.image_column or None)

    @functools.cached_property
    def divided(self) -> Divided:
        """The shards as the plan of the run groups them, and those that it does not know: all, if there is no run."""
        if self.run is None or self.arguments.limit:  # a limited plan has only a part of its last shard
            return Divided([], self.shards)
        plan = self.run.plan()
        groups = groups_of(plan)
        shards = list_shards(self.images, may_lack=self.is_known, groups=groups) if groups else self.shards
        return divide(plan, shards, groups)

    @property
    def bytes(self) -> int:
        """Of all shards whose images are in `plan`."""
        return sum(shard.bytes for shard in (self.shards if self.grown is None else self.divided.new))


def wishes(arguments: Arguments) -> Wishes:
    """What is asked of the pool."""
    return Wishes(arguments.replicas, arguments.gpus_per_replica, arguments.min_replicas)


def check_run(inputs: Inputs, parts: Sequence[dict[str, Any]]) -> None:
    """ValueError for what needs no replica to be known, before Ray starts: inputs of which no plan can be made, or an --out
    that holds a run made otherwise.

    `parts` are those of a run on each device that the replicas may get.
    """
    run = inputs.run
    if run is None or inputs.grown is not None:
        inputs.plan  # noqa: B018
    if run is not None and all({**run.parts, "inputs": each["inputs"]} != each for each in parts):
        with commands.given("--out"):
            refuse_other(resolved(inputs.arguments.out), {**run.parts, "inputs": parts[0]["inputs"]}, parts[0])


def make_pool(arguments: Arguments, inputs: Inputs, image_bytes: int) -> Pool:
    """`_place`, with a line that says so if this machine is slow in the precision that was asked for."""
    pool = _place(arguments, inputs, image_bytes)
    if arguments.precision != "bfloat16" or pool.device != "cpu":
        return pool
    from saecore.pipeline.inference import bfloat16_gain

    # Said and not refused: replicas may run on other machines than this one, and a run that a GPU began may have to end here.
    gain = bfloat16_gain()
    slow = f"this machine multiplies in bfloat16 at {gain:.1f} times the speed of float32: --precision float32 would be faster"
    return pool._replace(why="\n".join(line for line in (pool.why, slow * (gain < 1)) if line))


def _place(arguments: Arguments, inputs: Inputs, image_bytes: int) -> Pool:
    """Where the replicas run: as told, or in this process if the images are few. Results do not depend on it.

    `image_bytes` are those of the pixels of an image.
    """
    import torch

    is_told = arguments.ray or arguments.replicas > 1 or arguments.gpus_per_replica not in (-1, 0, 1)
    if arguments.dry_run or arguments.local:
        return cluster.here(arguments.gpus_per_replica if arguments.local else min(arguments.gpus_per_replica, 0))

    def on_ray(why: str = "") -> Pool:
        pool = cluster.make_pool(wishes(arguments), arguments.wait_minutes)
        remark = crowded(cluster.nodes(), arguments.chunk_size, image_bytes)
        return pool._replace(why="\n".join(line for line in (why, remark) if line))

    if is_told or cluster.asked_for() or torch.cuda.device_count() > 1:
        return on_ray()
    if n_images := few(inputs):
        why = f"in this process: {n_images:,} images take less time than the start of Ray (--ray takes it nevertheless)"
        return cluster.here(arguments.gpus_per_replica)._replace(why=why)
    return on_ray("on Ray: the images take more time than its start (--local stays in this process)")


def few(inputs: Inputs) -> int:
    """How many images there are, if one process is through with them before Ray has started; 0 if there are more.

    The plan of a large collection, which takes long to make, is not made for this.
    """
    if inputs.bytes > SMALL_BYTES and not 0 < inputs.arguments.limit <= SMALL_AT_ANY_SIZE:
        return 0
    n_images = count_images(inputs.plan)
    return n_images if n_images <= SMALL_IMAGES else 0


def fingerprint_parts(inputs: Inputs, config: EmbedConfig, models: ModelDigests) -> dict[str, Any]:
    """Everything that changes the results of a run over images, see `saecore.pipeline.config`."""
    shards = f"{len(inputs.shards)} shards, {inputs.bytes:,} bytes, {listing_hash(inputs.shards)[:16]}"
    own = parts_of(inputs.arguments, of=Arguments)
    own |= decoding.part(decoding.chosen(inputs.arguments.resize, inputs.run))
    return {"schema": schema.VERSION, **own, "inputs": shards, **parts_of(config, models)}


def made_by(name: str, argv: Sequence[str], config: Any, inputs: Inputs, pool: Pool) -> dict[str, Any]:
    """What run.json says of a run's making, whatever it makes."""
    return {
        "command": commands.called(name, *argv),
        "config": dataclasses.asdict(config) | {"images": inputs.images},
        "replicas": pool.replicas,
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "started": now(),
    }


def now() -> str:
    """This moment, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def inputs_of(run: Run) -> list[list[str]]:
    """The images that commands named for a run: that which began it, and those by which it grew."""
    return [run.record().inputs, *(growth["inputs"] for growth in growths_of(run.plan()))]


def begin_run(inputs: Inputs, parts: dict[str, Any], made_by: dict[str, Any]) -> Run:
    """The run at --out, new, taken up, or grown; it is said what has changed in its inputs since.

    ValueError if it was made otherwise, if inputs are new and it is not to grow, or if inputs of chunks that are not done have
    changed.
    """
    arguments, run = inputs.arguments, inputs.run
    if run is None or {**run.parts, "inputs": parts["inputs"]} != parts:
        with commands.given("--out"):
            return open_run(resolved(arguments.out), parts, made_by, lambda: inputs.plan)
    plan = run.plan()
    if run.parts == parts and not growths_of(plan):
        return run
    changes = changes_of(inputs, plan)
    pending = run.pending()
    if harm := str(changes.of(pending)):
        raise ValueError(
            f"--out {arguments.out} is not complete, and its inputs have changed since it began: {harm}; the same command "
            "resumes once they are as they were, or name another folder for a new run"
        )
    if changes.new and not arguments.grow:
        raise ValueError(
            f"--out {arguments.out} is {'not ' * bool(pending.num_rows)}complete, and there are inputs that it does not have: "
            f"{changes}; --grow takes them in, and another --out begins a run of its own"
        )
    if what := str(changes._replace(new=[])):
        print(f"inputs have changed since the run was made: {what}")
    if changes.new:
        grow(run, plan, inputs)
    return run


def changes_of(inputs: Inputs, plan: pa.Table) -> Changes:
    """What has changed in the inputs since they were planned."""
    if inputs.arguments.limit:
        return since(plan, inputs.shards, is_limited=True)
    known, new = inputs.divided
    return since(plan, known, is_limited=False)._replace(new=since(plan, [*known, *new], is_limited=False).new)


def grow(run: Run, plan: pa.Table, inputs: Inputs) -> None:
    """Put the chunks that are new after those of the plan of a run. The plan is one file: from then on the run has grown."""
    chunks = inputs.plan
    about = {"time": now(), "inputs": inputs.images}
    write_plan(run.uri, grown(plan, chunks, about))
    print(f"grows by {count_images(chunks):,} images in {chunks.num_rows:,} chunks")

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
from saecore.images.changes import since
from saecore.images.chunks import count_images, plan_chunks
from saecore.images.effort import MAX_PIXELS
from saecore.images.listing import list_shards
from saecore.pipeline.config import EmbedConfig, ModelDigests, Part, changes_results, keeps_results, parts_of
from saecore.runs.run import Run, check_place, listing_hash, open_run, refuse_other, run_at
from saecore.storage import resolved

from . import cluster, commands, origin
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
    batch_size: int = dataclasses.field(default=64, metadata=_IN_CONFIG)
    """Images per forward of a replica. It changes speed and memory, not results."""
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
    local: bool = dataclasses.field(default=False, metadata=_ONLY_WHERE)
    """Run in this process, without Ray. A small collection does so by itself."""
    ray: bool = dataclasses.field(default=False, metadata=_ONLY_WHERE)
    """Run on Ray. A large collection does so by itself."""
    dry_run: bool = dataclasses.field(default=False, metadata=keeps_results("it writes nothing"))
    """Say what the command would do, and do nothing."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""
        if self.local and self.ray:
            raise ValueError("--local is without Ray: give either --local or --ray")
        if self.local and self.replicas > 1:
            raise ValueError(f"--replicas {self.replicas} needs Ray: omit --local")
        least = {"batch_size": 1, "chunk_size": 1, "replicas": 0, "min_replicas": 0, "wait_minutes": 0, "limit": 0}
        commands.at_least(self, **least, max_pixels=1)
        with commands.given_fields(self):
            wishes(self).check()
        if self.max_pixels > MAX_PIXELS:
            raise ValueError(
                f"--max-pixels {self.max_pixels}: at most {MAX_PIXELS}, since Pillow decodes nothing larger"
            )


# ---- A run from its arguments.


def check_outside(arguments: Arguments) -> None:
    """ValueError for an --out that takes no run, or a cluster that does not answer: before anything is loaded."""
    if not arguments.dry_run:
        with commands.given("--out"):
            check_place(resolved(arguments.out))
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
            run = run_at(resolved(arguments.out))
        # Of a run that was made of the same inputs, `begin_run` judges what is missing now.
        is_known = run is not None and run.record().inputs == self.images
        with commands.given("--images"):
            self.shards = list_shards(images, say=print, may_lack=is_known)

    @functools.cached_property
    def plan(self) -> pa.Table:
        """The chunks of a new run."""
        given = self.arguments
        with commands.given_fields(given):
            return plan_chunks(self.shards, given.chunk_size, given.limit or None, given.image_column or None)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)


def wishes(arguments: Arguments) -> Wishes:
    """What is asked of the pool."""
    return Wishes(arguments.replicas, arguments.gpus_per_replica, arguments.min_replicas)


def check_run(inputs: Inputs, parts: Sequence[dict[str, Any]]) -> None:
    """ValueError for what needs no replica to be known, before Ray starts: inputs of which no plan can be made, or an --out
    that holds a run made otherwise.

    `parts` are those of a run on each device that the replicas may get.
    """
    run = run_at(resolved(inputs.arguments.out))
    if run is None:
        inputs.plan  # noqa: B018
    elif all({**run.parts, "inputs": each["inputs"]} != each for each in parts):
        with commands.given("--out"):
            refuse_other(resolved(inputs.arguments.out), {**run.parts, "inputs": parts[0]["inputs"]}, parts[0])


def make_pool(arguments: Arguments, inputs: Inputs, image_bytes: int) -> Pool:
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
    return {"schema": schema.VERSION, **own, "inputs": shards, **parts_of(config, models)}


def made_by(name: str, argv: Sequence[str], config: Any, inputs: Inputs, pool: Pool) -> dict[str, Any]:
    """What run.json says of a run's making, whatever it makes."""
    return {
        "command": commands.called(name, *argv),
        "config": dataclasses.asdict(config) | {"images": inputs.images},
        "replicas": pool.replicas,
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def begin_run(inputs: Inputs, parts: dict[str, Any], made_by: dict[str, Any]) -> Run:
    """The run at --out, new or taken up; of a complete one it is said what has changed in its inputs since.

    ValueError if it was made otherwise, if inputs are new, or if they have changed before it was complete.
    """
    arguments, out = inputs.arguments, resolved(inputs.arguments.out)
    run = run_at(out)
    if run is None:
        return open_run(out, parts, made_by, lambda: inputs.plan)
    if {**run.parts, "inputs": parts["inputs"]} != parts or run.parts == parts:
        with commands.given("--out"):
            return open_run(out, parts, made_by, lambda: inputs.plan)
    changes = since(run.plan(), inputs.shards, is_limited=arguments.limit > 0)
    what = str(changes) or f"inputs beyond --limit {arguments.limit} are others"
    if run.pending().num_rows:
        raise ValueError(
            f"--out {arguments.out} is not complete, and its inputs have changed since it began: {what}; the same command "
            "resumes once they are as they were, or name another folder for a new run"
        )
    if changes.new:
        raise ValueError(
            f"--out {arguments.out} is complete, and its inputs have changed since: {what}; what is new needs a folder of its "
            "own for now: name another --out, and only the new inputs in --images"
        )
    print(f"inputs have changed since the run was made: {what}")
    return run

"""Train a head of removal: what each patch is worth to the embedding, predicted from one forward of a frozen tower.

    python -m jobs.distill --images photos/ --clip openai/clip-vit-base-patch32 --out runs/removal-b32
    python -m jobs.explain --images photos/ --clip CLIP --sae SAE --method removal --head runs/removal-b32 --out runs/photos

The images need no labels, and the head fits every SAE of the same embedding. All of them are decoded first, and stay in memory,
12 kB each in the demo and 150 kB of 224 pixels. The training saves itself every few minutes: the same command again goes on
there, and ends at the same weights as one that was not interrupted.

Left out: several machines; images that end the process that decodes them (`jobs.explain` finds these).
"""

import copy
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from saecore.images.chunks import count_images, plan_chunks, read_chunk
from saecore.images.listing import Shard, list_shards
from saecore.images.preprocess import Preprocess
from saecore.methods import check_precision, dtype_of
from saecore.pipeline.models import as_far_as
from saecore.pipeline.stages import Decode
from saecore.removal.recipe import Recipe
from saecore.runs.run import listing_hash
from saecore.sae import sites
from saecore.storage import exists, join_uri, names_in, read_bytes, read_json, resolved, write_atomic
from saecore.untrusted import about

from . import collection, commands, console, origin
from .summaries import distill_summary

if TYPE_CHECKING:
    from saecore.removal.distillation import Distillation
    from saecore.removal.head import Head
    from saecore.towers.tower import ImageTower

CHECKPOINT_FILE, RECORD_FILE = "checkpoint.pt", "distill.json"

CHUNK = 512
"""Images that are read at once."""

LINES_EVERY = 10.0
"""Seconds between progress lines."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a head of removal, which predicts what each patch is worth."""

    images: tuple[str, ...]
    """As jobs.explain takes them. Some thousands, such as the images that are to be explained."""
    clip: str
    """CLIP: a Hugging Face id, a folder in transformers format, or `demo`."""
    out: str
    """Folder for the head: a path, or an s3:// or gs:// address. The same command again resumes."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    """How to train."""
    start: str = ""
    """Begin with the weights of this head, a folder or `demo`, which was trained for the same CLIP and has the same size."""
    site: str = "embedding"
    """What the head predicts: the embedding, or layerN.residual:cls for SAEs that read CLS after layer N."""
    limit: int = 20_000
    """Take only the first images, so many. 0 takes all."""
    held_out: int = 16
    """The last of these images, which are not trained on: the head is compared with sampled Shapley values there."""
    held_out_subsets: int = 3840
    """Subsets of patches of each held-out image, for these values: about half as many forwards."""
    precision: str = "auto"
    """Precision of the image tower, as for jobs.explain; with bfloat16 the head is trained in it too."""
    image_column: str = ""
    """The Parquet column that holds the images, if the program cannot guess it."""
    checkpoint_minutes: float = 2.0
    """Minutes between checkpoints."""

    def check(self) -> None:
        """See `commands.Checked.check`."""
        if not self.images:
            raise ValueError("give --images")
        with commands.given_fields(self, self.recipe):
            self.recipe.check()
            check_precision(self.precision)
        with commands.given("--site"):
            sites.check_vectors(self.site)
        if sites.reads_tokens(self.site):
            raise ValueError(f"--site {self.site}: a head is of one vector for each image; name one that ends in :cls")
        commands.at_least(self, limit=0, held_out=2, held_out_subsets=1, checkpoint_minutes=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: distill(sys.argv[1:] if argv is None else list(argv)))


def distill(argv: list[str]) -> int:
    """Check everything, train what is left, and print how good the head is."""
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "distill")
    out = resolved(arguments.out)
    with console.quiet() as log:
        with commands.mistakes():
            tower = load(arguments)
            first = load_first(arguments, tower)
            with commands.given("--images"):
                shards = list_shards(list(arguments.images), say=print)
            parts = parts_of(arguments, shards, tower)
            saved = state_at(out, parts)
            commands.check_writable("--out", out)
        log.run = out
        if exists(join_uri(out, RECORD_FILE)):
            print(f"{arguments.out} is complete: nothing to do")
            record = read_json(join_uri(out, RECORD_FILE))
        else:
            with commands.mistakes(), commands.given_fields(arguments):
                plan = plan_chunks(shards, CHUNK, arguments.limit or None, arguments.image_column or None)
                pixels = decoded(plan, tower.preprocess)
                if len(pixels) < 2 * arguments.held_out:
                    raise ValueError(
                        f"held_out {arguments.held_out}: {len(pixels):,} images are too few to hold out so many"
                    )
            try:
                record = work(arguments, argv, parts, saved, tower, pixels, first)
            except KeyboardInterrupt as error:
                raise commands.UnfinishedError("the same command resumes from the last checkpoint") from error
    print(distill_summary(record, arguments.out))
    return 0


# ---- Before the work.


def load(arguments: Arguments) -> "ImageTower":
    """The tower as far as the site, on its device, in float32; ValueError for one that no head can be trained for."""
    import torch

    from saecore.removal.head import check_tower
    from saecore.towers.loading import load_tower

    clip = collection.address(arguments.clip)
    with commands.given("--clip"):
        whole = load_tower(clip)
        try:
            tower = as_far_as(sites.parse(arguments.site), whole)
            check_tower(tower)
        except ValueError as error:
            raise ValueError(f"{clip}: {error}") from None
    return tower.to("cuda" if torch.cuda.is_available() else "cpu")


def load_first(arguments: Arguments, tower: "ImageTower") -> "Head | None":
    """The head whose weights the training begins with, if there is one; ValueError if it is another tower's, or of another
    size."""
    from saecore.removal.head import check_belongs
    from saecore.removal.saved import load_head

    if not arguments.start:
        return None
    with commands.given("--start"):
        head = load_head(collection.address(arguments.start))
        with about(arguments.start):
            check_belongs(head.config, tower)
            for name in ("width", "blocks"):
                if (held := getattr(head.config, name)) != (asked := getattr(arguments.recipe, name)):
                    raise ValueError(f"its {name} is {held}, and {asked} is asked for")
    return head


def parts_of(arguments: Arguments, shards: Sequence[Shard], tower: "ImageTower") -> dict[str, Any]:
    """What changes the head: a training goes on only with the same."""
    return {
        "recipe": dataclasses.asdict(arguments.recipe),
        "clip": tower.sha256()[:16],
        "site": arguments.site,
        "limit": arguments.limit,
        "held-out": arguments.held_out,
        "dtype": dtype_of(tower.mean.device.type, (), arguments.precision),
        "inputs": listing_hash(shards)[:16],
        "start": arguments.start,
    }


def state_at(out: str, parts: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, None if there is none yet; ValueError if the folder holds something else."""
    import torch

    names = names_in(out)
    if CHECKPOINT_FILE not in names:
        if names:
            raise ValueError(f"--out {out} holds other files and no training of a head; name a new or empty folder")
        return None
    content = io.BytesIO(read_bytes(join_uri(out, CHECKPOINT_FILE)))
    state: dict[str, Any] = torch.load(content, weights_only=True, map_location="cpu")
    if changed := [name for name in parts if state["parts"].get(name) != parts[name]]:
        raise ValueError(
            f"--out {out} holds a head that was trained otherwise ({', '.join(changed)}); name another folder"
        )
    return state


def decoded(plan: pa.Table, preprocess: Preprocess) -> np.ndarray:
    """All images that can be decoded, uint8 (n, height, width, 3)."""
    decode, pixels = Decode(preprocess), []
    progress = console.Progress(count_images(plan), 0, "images")
    for chunk in plan.to_pylist():
        for raw in read_chunk(chunk):
            rows = decode(raw)["pixels"].to_pylist()
            shown = [np.frombuffer(row, np.uint8).reshape(*preprocess.size, 3) for row in rows if row is not None]
            pixels += shown
            progress.add(len(rows), len(rows) - len(shown))
    progress.close()
    return np.stack(pixels) if pixels else np.zeros((0, *preprocess.size, 3), np.uint8)


# ---- The work.


def work(
    arguments: Arguments,
    argv: list[str],
    parts: dict[str, Any],
    saved: dict[str, Any] | None,
    tower: "ImageTower",
    pixels: np.ndarray,
    first: "Head | None" = None,
) -> dict[str, Any]:
    """Train to the end, compare with sampled Shapley values, write the head and its record; returns the record."""
    import torch

    from saecore.relevance.agreement import rank_correlation
    from saecore.removal.distillation import Distillation, held_out
    from saecore.removal.head import Head, config_for, nothing
    from saecore.removal.saved import load_head, save_head

    recipe, out, start = arguments.recipe, resolved(arguments.out), time.monotonic()
    torch.manual_seed(recipe.seed)
    command = commands.called("distill", *argv)
    head = Head(config_for(tower, recipe.width, recipe.blocks, command)).to(tower.mean.device)
    every, teacher = torch.from_numpy(pixels), copy.deepcopy(tower)
    teacher.run_in(getattr(torch, parts["dtype"]))
    course = Distillation(head, teacher, every[: -arguments.held_out], recipe)
    if saved:
        course.load(saved["course"])
    else:
        course.begin(first)
    train(course, lambda: save(out, {"parts": parts, "course": course.state()}), arguments.checkpoint_minutes)
    with torch.no_grad():
        head.empty.copy_(nothing(tower))  # in float32, as maps are
    save_head(head, out)
    kept = load_head(out).to(tower.mean.device)
    compared = held_out(kept, tower, every[-arguments.held_out :].to(tower.mean.device), arguments.held_out_subsets)
    record = {
        "parts": parts,
        "command": command,
        "versions": origin.versions(),
        "git_commit": origin.git_commit(),
        "images": len(pixels) - arguments.held_out,
        "held_out": arguments.held_out,
        "held_out_subsets": arguments.held_out_subsets,
        "seconds": round(time.monotonic() - start, 1),
        "error": compared.error,
        "error_of_sampling": compared.of_sampling,
        "rank_agreement": float(rank_correlation(compared.predicted, compared.sampled).nanmean()),
    }
    write_atomic(join_uri(out, RECORD_FILE), json.dumps(record, indent=2).encode())
    return record


def save(out: str, state: dict[str, Any]) -> None:
    """Write a checkpoint."""
    import torch

    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(join_uri(out, CHECKPOINT_FILE), content.getvalue())


def train(course: "Distillation", save_all: Any, minutes: float) -> None:
    """All steps that are left, with a line and a checkpoint at times."""
    total, began, loss = course.recipe.steps, course.done, 0.0
    start = said = saved = time.monotonic()
    while course.done < total:
        one = course.step()
        loss = one if course.done == began + 1 else 0.98 * loss + 0.02 * one
        now = time.monotonic()
        if now - said >= LINES_EVERY or course.done == total:
            pace, said = (course.done - began) / (now - start), now
            left = int((total - course.done) / pace)
            print(
                f"{course.done:>9,} of {total:,} steps, loss {loss:.4f}, {pace:,.1f} a second, "
                f"{left // 60}:{left % 60:02d} left",
                flush=True,
            )
        if now - saved >= 60 * minutes or course.done == total:
            save_all()
            saved = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())

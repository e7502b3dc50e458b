"""Embed images, or the words of a vocabulary, with CLIP: projected, before any normalisation, float32.

    python -m jobs.embed --images photos/ 'shards/*.tar' --clip openai/clip-vit-large-patch14 --out runs/photos-clip
    python -m jobs.embed --text words.txt --clip openai/clip-vit-large-patch14 --out runs/words-clip

Images take the flow of `jobs.pipeline`, with `saecore.pipeline.stages.Embed` in its replicas, to a run that has only the table
`images`:

    plan -> decode (CPU tasks) -> CLIP, write (replicas) -> progress -> memory map

The memory map of a run, in the form that MSAE's training reads (`saecore.training.memmaps`), has a row for every image that was
not refused, in the order of image_id. Words are few, so they are embedded in this process, to `texts.parquet` and a memory map
in the vocabulary's order.

Left out: resuming in the middle of a vocabulary.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saecore import schema
from saecore.naming.vocabulary import read_vocabulary
from saecore.pipeline.clock import Clock
from saecore.pipeline.config import EmbedConfig, ModelDigests, SiteConfig, at_once
from saecore.pipeline.models import as_far_as, vectors_at
from saecore.pipeline.stages import Embed
from saecore.runs.files import ROW_GROUP_ROWS, parquet_bytes
from saecore.runs.refusals import refusals
from saecore.runs.run import listing_hash, refuse_other
from saecore.sae import sites
from saecore.schema import TEXTS_FILE
from saecore.storage import Place, exists, join_uri, read_parquet, write_atomic
from saecore.training import memmaps
from saecore.training.embeddings import SITE, WIDTH
from saecore.upkeep.lock import Lock

from . import cluster, collection, commands, console, decoding, locks, pipeline
from .hints import after_vectors
from .pool import DEVICES
from .summaries import outline, refused_images, run_summary, vectors_summary

if TYPE_CHECKING:
    from saecore.towers.text import TextTower
    from saecore.towers.tower import ImageTower


MAX_SEED = 2**63 - 1
"""The largest seed: run.json is to be read by programs whose integers have 64 bits."""


@dataclasses.dataclass(frozen=True)
class Arguments(collection.Arguments):
    """Embed images, or the words of a vocabulary, with CLIP.

    Needs --images or --text, --clip and --out.
    """

    text: str = ""
    """Embed this vocabulary, one word a line, instead of images; in this process, without Ray. --limit counts words."""
    templates: tuple[str, ...] = ("{}",)
    """With --text: texts into which each word is put, at {}. Several give the mean of their L2-normalised embeddings."""
    site: str = "embedding"
    """What is written of images: the embedding, or vectors inside the tower to train an SAE on. layerN.residual:cls is the
    residual stream of CLS after layer N, counted from 0; layerN.residual:patches and layerN.residual:all those of tokens."""
    tokens_per_image: int = 0
    """With a site of tokens: how many are drawn of each image. 0 takes all."""
    seed: int = 0
    """Seed of these draws."""
    dataset: str = ""
    """First field of the memory map's file name. The default is the name of the out folder or of the vocabulary."""
    split: str = "train"
    """Third field of the memory map's file name, for images."""
    no_npy: bool = False
    """Write no memory map, only Parquet."""

    def check(self) -> None:
        """See `collection.Arguments.check`."""
        if bool(self.images) == bool(self.text):
            raise ValueError("give either --images or --text")
        if not self.clip:
            raise ValueError("give --clip")
        commands.check_templates(self.templates)
        if self.text and self.site != "embedding":
            raise ValueError("--site is for --images")
        with commands.given("--site"):
            sites.check_vectors(self.site)
        commands.at_least(self, tokens_per_image=0, seed=0)
        if self.seed > MAX_SEED:
            raise ValueError(f"--seed {self.seed}: must be at most {MAX_SEED}")
        if self.tokens_per_image and not sites.reads_tokens(self.site):
            raise ValueError(
                f"--tokens-per-image {self.tokens_per_image}: --site {self.site} has one vector for each image"
            )
        if self.seed and not self.tokens_per_image:
            raise ValueError(f"--seed {self.seed}: seeds the draw of --tokens-per-image, which is not given")
        if self.site != "embedding" and (self.dataset or self.split != "train"):
            name = "dataset" if self.dataset else "split"
            raise ValueError(
                f"--{name} {getattr(self, name)}: is part of the name of a memory map, and vectors inside the tower get none"
            )
        if self.templates != ("{}",) and not self.text:
            raise ValueError("--templates is for --text")
        if self.text and self.precision == "bfloat16":
            raise ValueError("--precision bfloat16 is for images: the text tower runs in float32")
        for field in ("dataset", "split"):
            if "/" in getattr(self, field):
                raise ValueError(
                    f"--{field} {getattr(self, field)}: becomes part of a file's name, so it must have no /"
                )
        super().check()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: embed(sys.argv[1:] if argv is None else list(argv)))


def embed(argv: list[str]) -> int:
    """Check everything, run what is pending, and print the results."""
    clock = Clock()
    with commands.mistakes():
        arguments = commands.parse(Arguments, argv, "embed")
    pipeline.share_cores()
    with console.quiet() as log, contextlib.ExitStack() as locked:
        if arguments.text:
            return embed_vocabulary(arguments)
        with commands.mistakes():
            job = prepare(arguments, argv, locked)
        if job is None:
            return 0
        log.run = job.run.uri
        worked = pipeline.complete(job, arguments, clock)
        record = job.run.record()
        shape = record.images - record.n_refused, record.n_outputs
        if arguments.site == "embedding":
            rows = memmaps.image_rows(job.run.uri)
            said = write_memory_map(arguments, record.clip, arguments.split, "image", shape, rows)
        else:
            said = vectors_summary(record)
        if worked:
            record = pipeline.close(job, clock)
    print(run_summary(arguments.out, record))
    if record.n_refused:
        print(refused_images(arguments.out, refusals(job.run), is_explained=False))
    print(said)
    if record.embedded_site:
        commands.propose(after_vectors(arguments.out))
    return collection.judged(arguments, record)


def prepare(arguments: Arguments, argv: list[str], locked: contextlib.ExitStack | None = None) -> pipeline.Job | None:
    """A job from its arguments, or None after --dry-run; ValueError for what the user can mend.

    The lock of the run folder goes into `locked`; without it the folder is not locked.
    """
    from saecore.towers.loading import load_tower

    collection.check_outside(arguments)
    clip = collection.address(arguments.clip)
    with commands.given("--clip"):
        tower = load_tower(clip)
    at, config = configure(arguments, clip, tower)
    inputs = collection.Inputs(arguments, arguments.images)
    digests = ModelDigests(tower.sha256()[:16])

    def parts_on(device: str) -> dict[str, Any]:
        on = dataclasses.replace(config, device=device)
        return {"kind": "embed"} | collection.fingerprint_parts(inputs, on, digests)

    if not arguments.dry_run:
        collection.check_run(inputs, list(map(parts_on, DEVICES)))
    pool = collection.make_pool(arguments, inputs, tower.preprocess.bytes)
    config, parts = dataclasses.replace(config, device=pool.device, threads=pool.threads), parts_on(pool.device)
    tags, makes = {"clip": clip, "clip_sha256": parts["clip"]}, {"n_outputs": at.n_outputs}
    each = "image"
    if isinstance(config, SiteConfig):
        makes["n_vectors"] = config.tokens_per_image or vectors_at(sites.parse(config.site), at)
        tags |= {SITE.decode(): config.site, WIDTH.decode(): str(at.n_outputs)}
        each = f"vector of {config.site}, {makes['n_vectors']} per image"
    if arguments.dry_run:
        how = [f"with CLIP {clip}, {at.n_outputs} numbers per {each}"]
        print(outline(inputs.plan, "embed", arguments.out, how))
        return None
    made_by = collection.made_by("embed", argv, config, inputs, pool) | makes
    lock = Lock() if locked is None else locked.enter_context(locks.held("--out", arguments.out, "embed"))
    run = collection.begin_run(inputs, parts, made_by)
    decode = decoding.decoder(arguments, tower.preprocess, inputs.run)
    return pipeline.Job(run, decode, functools.partial(Embed, config), tags, pool, lock)


def configure(arguments: Arguments, clip: str, tower: "ImageTower") -> "tuple[ImageTower, EmbedConfig]":
    """The tower as far as the site, and the configuration of the replicas, without their device.

    ValueError if the model lacks the site, or so many tokens.
    """
    how: dict[str, Any] = {"clip": clip, "batch_size": arguments.batch_size, "precision": arguments.precision}
    site = sites.parse(arguments.site)
    if site.layer is None:
        return tower, EmbedConfig(**how)
    try:
        at = as_far_as(site, tower)
    except ValueError as error:
        raise ValueError(f"--site {site}, which the model {clip} does not have: {error}") from None
    if arguments.tokens_per_image > (n_tokens := vectors_at(site, at)):
        raise ValueError(f"--tokens-per-image {arguments.tokens_per_image}: an image has {n_tokens} there")
    return at, SiteConfig(**how, site=str(site), tokens_per_image=arguments.tokens_per_image, seed=arguments.seed)


def embed_vocabulary(arguments: Arguments) -> int:
    """Embed a vocabulary to `texts.parquet` and its memory map; the same command again does nothing."""
    from saecore.towers.loading import load_text_tower  # slow: PyTorch comes with it

    with commands.mistakes():
        with commands.given("--text"):
            vocabulary = read_vocabulary(arguments.text)
        words = vocabulary.words[: arguments.limit or None]
        clip = collection.address(arguments.clip)
        with commands.given("--clip"):
            tower = load_text_tower(clip)
        device = cluster.here(arguments.gpus_per_replica).device
        parts = {
            "kind": "texts",
            "schema": schema.VERSION,
            "clip": tower.sha256()[:16],
            "templates": list(arguments.templates),
            "words": f"{len(words)}, {listing_hash(zip(words, strict=True))[:16]}",
        }
        done = holds_texts(arguments.out, parts)
        if not (done or arguments.dry_run):
            commands.check_writable("--out", arguments.out)
    print(f"{len(words):,} words; dropped: {vocabulary.blank:,} blank lines, {vocabulary.repeated:,} repeated words")
    if arguments.dry_run:
        print(f"would embed them in {len(arguments.templates)} templates into {arguments.out}\nwith CLIP {clip}")
        return 0
    if done:
        print(f"{arguments.out} is complete: nothing to do")
    else:
        tags = {"clip": clip, "clip_sha256": parts["clip"], "templates": json.dumps(arguments.templates)}
        table = texts(tower, words, arguments, device).replace_schema_metadata(tags | {"parts": json.dumps(parts)})
        address = join_uri(arguments.out, TEXTS_FILE)
        write_atomic(address, parquet_bytes(table, ROW_GROUP_ROWS["images"]))
    shape = len(words), tower.n_outputs
    stored = stored_texts(arguments.out)["embedding"].combine_chunks().flatten().to_numpy().reshape(shape)
    print(f"on disk       {TEXTS_FILE} in {arguments.out}")
    print(write_memory_map(arguments, clip, "-1", "text", shape, [stored]))
    return 0


def texts(tower: "TextTower", words: list[str], arguments: Arguments, device: str) -> pa.Table:
    """schema.TEXTS, with a progress line. Prints how many texts were cut."""
    from saecore.towers.text import embed_words

    size, templates = at_once(arguments.batch_size, device), arguments.templates
    progress = console.Progress(len(words), 0, "words")
    blocks, n_cut = [], 0
    for start in range(0, len(words), size):
        block = words[start : start + size]
        blocks.append(embed_words(tower, block, templates, size, device))
        n_cut += tower.too_long([template.replace("{}", word) for word in block for template in templates])
        progress.add(len(block), 0)
    progress.close()
    if n_cut:
        print(f"{n_cut:,} texts are longer than the {tower.n_tokens} tokens of this CLIP, and were cut there")
    embeddings = pa.array(np.concatenate(blocks).ravel())
    ends = pa.array(np.arange(len(words) + 1) * tower.n_outputs, pa.int32())
    lists = pa.ListArray.from_arrays(ends, embeddings, type=schema.TEXTS.field("embedding").type)
    return pa.Table.from_arrays([pa.array(words, pa.string()), lists], schema=schema.TEXTS)


def holds_texts(out: str, parts: dict[str, Any]) -> bool:
    """Whether `out` already holds these texts; ValueError if it holds others, or a run over images."""
    if exists(join_uri(out, "run.json")):
        raise ValueError(f"--out {out} holds a run over images; name another folder for words")
    if not exists(join_uri(out, TEXTS_FILE)):
        return False
    with commands.given("--out"):
        refuse_other(out, json.loads((stored_texts(out).schema.metadata or {}).get(b"parts", b"{}")), parts)
    return True


def stored_texts(out: str) -> pa.Table:
    """The table texts.parquet."""
    return read_parquet(join_uri(out, TEXTS_FILE))


def write_memory_map(
    arguments: Arguments, clip: str, split: str, kind: str, shape: tuple[int, int], rows: Iterable[np.ndarray]
) -> str:
    """Write the memory map into the out folder, unless it is there; returns the line that says so."""
    place = Place(arguments.out)
    if arguments.no_npy:
        return "memory map    none, as --no-npy asks"
    if not place.is_local:
        return f"memory map    none: {arguments.out} is no local folder, and only local files can be mapped"
    if not shape[0]:
        return "memory map    none: every image was refused"
    dataset = arguments.dataset or (Path(arguments.text).stem if arguments.text else Path(place.path).name)
    target = Path(place.path, memmaps.file_name(dataset, clip, split, kind, shape))
    if not target.exists():
        memmaps.write(target, rows, shape)
    return f"memory map    {target.name}: raw float32 {shape[0]:,} x {shape[1]:,}, no npy header"


if __name__ == "__main__":
    sys.exit(main())

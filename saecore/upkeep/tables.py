"""What the rows of one chunk must be: the columns, each planned image once, and the same number of rows for every good image.

Everything here works on tables in memory and reads no file.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore import numbering, schema
from saecore.runs.record import Record


class Content(NamedTuple):
    """What the rows of a chunk come to."""

    wrong: list[tuple[str, str]]
    """The tables whose rows are wrong, and what is wrong with them."""
    digest: int = 0
    """`digest` of its activations."""
    fires: np.ndarray | None = None
    """For how many of its images each latent fires."""


NOTHING = Content([])


def overlaps(plan: pa.Table) -> int | None:
    """The first chunk of a plan that has an image of another one; None if each image is planned once."""
    if "only" in plan.column_names:
        ids, seen = [numbering.ids_of(row) for row in plan.to_pylist()], set[int]()
        for chunk_id, own in zip(plan["chunk_id"].to_pylist(), ids, strict=True):
            if len(set(own.tolist()) - seen) < len(own):
                return int(chunk_id)
            seen.update(own.tolist())
        return None
    ordered = plan.select(["chunk_id", "shard_id", "start", "end"]).sort_by(
        [("shard_id", "ascending"), ("start", "ascending")]
    )
    chunk, shard, start, end = (ordered[name].to_numpy() for name in ordered.column_names)
    twice = np.flatnonzero((shard[1:] == shard[:-1]) & (start[1:] < end[:-1]))
    return int(chunk[1:][twice[0]]) if len(twice) else None


def wrong_form(file: Mapping[str, Any], table: pa.Table, record: Record) -> str:
    """What is wrong with the form of a chunk's table; empty if columns, fingerprint and number of rows are as written."""
    height, width = record.grid
    expected = {
        "images": schema.TOKEN_IMAGES if record.embeds_tokens else schema.IMAGES,
        "activations": schema.activations_schema(record.reads_tokens),
        "maps": schema.maps_schema(height * width or 1, record.reads_tokens, record.samples),
        "faithfulness": schema.FAITHFULNESS,
        "curves": schema.CURVES,
    }
    if table.schema.remove_metadata() != expected.get(file["table"]):
        return "has other columns than the schema of its table"
    if (table.schema.metadata or {}).get(b"fingerprint") != record.fingerprint.encode():
        return "carries the fingerprint of another run"
    if table.num_rows != file["rows"]:
        return f"has {table.num_rows:,} rows, and {file['rows']:,} were written"
    return ""


def check(held: Mapping[str, pa.Table], ids: np.ndarray, refused: Mapping[str, int], record: Record) -> Content:
    """The rows of a chunk's tables, against the ids of its planned images and the counts of its commit."""
    images, wrong = held["images"], list[tuple[str, str]]()
    written = images["image_id"].to_numpy()
    if not np.array_equal(written, ids):
        missing, twice = np.setdiff1d(ids, written), len(written) - len(np.unique(written))
        said = f"{len(missing):,} planned images are missing, {twice:,} are there twice"
        wrong.append(("images", f"does not have each planned image once and in order: {said}"))
    counted = Counter(error for error in images["error"].to_pylist() if error is not None)
    if counted != Counter(refused):
        wrong.append(("images", f"refuses {dict(counted)}, and its commit says {dict(refused)}"))
    good = images["image_id"].filter(pc.is_null(images["error"])).to_numpy()
    if "activations" not in held:
        return Content(wrong)
    activations = held["activations"]
    k = record.parts.get("k")
    if said := _per_image(activations, good, k):
        wrong.append(("activations", said))
    latents = activations["latent"].to_numpy()
    if len(latents) and not 0 <= latents.min() <= latents.max() < record.n_latents:
        wrong.append(("activations", f"names latents that are none of 0 to {record.n_latents - 1}"))
        return Content(wrong)
    if "maps" in held:
        fewer = _kept_and_asked(activations, good, record)
        if said := _per_image(held["maps"], good, fewer=fewer) or _of_methods(held["maps"]):
            wrong.append(("maps", said))
    fired = latents[activations["activation"].to_numpy() != 0]
    return Content(wrong, digest(activations), np.bincount(fired, minlength=record.n_latents))


def _kept_and_asked(activations: pa.Table, good: np.ndarray, record: Record) -> np.ndarray:
    """How many maps each good image has fewer than one whose kept latents were not asked for by number: such a latent has one
    map by each method, not two."""
    kept, asked, *_ = record.config.get("targets") or (False, ())
    latents, images = activations["latent"].to_numpy(), activations["image_id"].to_numpy()
    twice = images[np.isin(latents, np.array(asked if kept else (), np.int64)) & np.isin(images, good)]
    return len(record.methods) * np.bincount(np.searchsorted(good, twice), minlength=len(good))


def _per_image(table: pa.Table, good: np.ndarray, each: int | None = None, fewer: np.ndarray | None = None) -> str:
    """What is wrong with the number of rows of each image; empty if all good images have the same, and refused ones none.

    `fewer`: how many of them each good image may lack.
    """
    ids, counts = np.unique(table["image_id"].to_numpy(), return_counts=True)
    if foreign := len(np.setdiff1d(ids, good)):
        return f"has rows of {foreign:,} images that were refused or are not planned"
    if lacking := len(good) - len(ids):
        return f"has no rows of {lacking:,} images"
    counts = counts if fewer is None else counts + fewer
    expected = each or (int(counts[0]) if len(counts) else 0)
    if uneven := int((counts != expected).sum()):
        return f"has another number of rows than {expected} for {uneven:,} images"
    if "rank" in table.column_names:
        ranks = table["rank"].to_numpy().reshape(-1, expected) if len(counts) else np.zeros((0, 0))
        if (ranks != np.arange(ranks.shape[1])).any():
            return f"does not have the ranks 0 to {expected - 1} for each image, in order"
    return ""


def _of_methods(maps: pa.Table) -> str:
    """What is wrong with the targets and methods; empty if each target of each image has one map by each method of the run."""
    methods = (maps.schema.metadata or {}).get(b"methods", b"").decode().split(",")
    by = ["image_id", "latent", "target", "method"]
    if maps.group_by(by).aggregate([]).num_rows != maps.num_rows:
        return "has maps twice"
    counts = maps.group_by("method").aggregate([([], "count_all")])
    counted = dict(zip(counts["method"].to_pylist(), counts["count_all"].to_pylist(), strict=True))
    if counted and (counted.keys() != set(methods) or len(set(counted.values())) > 1):
        return f"does not have each map by each method of {', '.join(methods)}"
    return ""


def digest(activations: pa.Table | pa.RecordBatch) -> int:
    """A hash of the rows that does not depend on their order: the sum of a hash of each row, modulo 2^64."""
    rows = activations["image_id"].to_numpy().astype(np.uint64)
    strength = np.ascontiguousarray(activations["activation"].to_numpy(zero_copy_only=False)).view(np.uint32)
    with np.errstate(over="ignore"):
        for column in (activations["latent"].to_numpy(), strength):
            # The finaliser of SplitMix64 between the columns, so that swapped values do not cancel out.
            rows = (rows ^ (rows >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            rows = (rows ^ (rows >> np.uint64(27))) * np.uint64(0x94D049BB133111EB) + column.astype(np.uint64)
        rows = (rows ^ (rows >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        return int(rows.sum(dtype=np.uint64))

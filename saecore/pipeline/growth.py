"""Grow a plan: the shards that a listing has and the plan has not, cut into chunks and put after the chunks of the plan.

    groups_of(plan) -> list_shards(.., groups=..) -> divide -> grown

Rows of the plan stay as they are, so every image keeps its number and every chunk its id. New shards get the numbers after the
largest of the plan, in the order of the listing. Image files that were put into a folder of the plan make shards of their own,
since the shards of the plan name their files. The metadata of the plan lists each growth. The plan is one file: either it has
grown, and tells how, or it has not.

Left out: images that were added to a tar or to a Parquet file of the plan. Such a shard has changed (`saecore.images.changes`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from saecore.images.chunks import count_images, empty_shards, plan_chunks, with_empty_shards
from saecore.images.listing import Shard
from saecore.numbering import MOST_SHARDS
from saecore.schema import GROWTHS, growths_of
from saecore.storage import join_uri


class Divided(NamedTuple):
    """A listing, divided by what a plan knows."""

    known: list[Shard]
    new: list[Shard]


def groups_of(plan: pa.Table) -> dict[str, int]:
    """The addresses of a plan's loose image files, each with the number of its shard."""
    loose = plan.filter(pc.is_valid(plan["members"])).select(["uri", "shard_id", "members"])
    return {join_uri(row["uri"], name): row["shard_id"] for row in loose.to_pylist() for name in row["members"]}


def divide(plan: pa.Table, shards: Iterable[Shard], groups: Mapping[str, int]) -> Divided:
    """The shards of a listing that was made with the `groups` of a plan: those that the plan knows, and the others."""
    known = {*pc.unique(plan["uri"]).to_pylist(), *empty_shards(plan)}
    divided = Divided([], [])
    for shard in shards:
        is_known = shard.uri in known if shard.members is None else join_uri(shard.uri, shard.members[0]) in groups
        (divided.known if is_known else divided.new).append(shard)
    return divided


def new_chunks(
    plan: pa.Table, shards: Sequence[Shard], chunk_size: int = 512, image_column: str | None = None
) -> pa.Table:
    """The chunks of shards that come after a plan, see `saecore.images.chunks.plan_chunks`."""
    chunks = plan_chunks(shards, chunk_size, image_column=image_column)
    for name in ("chunk_id", "shard_id"):
        after = (pc.max(plan[name]).as_py() or 0) + 1 if plan.num_rows else 0
        place = chunks.schema.get_field_index(name)
        chunks = chunks.set_column(place, chunks.schema.field(name), pc.add(chunks[name], after))
    assert not chunks.num_rows or pc.max(chunks["shard_id"]).as_py() < MOST_SHARDS, "more shards than numbers"
    return chunks


def grown(plan: pa.Table, chunks: pa.Table, about: Mapping[str, Any]) -> pa.Table:
    """A plan with the chunks that come after it. Its metadata then tells `about` this growth, and what it added."""
    added = {
        "shards": len(pc.unique(chunks["shard_id"])),
        "chunks": chunks.num_rows,
        "images": count_images(chunks),
        "first_chunk": pc.min(chunks["chunk_id"]).as_py(),
    }
    whole = pa.concat_tables([plan.replace_schema_metadata(), chunks.replace_schema_metadata()]).combine_chunks()
    whole = with_empty_shards(whole, [*empty_shards(plan), *empty_shards(chunks)])
    told = json.dumps([*growths_of(plan), {**about, **added}])
    return whole.replace_schema_metadata({**whole.schema.metadata, GROWTHS: told})

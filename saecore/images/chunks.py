"""Shards of images: cut them into chunks, and read the images of a chunk.

    Shard -> plan_chunks -> PLAN rows -> read_chunk -> RAW tables        (schemas in `saecore.schema`)

Chunks of a shard are read in parallel. Those of a compressed tar are too, but each decompresses all that lies before it: a
large `.tar.gz` with many chunks is slow and should be unpacked first. Every image gets one row; a damaged one has a reason:

    truncated       the shard ends inside the image
    no-data         a null in Parquet
    unreadable      its place in the Parquet file is damaged, or its file may not be read
    missing-file    its file is gone since the plan was made
    too-large       more than `MAX_IMAGE_BYTES` encoded
    damaged-shard   the rest of the shard cannot be read, and what it held is not known: one row at its end stands for it

Bad data becomes rows. Storage that fails (network, disk, a whole folder gone) raises, so that the chunk is tried again
and never written as if its images were at fault.
"""

import functools
import json
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.fs

from saecore import numbering, schema
from saecore.images import parquet, tar
from saecore.images.items import Item, Scan, read_item
from saecore.images.listing import Shard
from saecore.storage import Place, ReadError

SCANNERS = 16
"""Threads that scan shards for the plan: on an object store each waits for a round trip per member."""

ROWS = 4096
"""Rows of a plan that are held as Python objects, which take 20 times more than Arrow's. A table for each shard takes 11 KB."""

_EMPTY = b"empty_shards"
"""The key of a plan's metadata under which the shards without images are listed."""


# ---- Planning.


def plan_chunks(
    shards: Sequence[Shard], chunk_size: int = 512, limit: int | None = None, image_column: str | None = None
) -> pa.Table:
    """Cut every shard into chunks of at most `chunk_size` images, in order: a table of schema.PLAN.

    Tars are scanned header by header, seeking over the images (compressed ones are read through once); Parquet files by
    their footers. `limit` stops after so many images; `image_column` is the Parquet column that holds them. ValueError if there
    is no such column, or if none is named and it is not plain which one it is.
    """
    tables, rows, empty = [schema.PLAN.empty_table()], list[dict[str, Any]](), list[str]()
    chunk_id, remaining = 0, limit
    with ThreadPoolExecutor(SCANNERS) as pool:
        scan = functools.partial(_scan, chunk_size=chunk_size, image_column=image_column)
        # With a limit, one after the other: a few images of a huge collection should not wait for a scan of all of it.
        scans = pool.map(scan, shards) if limit is None else map(scan, shards)
        for shard_id, (shard, scanned) in enumerate(zip(shards, scans, strict=True)):
            total = _rows_of(scanned)
            assert total < numbering.MOST_IMAGES, f"{shard.uri}: {total} images"
            planned = total if remaining is None else min(total, remaining)
            chunks = [
                {"chunk_id": chunk_id + number, "shard_id": shard_id}
                | _chunk(shard, scanned, number, start, min(start + chunk_size, planned))
                for number, start in enumerate(range(0, planned, chunk_size))
            ]
            rows += chunks
            chunk_id += len(chunks)
            if len(rows) >= ROWS:
                tables.append(pa.Table.from_pylist(rows, schema=schema.PLAN))
                rows = []
            empty += [] if total else [shard.uri]
            remaining = None if remaining is None else remaining - planned
            if remaining == 0:
                break
    tables.append(pa.Table.from_pylist(rows, schema=schema.PLAN))
    return with_empty_shards(pa.concat_tables(tables).combine_chunks(), empty)


def count_images(plan: pa.Table) -> int:
    """The images of some chunks: all rows of a plan, or a part of them."""
    return int(numbering.lengths(plan).sum())


def empty_shards(plan: pa.Table) -> list[str]:
    """The shards without images, which therefore have no chunk; empty for a plan of versions that did not list them."""
    return json.loads((plan.schema.metadata or {}).get(_EMPTY, b"[]"))


def with_empty_shards(plan: pa.Table, shards: Sequence[str]) -> pa.Table:
    """A plan whose metadata lists these shards, in place of other metadata."""
    return plan.replace_schema_metadata({_EMPTY: json.dumps(shards)})


def _rows_of(scanned: Scan) -> int:
    """How many rows a shard gets: one for each image, and one for damage."""
    return scanned.images + (scanned.damage is not None)


def _chunk(shard: Shard, scanned: Scan, number: int, start: int, end: int) -> dict[str, Any]:
    """A PLAN row without its ids: chunk `number` of a shard, with the images from `start` up to `end`."""
    return {
        "uri": shard.uri,
        "kind": shard.kind,
        "start": start,
        "end": end,
        "bytes": shard.bytes,
        "mtime_ns": shard.mtime_ns,
        "offset": scanned.offsets[number] if number < len(scanned.offsets) else None,
        "members": shard.members[start:end] if shard.members is not None else None,
        "column": scanned.column,
        "damage": scanned.damage if end == _rows_of(scanned) else None,
    }


def _scan(shard: Shard, chunk_size: int, image_column: str | None) -> Scan:
    if shard.members is not None:
        return Scan(len(shard.members), [], None, None)
    place = Place(shard.uri)
    try:
        with place.open() as file:
            if shard.kind == "parquet":
                return parquet.scan(shard.uri, file, image_column)
            return tar.scan(file, tar.read_ahead(place.is_local, whole=False), chunk_size)
    except (FileNotFoundError, PermissionError) as error:
        return Scan(0, [], None, f"cannot be opened: {error}")


# ---- Reading.


def read_chunk(
    chunk: Mapping[str, Any], batch_bytes: int = 64 << 20, indices: Collection[int] | None = None
) -> Iterator[pa.Table]:
    """The images of a PLAN row, as RAW tables of about `batch_bytes` each: end - start rows in all, in order.

    `indices` asks for some of them, by their places in the shard. What lies between those is not read from a folder or a local
    tar, and what comes after the last of them is not read from any shard.
    """
    wanted = range(chunk["start"], chunk["end"]) if indices is None else sorted(set(indices))
    batch: list[dict[str, Any]] = []
    size = 0
    for index, item in _items(chunk, wanted, whole=indices is None):
        batch.append(
            {
                "image_id": numbering.id_of(chunk["shard_id"], index),
                "uri": chunk["uri"],
                "key": item.key,
                "data": item.data,
                "error": item.error,
                "error_detail": item.detail,
            }
        )
        size += len(item.data or b"")
        if size >= batch_bytes:
            yield pa.Table.from_pylist(batch, schema=schema.RAW)
            batch, size = [], 0
    if batch:
        yield pa.Table.from_pylist(batch, schema=schema.RAW)


def _items(chunk: Mapping[str, Any], wanted: Sequence[int], whole: bool) -> Iterator[tuple[int, Item]]:
    """An item for each of the wanted places, in order; where the reader stops, the others are lost."""
    n_read = 0
    if wanted:
        for index, item in (
            _read_folder(chunk, wanted) if chunk["kind"] == "folder" else _read_file(chunk, wanted, whole)
        ):
            yield index, item
            n_read += 1
    detail = chunk["damage"] or "the shard ends before the plan says so: it has changed, or was damaged since"
    for index in wanted[n_read:]:
        yield index, Item("", None, "damaged-shard", detail)


def _read_file(chunk: Mapping[str, Any], wanted: Sequence[int], whole: bool) -> Iterator[tuple[int, Item]]:
    if chunk["offset"] is None and chunk["column"] is None:
        return  # the chunk holds no image, only the row for damage
    place = Place(chunk["uri"])
    try:
        file = place.open()
    except FileNotFoundError as error:
        _check_folder(place, place.path, error)
        return
    with file:
        if chunk["kind"] == "parquet":
            yield from parquet.read(file, chunk["column"], wanted)
        else:
            ahead = tar.read_ahead(place.is_local, whole)
            yield from tar.read(file, ahead, chunk["offset"], chunk["start"], wanted)


def _read_folder(chunk: Mapping[str, Any], wanted: Sequence[int]) -> Iterator[tuple[int, Item]]:
    place = Place(chunk["uri"])
    for index in wanted:
        name = chunk["members"][index - chunk["start"]]
        path = f"{place.path.rstrip('/')}/{name}"
        try:
            with place.open(path) as file:
                item = read_item(name, file.size(), file.read)
        except FileNotFoundError as error:
            _check_folder(place, path, error)
            item = Item(name, None, "missing-file", str(error))
        except PermissionError as error:  # of a local file; object stores report theirs as OSError, for all alike
            item = Item(name, None, "unreadable", str(error))
        yield index, item


def _check_folder(place: Place, path: str, error: FileNotFoundError) -> None:
    """`ReadError` if the folder of a missing file is missing too.

    One file that vanished is data; a whole folder is a disk that is not mounted, or a bucket out of reach.
    """
    folder = posixpath.dirname(path)
    if place.info(folder).type == pyarrow.fs.FileType.NotFound:
        raise ReadError(f"{path} cannot be read: neither the file nor its folder {folder} is there") from error

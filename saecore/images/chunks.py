"""Shards of images: cut them into chunks, read a chunk as a stream.

    list_shards -> Shard -> plan_chunks -> PLAN rows -> read_chunk -> RAW tables        (schemas in `saecore.schema`)

A tar's chunks are read in parallel, each by one seek; those of a compressed tar too, but each decompresses all that lies
before it: many chunks of a large `.tar.gz` are slow, and it should be unpacked first. What is an image in a tar goes by
`saecore.images.listing`. Every image gets one row, damaged ones with a reason:

    truncated       the shard ends inside the image
    no-data         a null in Parquet
    unreadable      its place in the Parquet file is damaged; a file that may not be read
    missing-file    gone since the plan
    too-large       more than `MAX_IMAGE_BYTES` encoded
    damaged-shard   what the shard held from here on cannot be known or read: one row, at the shard's end, stands for it

Bad data becomes rows. Storage that fails (network, disk, a whole folder gone) raises, so that the chunk is tried again
and never written as if its images were at fault.
"""

import functools
import gzip
import io
import itertools
import json
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from saecore import numbering, schema
from saecore.images.columns import image_column, key_column
from saecore.images.listing import EXTENSIONS, Shard, extension, is_hidden
from saecore.storage import Place

MAX_IMAGE_BYTES = 1 << 30
"""Encoded bytes above which an image is not read: far more than any picture of the pixels allowed."""

SCANNERS = 16
"""Threads that scan shards for the plan: on an object store one waits for a round trip per member."""

READ_AHEAD = 1 << 20
"""Bytes fetched at once: small enough to waste little, large enough that an object store is not asked per member."""

HEADER_AHEAD = 4096
"""The same for the scan of a local tar, which reads headers and nothing else."""

TRAILER_BYTES = 64 << 10
"""Where a second archive would begin that was appended to the first: tar pads its end to 10 KiB."""

PARQUET_ROWS = 16
"""Rows decoded at once: an image can be many megabytes."""

# What bytes that are no tar, or no gzip, end in: found by flipping bits. Other OSErrors come from the storage.
_BROKEN_TAR = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, OverflowError)

_EMPTY = b"empty_shards"
"""Where a plan's metadata notes the shards without images."""


class _Cut(NamedTuple):
    """What a scan finds out about a shard."""

    images: int
    offsets: list[int]
    """Tar: where the first member of each chunk begins, in uncompressed bytes."""
    column: str | None
    damage: str | None


# ---- Planning.


def plan_chunks(
    shards: Sequence[Shard], chunk_size: int = 512, limit: int | None = None, column: str | None = None
) -> pa.Table:
    """Cut every shard into chunks of at most `chunk_size` images, in order: a table of schema.PLAN.

    Tars are scanned header by header, seeking over the images (compressed ones are read through once); Parquet files by
    their footers. `limit` stops after so many images; `column` is the Parquet column that holds them. ValueError if that
    column is not there or, unnamed, not plain.
    """
    tables, empty = [schema.PLAN.empty_table()], list[str]()
    chunk_id, left = 0, limit
    with ThreadPoolExecutor(SCANNERS) as pool:
        scan = functools.partial(_scan, chunk_size=chunk_size, column=column)
        # With a limit, one after the other: a few images of a huge collection should not wait for a scan of all of it.
        for shard_id, cut in enumerate(pool.map(scan, shards) if limit is None else map(scan, shards)):
            shard = shards[shard_id]
            total = cut.images + (cut.damage is not None)
            assert total < numbering.MOST_IMAGES, f"{shard.uri}: {total} images"
            wanted = total if left is None else min(total, left)
            rows: list[dict[str, Any]] = []
            for number, start in enumerate(range(0, wanted, chunk_size)):
                end = min(start + chunk_size, wanted)
                rows.append(
                    {
                        "chunk_id": chunk_id + number,
                        "shard_id": shard_id,
                        "uri": shard.uri,
                        "kind": shard.kind,
                        "start": start,
                        "end": end,
                        "bytes": shard.bytes,
                        "mtime_ns": shard.mtime_ns,
                        "offset": cut.offsets[number] if number < len(cut.offsets) else None,
                        "members": shard.members[start:end] if shard.members is not None else None,
                        "column": cut.column,
                        "damage": cut.damage if end == total else None,
                    }
                )
            tables.append(
                pa.Table.from_pylist(rows, schema=schema.PLAN)
            )  # Arrow at once: Python objects take 20 times more
            chunk_id += len(rows)
            empty += [] if total else [shard.uri]
            left = None if left is None else left - wanted
            if left == 0:
                break
    return pa.concat_tables(tables).combine_chunks().replace_schema_metadata({_EMPTY: json.dumps(empty)})


def empty_shards(plan: pa.Table) -> list[str]:
    """Shards in which a plan found no image, so that they have no chunk; of a plan before these were noted, none."""
    return json.loads((plan.schema.metadata or {}).get(_EMPTY, b"[]"))


def _scan(shard: Shard, chunk_size: int, column: str | None) -> _Cut:
    if shard.members is not None:
        return _Cut(len(shard.members), [], None, None)
    place = Place(shard.uri)
    ahead = HEADER_AHEAD if place.is_local else READ_AHEAD
    try:
        with place.open() as file:
            return (
                _scan_parquet(shard.uri, file, column)
                if shard.kind == "parquet"
                else _scan_tar(file, ahead, chunk_size)
            )
    except (FileNotFoundError, PermissionError) as error:
        return _Cut(0, [], None, f"cannot be opened: {error}")


def _scan_tar(file: pa.NativeFile, ahead: int, chunk_size: int) -> _Cut:
    images, offsets = 0, []
    damage: str | None
    try:
        stream = _uncompressed(file, ahead)
        tar = _tar(stream)
        for member in _images(tar):
            if images % chunk_size == 0:
                offsets.append(member.offset)
            images += 1
        # tarfile stops without a word at a header it cannot read, at the end of the file, and at the zeros that end an
        # archive; only the last is an end that nothing is missing behind.
        stream.seek(tar.offset)
        trailer = stream.read(TRAILER_BYTES)
        at = f"at byte {tar.offset}"
        if not trailer:
            damage = f"the file ends without an end of the archive {at}"
        elif trailer[: tarfile.BLOCKSIZE].strip(b"\0"):
            damage = f"unreadable tar header {at}"
        else:
            damage = f"another archive or other data behind the end {at}" if trailer.strip(b"\0") else None
    except _BROKEN_TAR as error:
        damage = f"{type(error).__name__}: {error}"
    return _Cut(images, offsets, None, damage)


def _scan_parquet(uri: str, file: pa.NativeFile, column: str | None) -> _Cut:
    watched = _Watched(file)
    try:
        parquet = pq.ParquetFile(watched)
    except (OSError, pa.ArrowException) as error:
        if watched.failed:
            raise
        return _Cut(0, [], None, f"not a Parquet file: {' '.join(str(error).split())}")
    return _Cut(parquet.metadata.num_rows, [], image_column(uri, parquet.schema_arrow, column), None)


class _Watched:
    """A file that remembers whether reading it failed: pyarrow raises OSError for that and for damaged pages alike."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file = file
        self.failed = False
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        try:
            return self.file.read(size)
        except OSError:
            self.failed = True
            raise

    def seek(self, position: int, whence: int = 0) -> int:
        return self.file.seek(position, whence)

    def tell(self) -> int:
        return self.file.tell()

    def close(self) -> None:
        self.closed = True


# ---- Reading.


class _Item(NamedTuple):
    """One image as found: its name, and its bytes or why there are none."""

    key: str
    data: bytes | None
    error: str | None = None
    detail: str | None = None


_PASSED = _Item("", None)
"""In the place of one that nobody asked for."""


def read_chunk(
    chunk: Mapping[str, Any], batch_bytes: int = 64 << 20, indices: Collection[int] | None = None
) -> Iterator[pa.Table]:
    """The images of a PLAN row, as RAW tables of about `batch_bytes` each: end - start rows in all, in order.

    With `indices`, places in the shard, those of its images alone: what lies between them in a folder or a local tar is not
    read, and what comes after the last nowhere.
    """
    batch: list[dict[str, Any]] = []
    size = 0
    wanted = range(chunk["start"], chunk["end"]) if indices is None else indices
    found = _read_folder(chunk, wanted) if chunk["kind"] == "folder" else _read_file(chunk, wanted)
    items = itertools.chain(found, _lost(chunk))
    for index, item in zip(range(chunk["start"], max(wanted, default=-1) + 1), items, strict=False):
        if index not in wanted:
            continue
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


def _lost(chunk: Mapping[str, Any]) -> Iterator[_Item]:
    """What stands for images that are planned and not to be had."""
    detail = chunk["damage"] or "the shard ends before the plan says so: it has changed, or was damaged since"
    return itertools.repeat(_Item("", None, "damaged-shard", detail))


def _read_file(chunk: Mapping[str, Any], wanted: Collection[int]) -> Iterator[_Item]:
    if chunk["offset"] is None and chunk["column"] is None:
        return  # no image, only the row for what is lost
    place = Place(chunk["uri"])
    try:
        file = place.open()
    except FileNotFoundError:
        if _folder_is_gone(place, place.path):
            raise
        return
    with file:
        if chunk["kind"] == "parquet":
            yield from _read_parquet(file, chunk, wanted)
        else:
            few = place.is_local and not isinstance(wanted, range)
            yield from _read_tar(file, chunk, wanted, HEADER_AHEAD if few else READ_AHEAD)


def _folder_is_gone(place: Place, path: str) -> bool:
    """One file that vanished is data; its whole folder is a disk that is not mounted or a bucket out of reach."""
    return place.info(posixpath.dirname(path)).type == pyarrow.fs.FileType.NotFound


def _read_tar(file: pa.NativeFile, chunk: Mapping[str, Any], wanted: Collection[int], ahead: int) -> Iterator[_Item]:
    try:
        stream = _uncompressed(file, ahead)
        stream.seek(chunk["offset"])
        tar = _tar(stream)
        for index, member in enumerate(_images(tar), chunk["start"]):
            yield _member(tar, member) if index in wanted else _PASSED
    except _BROKEN_TAR:
        return


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> _Item:
    content = tar.extractfile(member)
    assert content is not None, "regular files have content"
    try:
        return _sized(member.name, member.size, content.read)
    except _BROKEN_TAR as error:
        return _Item(member.name, None, "truncated", f"{type(error).__name__}: {error}")


def _images(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members that are images, without keeping the list of all that tarfile would make."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and extension(member.name) in EXTENSIONS and not is_hidden(member.name):
            yield member


def _tar(stream: IO[bytes]) -> tarfile.TarFile:
    # Names need not be UTF-8, Arrow's strings must be.
    return tarfile.TarFile(fileobj=stream, mode="r", encoding="utf-8", errors="backslashreplace")


class _Stream(io.BufferedReader):
    """Refuses what a damaged header may ask tarfile for: to read nothing less than terabytes at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_IMAGE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _uncompressed(file: pa.NativeFile, ahead: int) -> IO[bytes]:
    stream = _Stream(file, ahead)
    # By content: servers unpack `.tar.gz` on the way, and people call a compressed tar `.tar`.
    is_gzip = stream.peek(2)[:2] == b"\x1f\x8b"
    return _Stream(gzip.GzipFile(fileobj=stream), READ_AHEAD) if is_gzip else stream


def _read_folder(chunk: Mapping[str, Any], wanted: Collection[int]) -> Iterator[_Item]:
    place = Place(chunk["uri"])
    for index, name in enumerate(chunk["members"], chunk["start"]):
        if index not in wanted:
            yield _PASSED
            continue
        path = f"{place.path.rstrip('/')}/{name}"
        try:
            with place.open(path) as file:
                yield _sized(name, file.size(), file.read)
        except FileNotFoundError as error:
            if _folder_is_gone(place, path):
                raise
            yield _Item(name, None, "missing-file", str(error))
        except PermissionError as error:  # of a local file; object stores report theirs as OSError, for all alike
            yield _Item(name, None, "unreadable", str(error))


def _read_parquet(file: pa.NativeFile, chunk: Mapping[str, Any], wanted: Collection[int]) -> Iterator[_Item]:
    watched = _Watched(file)
    try:
        parquet = pq.ParquetFile(watched, buffer_size=READ_AHEAD, pre_buffer=False)
    except (OSError, pa.ArrowException):
        if watched.failed:
            raise
        return
    if chunk["column"] not in parquet.schema_arrow.names:
        return
    key = key_column(parquet.schema_arrow)
    columns = [chunk["column"], *([] if key is None else [key])]
    start = 0
    for group in range(parquet.num_row_groups):
        position, end = start, start + parquet.metadata.row_group(group).num_rows
        start = end
        rows = range(max(position, chunk["start"]), min(end, chunk["end"]))
        if not any(row in wanted for row in rows):
            yield from itertools.repeat(_PASSED, len(rows))
            continue
        try:
            # Rows before the chunk in its first row group are decoded and passed over: Parquet cannot seek to a row.
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group], columns=columns):
                skipped = min(max(chunk["start"] - position, 0), batch.num_rows)
                position += skipped
                for row in batch.slice(skipped).to_pylist():
                    yield _parquet_item(row[chunk["column"]], None if key is None else row[key], position)
                    position += 1
        except (OSError, pa.ArrowException) as error:
            if watched.failed:
                raise
            detail = f"row group {group}: {' '.join(str(error).split())}"
            for row in range(max(position, chunk["start"]), end):
                yield _Item(str(row), None, "unreadable", detail)


def _parquet_item(value: bytes | dict[str, Any] | None, key: object, row: int) -> _Item:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    name = str(path or (row if key is None else key))
    if data is None:
        return _Item(name, None, "no-data", "null")
    return _sized(name, len(data), lambda size: data)


def _sized(name: str, size: int, read: Callable[[int], bytes]) -> _Item:
    if size > MAX_IMAGE_BYTES:
        return _Item(name, None, "too-large", f"{size} bytes, {MAX_IMAGE_BYTES} are read")
    return _Item(name, read(size))

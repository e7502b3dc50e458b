"""Whether what jobs.index and jobs.name wrote fits the run: by_latent/, top_images/ and latents.parquet.

The rows of by_latent must be those of the activations: as many, and with the same sum of hashes (`saecore.upkeep.tables`). An
index of files that are others by now is stale. Left out: whether the maps of top_images equal those of the run.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saecore.query import by_latent
from saecore.query.by_latent import File, Index, Segment
from saecore.query.statistics import OF
from saecore.runs import latents
from saecore.runs.record import Record
from saecore.schema import ACTIVATIONS
from saecore.storage import Place, is_file, join_uri, reason
from saecore.upkeep import tables
from saecore.upkeep.problem import Problem

INDEX = f"{by_latent.ROWS}/_index.json"


def problems(
    uri: str, record: Record, manifest: pa.Table, digests: Mapping[int, int], fires: np.ndarray | None
) -> Iterator[Problem]:
    """What is wrong. `digests` are those of each whole chunk's activations; `fires` says for how many images each latent fires,
    None if that is not known."""
    try:
        index = by_latent.read_index(uri, record.fingerprint)
    except (ValueError, TypeError, KeyError) as error:
        yield Problem(INDEX, f"is no index of this run: {reason(error)}", "index")
        index = None
    stale = 0
    if index is not None:
        if stale := stale_chunks(index, manifest):
            yield Problem(INDEX, f"is stale: {stale:,} chunks are not indexed as they are now", "index")
        for segment in index.segments:
            yield from _segment(uri, record, segment, None if stale else digests)
        yield from _strays(uri, index)
    yield from _latents(uri, record, index, None if stale else fires)


def stale_chunks(index: Index, manifest: pa.Table) -> int:
    """How many chunks of a run the index does not cover, or not as their files are now."""
    fresh = [segment for segment in index.segments if _digest(manifest, segment) == segment.digest]
    covered = Index(index.fingerprint, index.top, fresh).chunk_ids()
    return len(np.setdiff1d(manifest["chunk_id"].to_numpy(), covered))


def _digest(manifest: pa.Table, segment: Segment) -> str:
    return by_latent.digest(manifest, _chunk_ids(segment))


def _chunk_ids(segment: Segment) -> np.ndarray:
    return Index("", 0, [segment]).chunk_ids()


def _segment(uri: str, record: Record, segment: Segment, digests: Mapping[int, int] | None) -> Iterator[Problem]:
    """Its files, and its rows against those of the activations; without digests the files only."""
    total, is_whole = 0, True
    for file in (*segment.rows, *segment.top):
        is_rows = file in segment.rows
        digest, wrong = _file(uri, record, file, is_rows)
        total, is_whole = (total + digest) % (1 << 64), is_whole and not wrong
        if wrong:
            yield Problem(file.path, wrong, "index")
    if digests is None or not is_whole:
        return
    chunk_ids = _chunk_ids(segment).tolist()
    known = all(chunk_id in digests for chunk_id in chunk_ids)
    if known and total != sum(digests[chunk_id] for chunk_id in chunk_ids) % (1 << 64):
        yield Problem(segment.rows[0].path if segment.rows else INDEX, "holds other rows than the activations", "index")


def _file(uri: str, record: Record, file: File, is_rows: bool) -> tuple[int, str]:
    """The digest of a file's rows, and what is wrong with it. The checksums of its pages are checked."""
    place = Place(join_uri(uri, file.path))
    try:
        if (size := place.info().size) != file.bytes:
            return 0, f"has {size:,} bytes, and {file.bytes:,} were written" if size is not None else "is missing"
        total, last = 0, (-1, np.inf)
        with place.open() as opened, pq.ParquetFile(opened, page_checksum_verification=True) as parquet:
            if (parquet.schema_arrow.metadata or {}).get(b"fingerprint") != record.fingerprint.encode():
                return 0, "carries the fingerprint of another run"
            if is_rows and parquet.schema_arrow.remove_metadata() != ACTIVATIONS:
                return 0, "has other columns than the activations"
            if parquet.metadata.num_rows != file.rows:
                return 0, f"has {parquet.metadata.num_rows:,} rows, and {file.rows:,} were written"
            for batch in parquet.iter_batches(use_threads=False):  # see `saecore.storage.table_of`
                if is_rows and batch.num_rows:
                    total += tables.digest(batch)
                    last, is_sorted = _sorted(batch, last)
                    if not is_sorted:
                        return 0, "is not sorted by latent and falling activation"
    except (OSError, pa.ArrowException) as error:
        return 0, f"cannot be read: {reason(error)}"
    return total, ""


def _sorted(batch: pa.RecordBatch, last: tuple[int, float]) -> tuple[tuple[int, float], bool]:
    latent, strength = (batch[name].to_numpy(zero_copy_only=False) for name in ("latent", "activation"))
    before = np.concatenate([[last[0]], latent[:-1]]), np.concatenate([[last[1]], strength[:-1]])
    is_sorted = bool(((latent > before[0]) | ((latent == before[0]) & (strength <= before[1]))).all())
    return (int(latent[-1]), float(strength[-1])), is_sorted


def _strays(uri: str, index: Index) -> Iterator[Problem]:
    held = {file.path for segment in index.segments for file in (*segment.rows, *segment.top)} | {INDEX}
    for folder in (by_latent.ROWS, by_latent.TOP):
        for info in Place(join_uri(uri, folder)).entries():
            if f"{folder}/{info.base_name}" not in held and not info.base_name.startswith("."):
                yield Problem(f"{folder}/{info.base_name}", "is no file of this index", "move")


def _latents(uri: str, record: Record, index: Index | None, fires: np.ndarray | None) -> Iterator[Problem]:
    """latents.parquet: a row for each latent, and the counts of the index that is there; of a stale index nothing is known."""
    if not is_file(join_uri(uri, latents.NAME)):
        return
    remedy = "index" if index is not None else "name"
    try:
        table = latents.read(uri)
        assert table is not None
    except (OSError, pa.ArrowException) as error:
        yield Problem(latents.NAME, f"cannot be read: {reason(error)}", remedy)
        return
    if table["latent"].to_pylist() != list(range(record.n_latents)):
        yield Problem(latents.NAME, f"does not have each of the {record.n_latents:,} latents once and in order", remedy)
    elif index is not None and "images" in table.column_names:
        names = ",".join(segment.name for segment in index.segments).encode()
        if (table.schema.metadata or {}).get(OF) != names:
            yield Problem(latents.NAME, "is stale: it counts another index", "index")
        elif fires is not None and not np.array_equal(table["images"].to_numpy(), fires):
            wrong = int((table["images"].to_numpy() != fires).sum())
            yield Problem(latents.NAME, f"counts other images than fire for {wrong:,} latents", "index")

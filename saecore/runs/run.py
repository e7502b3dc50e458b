"""A run folder: plan, fingerprint, chunk files, commit records, manifest; how it is resumed, finished and read.

    RUN/run.json           what made it, and, once complete, what came of it
    RUN/plan.parquet       the chunks (schema.PLAN)
    RUN/images/ activations/ maps/     chunk-00000017.parquet in each; without maps, `images` alone
    RUN/commits/           chunk-00000017.json
    RUN/manifest.parquet   every file of a complete run, with rows, bytes and sha256
    RUN/README.md          its dataset card (`saecore.runs.card`)

A chunk is done if and only if its commit record is valid: it can be read, carries this run's fingerprint, and the files it
names are there in the size it says. Names follow from the chunk id, files appear whole under their final name or not at
all, and the record comes last: a worker may die anywhere, or run twice, and readers see each image once. Resuming is the
plan less the valid records. Works on any pyarrow filesystem.

Left out: a lock. Two jobs with one fingerprint on one folder do the work twice and write the same files.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from saecore.runs import card
from saecore import schema
from saecore.runs.fit import Fit, judged
from saecore.storage import (Place, check_writable, join_uri, names_in, read_json, read_parquet, reason, write_atomic)

TABLES = ("images", "activations", "maps")
"""All that a run may have; the payload that is written says which it has."""

# One image's rows should be one small read, a whole table's scan few large ones.
ROW_GROUP_ROWS = {"images": 4096, "activations": 131_072, "maps": 2048}

MANIFEST = pa.schema(
    [
        pa.field("chunk_id", pa.int64(), nullable=False),
        pa.field("table", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),  # below the run
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)

_RECORD_READERS = 32
"""Threads that read commit records: one is a round trip on an object store."""


@dataclasses.dataclass(frozen=True)
class Commit:
    """The record that makes a chunk done."""

    chunk_id: int
    fingerprint: str
    images: int
    """All images of the chunk, refused ones too."""
    refused: dict[str, int]
    """Refused images by reason."""
    completeness: float | None
    """Worst completeness error of the chunk's maps; None where none are made."""
    seconds: dict[str, float]
    """Time in each step."""
    files: list[dict[str, Any]]
    """The MANIFEST rows of the chunk, without chunk_id."""
    fit: tuple[int, int] = (0, 0)
    """`saecore.runs.fit.Fit` of the chunk's images; records from before it was counted have none."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash of everything that changes results."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def listing_hash(shards: Iterable[tuple[Any, ...]]) -> str:
    """Hash of the input's listing: names, sizes and times of change, as `saecore.images.chunks.list_shards` gives them."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(json.dumps(list(shard)).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run. Small enough to travel to every worker."""

    uri: str
    parts: dict[str, Any]
    """What the fingerprint is made of."""
    fingerprint: str

    def plan(self) -> pa.Table:
        """All chunks."""
        return read_plan(self.uri)

    def commits(self) -> list[Commit]:
        """The valid commit records, in the order of their chunks."""
        sizes = {
            f"{table}/{info.base_name}": info.size for table in TABLES for info in Place(join_uri(self.uri, table)).entries()
        }
        names = [name for name in names_in(join_uri(self.uri, "commits")) if name.endswith(".json")]
        with ThreadPoolExecutor(_RECORD_READERS) as pool:
            found = pool.map(lambda name: self._commit(name, sizes), sorted(names))
            return [commit for commit in found if commit is not None]

    def _commit(self, name: str, sizes: Mapping[str, int]) -> Commit | None:
        try:
            commit = Commit(**read_json(join_uri(self.uri, "commits", name)))
        except (ValueError, TypeError):  # not JSON, or not a record: the chunk is not done
            return None
        whole = all(sizes.get(file["path"]) == file["bytes"] for file in commit.files)
        return commit if whole and commit.fingerprint == self.fingerprint else None

    def write_chunk(self, chunk_id: int, payload: pa.Table, seconds: dict[str, float], tags: dict[str, str]) -> Commit:
        """EXPLAINED or IMAGES rows of one chunk -> its file in every table, then its commit record.

        `tags` go into Parquet metadata.
        """
        started = time.perf_counter()
        metadata = {**tags, "fingerprint": self.fingerprint}
        nested = [name for name in TABLES if name in payload.column_names]
        tables = {"images": payload.select(schema.IMAGES.names).cast(schema.IMAGES)}
        tables |= {name: schema.unnest(payload, name) for name in nested}
        files = []
        for name, table in tables.items():
            data = parquet_bytes(table.replace_schema_metadata(metadata), ROW_GROUP_ROWS[name])
            path = f"{name}/chunk-{chunk_id:08d}.parquet"
            write_atomic(join_uri(self.uri, path), data)
            digest = hashlib.sha256(data).hexdigest()
            files.append({"table": name, "path": path, "rows": table.num_rows, "bytes": len(data), "sha256": digest})
        errors = [error for error in payload["error"].to_pylist() if error is not None]
        worst = None
        if "completeness" in payload.column_names:
            errors_found = payload["completeness"].drop_null().to_pylist()
            # NaN: the method's maps are no decomposition, and nothing has to add up.
            worst = None if any(map(math.isnan, errors_found)) else max(errors_found, default=0.0)
        commit = Commit(
            chunk_id=chunk_id,
            fingerprint=self.fingerprint,
            images=payload.num_rows,
            refused=dict(Counter(errors)),
            completeness=worst,
            seconds={**seconds, "write": time.perf_counter() - started},
            files=files,
            fit=judged(payload["fvu"].to_pylist()),
        )
        record = json.dumps(dataclasses.asdict(commit)).encode()
        write_atomic(join_uri(self.uri, f"commits/chunk-{chunk_id:08d}.json"), record)
        return commit

    def pending(self, commits: Iterable[Commit] | None = None) -> pa.Table:
        """The chunks without a valid commit record; `commits` are those that there are, if they are read already."""
        found = self.commits() if commits is None else commits
        done, plan = pa.array([commit.chunk_id for commit in found], pa.int64()), self.plan()
        return plan.filter(pc.invert(pc.is_in(plan["chunk_id"], done)))

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return record_at(self.uri)

    def update(self, **fields: Any) -> None:
        """Add to, or replace in, run.json."""
        _write_json(join_uri(self.uri, "run.json"), {**self.record(), **fields})

    def finish(self, images: int, seconds: float) -> dict[str, Any]:
        """Check that every planned image was written once, write manifest and card, complete run.json; returns its content.

        `images`, and the `seconds` they took, are those of the session that ends here: a resumed run had others before.
        """
        commits, plan = self.commits(), self.plan()
        lengths = pc.subtract(plan["end"], plan["start"])
        planned = dict(zip(plan["chunk_id"].to_pylist(), lengths.to_pylist(), strict=True))
        written = {commit.chunk_id: commit.images for commit in commits}
        if written != planned:
            wrong = sorted(chunk for chunk in planned if written.get(chunk) != planned[chunk])
            raise RuntimeError(
                f"{len(wrong)} of {len(planned)} chunks are not done, the first is {wrong[:1]}; run it again"
            )
        rows = [{"chunk_id": commit.chunk_id, **file} for commit in commits for file in commit.files]
        manifest = pa.Table.from_pylist(rows, schema=MANIFEST)
        write_atomic(join_uri(self.uri, "manifest.parquet"), parquet_bytes(manifest, 65_536))
        session = {"session_images": images, "session_seconds": {"images": round(seconds, 3)}}
        done = {"status": "complete", **session, **summarise(commits), **missing(plan, commits)}
        card.write(self.uri, self.record() | done)
        self.update(**done)
        return self.record()


def summarise(commits: Iterable[Commit]) -> dict[str, Any]:
    """What the commit records of a run add up to, for run.json."""
    refused, seconds, rows, size = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    commits = list(commits)
    images, errors, fit = 0, list[float](), fit_of(commits)
    for commit in commits:
        images += commit.images
        errors += [] if commit.completeness is None else [commit.completeness]
        refused.update(commit.refused)
        seconds.update(commit.seconds)
        for file in commit.files:
            rows[file["table"]] += file["rows"]
            size[file["table"]] += file["bytes"]
    return {
        "images": images,
        "refused": dict(refused),
        "rows": dict(rows),
        "bytes": dict(size),
        "step_seconds": {step: round(value, 3) for step, value in seconds.items()},
        **({"worst_completeness_error": max(errors)} if errors else {}),
        **({"fit": fit._asdict()} if fit.judged else {}),
    }


def missing(plan: pa.Table, commits: Iterable[Commit]) -> dict[str, dict[str, Any]]:
    """What of the inputs could not be read, for run.json: `lost` after the plan, `damaged` when it was made; each only where
    there is some, with the number of shards, the first of them and, where it is known, the number of images."""
    chunks = {row["chunk_id"]: row for row in plan.select(["chunk_id", "uri", "damage"]).to_pylist()}
    damaged = [row["uri"] for row in chunks.values() if row["damage"] is not None]
    lost = Counter[str]()
    for commit in commits:
        chunk = chunks[commit.chunk_id]
        # One row of a shard that the plan found damaged stands for what lies behind the damage.
        gone = commit.refused.get("damaged-shard", 0) - (chunk["damage"] is not None)
        gone += commit.refused.get("missing-file", 0)
        lost.update({chunk["uri"]: gone} if gone > 0 else {})
    return {
        name: {"shards": len(uris), "first": list(uris)[:3], **more}
        for name, uris, more in (("lost", lost, {"images": lost.total()}), ("damaged", damaged, {}))
        if uris
    }


def fit_of(commits: Iterable[Commit]) -> Fit:
    """How well the SAE reconstructs all their images together."""
    return functools.reduce(Fit.plus, (Fit(*commit.fit) for commit in commits), Fit())


def open_run(uri: str, parts: dict[str, Any], made_by: dict[str, Any], make_plan: Callable[[], pa.Table]) -> Run:
    """Start a run in an empty or new folder, or take up the one that is there.

    `parts` is what the fingerprint is made of; `made_by` goes into run.json beside it; `make_plan` is called for a new run
    only. ValueError if the folder holds a run with another fingerprint (the sentence names what differs), or anything else.
    """
    run = Run(uri, parts, fingerprint(parts))
    if not holds_run(uri):
        write_atomic(join_uri(uri, "plan.parquet"), parquet_bytes(make_plan(), 65_536))
        record = {"status": "running", "fingerprint": run.fingerprint, "parts": parts, **made_by}
        _write_json(join_uri(uri, "run.json"), record)
        return run
    refuse_other(uri, run.record()["parts"], parts)
    return run


def run_at(uri: str) -> Run | None:
    """The run that a folder holds, as it was made; None if there is none; ValueError as of `holds_run`."""
    if not holds_run(uri):
        return None
    parts = record_at(uri)["parts"]
    return Run(uri, parts, fingerprint(parts))


def record_at(uri: str) -> dict[str, Any]:
    """run.json of the run at `uri`; ValueError, which names the file, if no run wrote that; OSError if there is none."""
    where = join_uri(uri, "run.json")
    try:
        record = read_json(where)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if (
        not isinstance(record, dict)
        or not {"parts", "status"} <= record.keys()
        or not isinstance(record["parts"], dict)
    ):
        raise ValueError(f"{where} is not what a run writes: {uri} holds no run")
    return record


def holds_run(uri: str) -> bool:
    """Whether there is a run at `uri`; ValueError if something else is: other files, or a file instead of a folder."""
    try:
        names = names_in(uri)
    except OSError as error:
        raise ValueError(f"--out {uri} is no folder that can be read: {reason(error)}") from error
    # These alone are a start that was interrupted, or refused.
    started = {"plan.parquet", "run.log"} | {name for name in names if name.startswith(".")}
    if "run.json" not in names and names - started:
        raise ValueError(f"--out {uri} holds other files and no run; name a new or empty folder")
    return "run.json" in names


def check_place(uri: str) -> None:
    """ValueError unless a run may be written at `uri`; one that is complete needs no more writing."""
    if not (holds_run(uri) and record_at(uri)["status"] == "complete"):
        try:
            check_writable(uri)
        except ValueError as error:
            raise ValueError(f"--out {error}") from error


def refuse_other(uri: str, before: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """ValueError, naming what differs, if what lies at `uri` was made of other parts."""
    # Runs of jobs.explain carry no kind: their fingerprints are older than the second kind.
    kind, wanted = (of.get("kind", "explain") for of in (before, parts))
    if kind != wanted:
        raise ValueError(
            f"--out {uri} holds an {kind!r} run, and this is an {wanted!r} one; name another folder for it"
        )
    changed = [
        f"{key} was {before.get(key)!r}, now {parts.get(key)!r}"
        for key in sorted(before.keys() | parts.keys())
        if before.get(key) != parts.get(key)
    ]
    if changed:
        raise ValueError(
            f"--out {uri} holds a run made otherwise ({'; '.join(changed)}); name another folder for this one"
        )


def read_plan(uri: str) -> pa.Table:
    """All chunks of a run (schema.PLAN)."""
    return read_parquet(join_uri(uri, "plan.parquet"))


def read_manifest(uri: str) -> pa.Table:
    """Every file of a complete run (MANIFEST)."""
    return read_parquet(join_uri(uri, "manifest.parquet"))


def of_chunks(manifest: pa.Table, chunk_ids: np.ndarray) -> pa.Table:
    """The rows of a manifest that are of some chunks."""
    return manifest.filter(pc.is_in(manifest["chunk_id"], pa.array(chunk_ids, pa.int64())))


def dataset(uri: str, table: str, manifest: pa.Table | None = None) -> pyarrow.dataset.Dataset:
    """One table of a complete run, `images`, `activations` or `maps`, through its manifest, or those rows of it."""
    held = read_manifest(uri) if manifest is None else manifest
    place = Place(uri)
    names = held.filter(pc.equal(held["table"], table))["path"].to_pylist()
    return place.dataset([f"{place.path}/{name}" for name in names])


def scan(uri: str, table: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a complete run's table, in the order of its chunks and of the images in each, a few rows at a time."""
    manifest = read_manifest(uri)
    for name in manifest.filter(pc.equal(manifest["table"], table))["path"].to_pylist():
        with Place(join_uri(uri, name)).open_parquet() as file:
            yield from file.iter_batches(ROW_GROUP_ROWS[table], columns=columns)


def parquet_bytes(table: pa.Table, row_group_rows: int) -> pa.Buffer:
    """Parquet in memory (a chunk's file is a few MB), so that it is hashed and written in one piece.

    Floats byte-stream-split and ids as differences: the demo's activations are 37 % smaller than by default, its maps 9 %.
    """
    encodings = {pa.float32(): "BYTE_STREAM_SPLIT", pa.int64(): "DELTA_BINARY_PACKED"}
    encoded = {field.name: encodings[field.type] for field in table.schema if field.type in encodings}
    repeating = [field.name for field in table.schema if field.type in (pa.string(), pa.int16(), pa.int32())]
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        use_dictionary=repeating,
        column_encoding=encoded,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _write_json(uri: str, content: Mapping[str, Any]) -> None:
    write_atomic(uri, (json.dumps(content, indent=2) + "\n").encode())

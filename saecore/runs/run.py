"""A run folder: plan, fingerprint, chunk files, commits, manifest; how a run is begun, resumed and finished.

    RUN/run.json           what made it and what came of it (`saecore.runs.record`)
    RUN/plan.parquet       the chunks (schema.PLAN)
    RUN/images/ activations/ maps/     chunk-00000017.parquet in each; runs of jobs.embed have only `images`
    RUN/commits/           chunk-00000017.json
    RUN/manifest.parquet   every file of a complete run, with rows, bytes and sha256
    RUN/README.md          its dataset card (`saecore.runs.card`)
    RUN/submissions/       what was sent to a cluster (`jobs.submit`)

A chunk is done if and only if its commit is valid: it can be read, carries this run's fingerprint, and the files it
names are there in the size it says. Names follow from the chunk id, files appear whole under their final name or not at
all, and the commit comes last: a worker may die anywhere, or run twice, and readers see each image once. A resumed run works on
the chunks of the plan that have no valid commit. All of this works on any pyarrow filesystem.

A run is opened for writing by `open_run` and for reading by `saecore.runs.record.read_complete`.

Left out: the lock that lets one job at a time write (`saecore.upkeep.lock`). What is written here does not depend on it: two
jobs with one fingerprint on one folder would do the work twice and write the same files.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from saecore import schema
from saecore.runs import card
from saecore.runs.files import MANIFEST, ROW_GROUP_ROWS, TABLES, chunk_file, parquet_bytes, read_plan
from saecore.runs.fit import Fit, judged
from saecore.runs.record import Record, Unread, from_document, read_record, write_record
from saecore.storage import Place, check_writable, join_uri, names_in, read_json, reason, write_atomic

SUBMISSIONS = "submissions"
"""Folder of what was sent to a cluster. It may be there before anything else is."""

_RECORD_READERS = 32
"""Threads that read commit records: on an object store each record is a round trip."""


@dataclasses.dataclass(frozen=True)
class Commit:
    """The record that makes a chunk done."""

    chunk_id: int
    fingerprint: str
    images: int
    """All images of the chunk, refused images too."""
    refused: dict[str, int]
    """Refused images by reason."""
    completeness: float | None
    """Worst completeness error of the chunk's maps; None if the chunk has none."""
    seconds: dict[str, float]
    """Seconds by step."""
    files: list[dict[str, Any]]
    """The MANIFEST rows of the chunk, without chunk_id."""
    fit: tuple[int, int] = (0, 0)
    """`saecore.runs.fit.Fit` of the chunk's images. Old records, from before it was counted, lack it."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Hash of everything that changes results."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def listing_hash(shards: Iterable[tuple[Any, ...]]) -> str:
    """Hash of the input's listing: names, sizes and times of change, as `saecore.images.listing.list_shards` gives them."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(json.dumps(list(shard)).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is open for writing. Small enough to travel to every worker."""

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
            f"{table}/{info.base_name}": info.size
            for table in TABLES
            for info in Place(join_uri(self.uri, table)).entries()
        }
        names = [name for name in names_in(join_uri(self.uri, "commits")) if name.endswith(".json")]
        with ThreadPoolExecutor(_RECORD_READERS) as pool:
            commits = pool.map(lambda name: self._commit(name, sizes), sorted(names))
            return [commit for commit in commits if commit is not None]

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
            path = chunk_file(name, chunk_id)
            write_atomic(join_uri(self.uri, path), data)
            digest = hashlib.sha256(data).hexdigest()
            files.append({"table": name, "path": path, "rows": table.num_rows, "bytes": len(data), "sha256": digest})
        reasons = [error for error in payload["error"].to_pylist() if error is not None]
        worst = None
        if "completeness" in payload.column_names:
            completeness = payload["completeness"].drop_null().to_pylist()
            # NaN: the method's maps are no decomposition, and nothing has to add up.
            worst = None if any(map(math.isnan, completeness)) else max(completeness, default=0.0)
        commit = Commit(
            chunk_id=chunk_id,
            fingerprint=self.fingerprint,
            images=payload.num_rows,
            refused=dict(Counter(reasons)),
            completeness=worst,
            seconds={**seconds, "write": time.perf_counter() - started},
            files=files,
            fit=judged(payload["fvu"].to_pylist()),
        )
        record = json.dumps(dataclasses.asdict(commit)).encode()
        write_atomic(join_uri(self.uri, f"commits/chunk-{chunk_id:08d}.json"), record)
        return commit

    def pending(self, commits: Iterable[Commit] | None = None) -> pa.Table:
        """The chunks without a valid commit record; `commits` are the valid records, if they have been read already."""
        valid = self.commits() if commits is None else commits
        done, plan = pa.array([commit.chunk_id for commit in valid], pa.int64()), self.plan()
        return plan.filter(pc.invert(pc.is_in(plan["chunk_id"], done)))

    def record(self) -> Record:
        """The content of run.json."""
        return read_record(self.uri)

    def finish(self, images: int, seconds: float) -> Record:
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
        record = dataclasses.replace(
            completed(self.record(), plan, commits),
            session_images=images,
            session_seconds={"images": round(seconds, 3)},
        )
        card.write(self.uri, record)
        write_record(self.uri, record)
        return record


def completed(record: Record, plan: pa.Table, commits: Iterable[Commit]) -> Record:
    """The record of a run that is complete: with what its commit records add up to."""
    refused, seconds, rows, size = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    commits = list(commits)
    images, errors = 0, list[float]()
    for commit in commits:
        images += commit.images
        errors += [] if commit.completeness is None else [commit.completeness]
        refused.update(commit.refused)
        seconds.update(commit.seconds)
        for file in commit.files:
            rows[file["table"]] += file["rows"]
            size[file["table"]] += file["bytes"]
    lost, damaged = unread(plan, commits)
    return dataclasses.replace(
        record,
        status="complete",
        images=images,
        refused=dict(refused),
        rows=dict(rows),
        bytes=dict(size),
        step_seconds={step: round(value, 3) for step, value in seconds.items()},
        worst_completeness_error=max(errors, default=None),
        fit=fit_of(commits),
        lost=lost,
        damaged=damaged,
    )


def unread(plan: pa.Table, commits: Iterable[Commit]) -> tuple[Unread | None, Unread | None]:
    """What of the inputs could not be read: what was lost after the plan was made, and what was damaged when it was made."""
    chunks = {row["chunk_id"]: row for row in plan.select(["chunk_id", "uri", "damage"]).to_pylist()}
    damaged = [row["uri"] for row in chunks.values() if row["damage"] is not None]
    lost = Counter[str]()
    for commit in commits:
        chunk = chunks[commit.chunk_id]
        # Of a shard that was damaged when it was planned, one row stands for whatever follows the damage.
        gone = commit.refused.get("damaged-shard", 0) - (chunk["damage"] is not None)
        gone += commit.refused.get("missing-file", 0)
        lost.update({chunk["uri"]: gone} if gone > 0 else {})
    return (
        Unread(len(lost), list(lost)[:3], lost.total()) if lost else None,
        Unread(len(damaged), damaged[:3]) if damaged else None,
    )


def fit_of(commits: Iterable[Commit]) -> Fit:
    """The fit of the SAE to the images of these chunks together."""
    return functools.reduce(Fit.plus, (Fit(*commit.fit) for commit in commits), Fit())


def open_run(uri: str, parts: dict[str, Any], made_by: dict[str, Any], make_plan: Callable[[], pa.Table]) -> Run:
    """Begin a run in an empty or new folder, or resume the run that the folder holds.

    The fingerprint is made of `parts`; `made_by` holds further fields of the record; `make_plan` is called only for a new run.
    ValueError if the folder holds a run with another fingerprint (the sentence names what differs), or anything else.
    """
    run = Run(uri, parts, fingerprint(parts))
    if not holds_run(uri):
        write_atomic(join_uri(uri, "plan.parquet"), parquet_bytes(make_plan(), 65_536))
        begun = {"status": "running", "fingerprint": run.fingerprint, "parts": parts}
        write_record(uri, from_document(begun | made_by))
        return run
    refuse_other(uri, run.record().parts, parts)
    return run


def run_at(uri: str) -> Run | None:
    """The run that a folder holds, complete or not; None if it holds none; ValueError as in `holds_run`."""
    if not holds_run(uri):
        return None
    parts = read_record(uri).parts
    return Run(uri, parts, fingerprint(parts))


def holds_run(uri: str) -> bool:
    """Whether there is a run at `uri`; ValueError if there is something else: other files, or a file instead of a folder."""
    try:
        names = names_in(uri)
    except OSError as error:
        raise ValueError(f"{uri} is no folder that can be read: {reason(error)}") from error
    # A folder that holds only these is the beginning of a run that was interrupted, or refused.
    started = {"plan.parquet", "run.log", SUBMISSIONS} | {name for name in names if name.startswith(".")}
    if "run.json" not in names and names - started:
        raise ValueError(f"{uri} holds other files and no run; name a new or empty folder")
    return "run.json" in names


def check_place(uri: str) -> None:
    """ValueError unless a run may be written at `uri`. Into a complete run nothing more is written."""
    if not (holds_run(uri) and read_record(uri).is_complete):
        check_writable(uri)


def refuse_other(uri: str, before: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """ValueError, which names what differs, if the run at `uri` was made of other parts."""
    # Runs of jobs.explain carry no kind: their fingerprints are older than the second kind.
    kind, wanted = (of.get("kind", "explain") for of in (before, parts))
    if kind != wanted:
        raise ValueError(f"{uri} holds an {kind!r} run, and this is an {wanted!r} one; name another folder for it")
    changed = [
        f"{key} was {before.get(key)!r}, now {parts.get(key)!r}"
        for key in sorted(before.keys() | parts.keys())
        if before.get(key) != parts.get(key)
    ]
    if changed:
        raise ValueError(f"{uri} holds a run made otherwise ({'; '.join(changed)}); name another folder for this one")

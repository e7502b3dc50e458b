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

A run may grow (`saecore.pipeline.growth`): its plan then has more chunks than its manifest, which goes on to name the files of
the run of before until all chunks are done. The fingerprint stays that of the beginning, so the commits of before stay valid.

Images that were refused may be read again. Their chunks then get files under new names, each with the rows of before for all
other images, and new commit records. The manifest names the files of before until all is done, and these are removed then.

A run is opened for writing by `open_run` and for reading by `saecore.runs.record.read_complete`.

Left out: the lock that lets one job at a time write (`saecore.upkeep.lock`). What is written here does not depend on it: two
jobs with one fingerprint on one folder would do the work twice and write the same files.
"""

import dataclasses
import hashlib
import json
import posixpath
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from saecore import numbering, schema
from saecore.runs import card
from saecore.runs.commits import ADDED_UP, Commit, commit_file, completed, manifest_of, worst_error
from saecore.runs.files import (
    TABLES,
    chunk_file,
    parquet_bytes,
    read_file,
    read_manifest,
    read_plan,
    replaced,
    row_group_rows,
    write_plan,
)
from saecore.runs.fit import judged
from saecore.runs.record import Record, from_document, read_record, write_record
from saecore.storage import Place, check_writable, is_file, join_uri, names_in, read_json, reason, write_atomic

SUBMISSIONS = "submissions"
"""Folder of what was sent to a cluster. It may be there before anything else is."""

_RECORD_READERS = 32
"""Threads that read commit records: on an object store each record is a round trip."""


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
    again: int = 0
    """Above 0, what is written are images of chunks that are done; their files then have this number in their names."""

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

    def committed(self, chunk_id: int) -> Commit | None:
        """The chunk's valid commit record; None if the chunk is not done, or is to be done again."""
        file = commit_file(chunk_id)
        commit = self._commit(posixpath.basename(file)) if is_file(join_uri(self.uri, file)) else None
        return commit if commit is not None and commit.again == self.again else None

    def _commit(self, name: str, sizes: Mapping[str, int] | None = None) -> Commit | None:
        """A commit record if it is valid, by the sizes of the run's files; without these, each file is asked for."""
        try:
            commit = Commit(**read_json(join_uri(self.uri, "commits", name)))
        except (ValueError, TypeError):  # not JSON, or not a record: the chunk is not done
            return None
        if sizes is None:
            paths = [file["path"] for file in commit.files]
            sizes = {path: Place(join_uri(self.uri, path)).info().size for path in paths}
        whole = all(sizes.get(file["path"]) == file["bytes"] for file in commit.files)
        return commit if whole and commit.fingerprint == self.fingerprint else None

    def write_chunk(self, chunk_id: int, payload: pa.Table, seconds: dict[str, float], tags: dict[str, str]) -> Commit:
        """EXPLAINED or IMAGES rows of one chunk -> its file in every table, then its commit record.

        `tags` go into Parquet metadata.
        """
        started = time.perf_counter()
        metadata = {**tags, "fingerprint": self.fingerprint}
        nested = [name for name in TABLES if name in payload.column_names]
        of_images = schema.TOKEN_IMAGES if "tokens" in payload.column_names else schema.IMAGES
        tables = {"images": payload.select(of_images.names).cast(of_images)}
        tables |= {name: schema.unnest(payload, name) for name in nested}
        tables = {name: table.replace_schema_metadata(metadata) for name, table in tables.items()}
        worst = worst_error(payload)
        if self.again:
            before = Commit(**read_json(join_uri(self.uri, commit_file(chunk_id))))
            tables = {
                name: replaced(read_file(self.uri, before.file(name)), table, payload["image_id"])
                for name, table in tables.items()
            }
            worst = None if worst is None or before.completeness is None else max(worst, before.completeness)
            seconds = dict(Counter(seconds) + Counter(before.seconds))
        files = []
        for name, table in tables.items():
            data = parquet_bytes(table, row_group_rows(name, table))
            path = chunk_file(name, chunk_id, self.again)
            write_atomic(join_uri(self.uri, path), data)
            digest = hashlib.sha256(data).hexdigest()
            files.append({"table": name, "path": path, "rows": table.num_rows, "bytes": len(data), "sha256": digest})
        images = tables["images"]
        seconds = {**seconds, "write": seconds.get("write", 0.0) + time.perf_counter() - started}
        commit = Commit(
            chunk_id=chunk_id,
            fingerprint=self.fingerprint,
            images=images.num_rows,
            refused=dict(Counter(images["error"].drop_null().to_pylist())),
            completeness=worst,
            seconds=seconds,
            files=files,
            fit=judged(images["fvu"].to_pylist()),
            again=self.again,
        )
        write_atomic(join_uri(self.uri, commit_file(chunk_id)), json.dumps(dataclasses.asdict(commit)).encode())
        return commit

    def pending(self, commits: Iterable[Commit] | None = None) -> pa.Table:
        """The chunks without a valid commit record; `commits` are the valid records, if they have been read already."""
        valid = self.commits() if commits is None else commits
        done, plan = pa.array([commit.chunk_id for commit in valid], pa.int64()), self.plan()
        return plan.filter(pc.invert(pc.is_in(plan["chunk_id"], done)))

    def record(self) -> Record:
        """The content of run.json."""
        return read_record(self.uri)

    def is_finished(self, commits: Sequence[Commit]) -> bool:
        """Whether the manifest and run.json tell of these commit records, the valid ones of all chunks.

        They tell of fewer where a session that added to a complete run was stopped between the last chunk and the end.
        """
        record = self.record()
        if not (record.is_complete and read_manifest(self.uri).equals(manifest_of(commits))):
            return False
        if any(True for _ in self._unnamed(commits)):
            return False
        told = completed(record, self.plan(), commits)
        return all(getattr(told, name) == getattr(record, name) for name in ADDED_UP)

    def finish(self, images: int, seconds: float) -> Record:
        """Check that every planned image was written once, write manifest and card, complete run.json; returns its content.

        `images`, and the `seconds` they took, are those of the session that ends here: a resumed run had others before.
        """
        commits, plan = self.commits(), self.plan()
        planned = dict(zip(plan["chunk_id"].to_pylist(), numbering.lengths(plan).tolist(), strict=True))
        written = {commit.chunk_id: commit.images for commit in commits}
        if written != planned:
            wrong = sorted(chunk for chunk in planned if written.get(chunk) != planned[chunk])
            raise RuntimeError(
                f"{len(wrong)} of {len(planned)} chunks are not done, the first is {wrong[:1]}; run it again"
            )
        write_atomic(join_uri(self.uri, "manifest.parquet"), parquet_bytes(manifest_of(commits), 65_536))
        record = dataclasses.replace(
            completed(self.record(), plan, commits),
            session_images=images,
            session_seconds={"images": round(seconds, 3)},
        )
        card.write(self.uri, record)
        write_record(self.uri, record)
        for file in self._unnamed(commits):
            Place(self.uri).remove(file)
        return record

    def _unnamed(self, commits: Iterable[Commit]) -> Iterator[str]:
        """Files of before, of chunks that were done again, by their paths in the filesystem."""
        if not any(commit.again for commit in commits):
            return
        named = {file["path"] for commit in commits for file in commit.files}
        for table in TABLES:
            for info in Place(join_uri(self.uri, table)).entries():
                if info.base_name.startswith("chunk-") and f"{table}/{info.base_name}" not in named:
                    yield info.path


def open_run(uri: str, parts: dict[str, Any], made_by: dict[str, Any], make_plan: Callable[[], pa.Table]) -> Run:
    """Begin a run in an empty or new folder, or resume the run that the folder holds.

    The fingerprint is made of `parts`; `made_by` holds further fields of the record; `make_plan` is called only for a new run.
    ValueError if the folder holds a run with another fingerprint (the sentence names what differs), or anything else.
    """
    run = Run(uri, parts, fingerprint(parts))
    if not holds_run(uri):
        write_plan(uri, make_plan())
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

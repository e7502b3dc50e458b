"""Whether a run folder is whole: every file against what was written, every planned image once, nothing besides.

    Verification(uri, record).problems()     one `Problem` after the other; figures in the attributes

Of a complete run its manifest and run.json count too, of any other run its commits. Each file is read once, several at the same
time, so memory does not grow with the content: it holds the listings of the folders, and a few files. What jobs.index and
jobs.name wrote is compared with the activations (`saecore.upkeep.indexed`).

Left out: whether the values are right. What was computed cannot be told from the files; `worst_completeness_error` in run.json
says how exact it was.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from saecore import numbering
from saecore.runs.commits import Commit, commit_file
from saecore.runs.files import MANIFEST, TABLES, read_plan
from saecore.runs.record import Record, read_record, write_record
from saecore.storage import Place, join_uri, read_bytes, read_parquet, reason, table_of
from saecore.upkeep import indexed, tables
from saecore.upkeep.problem import Problem

AT_ONCE = 8
"""Files that are read at the same time: on an object store, most of a read is waiting."""

_CHUNK = re.compile(r"chunk-(\d{8})(?:-\d+)?\.(?:parquet|json)")
"""Names of a chunk's files; a number after that of the chunk counts how often images of it were read again."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Checked(NamedTuple):
    """What came of one chunk."""

    problems: list[Problem]
    commit: Commit | None = None
    """None if the chunk is not done."""
    content: tables.Content = tables.NOTHING


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[Result]:
    """Results in the order of the items, of which a few are worked on ahead: `Executor.map` would hold all results."""
    waiting = deque[Future[Result]]()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Verification:
    """The check of one run folder."""

    def __init__(self, uri: str, record: Record) -> None:
        self.uri, self.record = uri, record
        self.files = self.bytes = self.images = self.done = 0
        self.planned = 0
        """Chunks."""
        self.rows: Counter[str] = Counter()
        self.fires: np.ndarray = np.zeros(record.n_latents, np.int64)
        """For how many images each latent fires."""
        self.named: set[str] = set()
        """Files of the commits."""
        self.committed: set[int] = set()
        """Chunks."""
        self.digests: dict[int, int] = {}
        """Of the activations of each chunk whose files are whole, see `saecore.upkeep.tables.digest`."""

    def problems(self) -> Iterator[Problem]:
        """All problems, as they are found."""
        try:
            plan = read_plan(self.uri)
        except (OSError, pa.ArrowException) as error:
            yield Problem("plan.parquet", f"cannot be read, so nothing else can be checked: {reason(error)}", "move")
            return
        if overlapping := tables.overlaps(plan):
            yield Problem("plan.parquet", f"plans images of chunk {overlapping} twice", "move")
        self.planned = plan.num_rows
        manifest = yield from self._manifest(plan)
        totals = Counter[str]()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            chunks = (row for batch in plan.to_batches(max_chunksize=4096) for row in batch.to_pylist())
            for checked in ahead(pool, lambda row: self._chunk(row, manifest), chunks, 2 * AT_ONCE):
                yield from checked.problems
                self._count(checked, totals)
        if self.record.is_complete and self.done == self.planned:
            yield from self._totals(totals)
        yield from self._strays(plan)
        if self.record.is_complete and manifest is not None and self.record.kind == "explain":
            # What fires in a damaged chunk is not known, so nothing is said of counts that hold it.
            fires = self.fires if len(self.digests) == len(self.committed) else None
            yield from indexed.problems(self.uri, self.record, manifest.table, self.digests, fires)

    def _manifest(self, plan: pa.Table) -> Generator[Problem, None, "Manifest | None"]:
        """Returns the manifest; None if there is none, or none that can be read."""
        if not self.record.is_complete:
            return None
        try:
            manifest = read_parquet(join_uri(self.uri, "manifest.parquet"))
            if manifest.schema.remove_metadata() != MANIFEST:
                raise ValueError("its columns are others than those of a manifest")
        except (OSError, ValueError) as error:
            yield Problem("manifest.parquet", f"cannot be read: {reason(error)}", "close")
            return None
        unplanned = set(manifest["chunk_id"].unique().to_pylist()) - set(plan["chunk_id"].to_pylist())
        if unplanned:
            yield Problem("manifest.parquet", f"names files of {len(unplanned)} chunks that are not planned", "close")
        return Manifest(manifest)

    # ---- One chunk.

    def _chunk(self, row: dict[str, Any], manifest: "Manifest | None") -> Checked:
        chunk_id = row["chunk_id"]
        path = f"commits/chunk-{chunk_id:08d}.json"
        commit, problem = self._commit(path, chunk_id)
        if commit is None:
            return Checked([problem] if problem is not None else [])
        problems = [] if problem is None else [problem]
        ids = numbering.ids_of(row)
        if commit.images != len(ids):
            wrong = f"says {commit.images} images, and {len(ids)} are planned"
            problems.append(Problem(path, wrong, "chunk", chunk_id))
        if manifest is not None and (wrong := manifest.differs(commit)):
            problems.append(Problem("manifest.parquet", wrong, "close", chunk_id))
        held = {}
        for file in commit.files:
            table, wrong = self._file(file)
            held[file["table"]] = table
            if wrong:
                problems.append(Problem(file["path"], wrong, "chunk", chunk_id))
        content = tables.NOTHING
        if all(table is not None for table in held.values()):
            content = tables.check(held, ids, commit.refused, self.record)
            where = {file["table"]: file["path"] for file in commit.files}
            problems += [Problem(where[name], wrong, "chunk", chunk_id) for name, wrong in content.wrong]
        return Checked(problems, commit, content)

    def _commit(self, path: str, chunk_id: int) -> tuple[Commit | None, Problem | None]:
        try:
            commit = Commit(**json.loads(read_bytes(join_uri(self.uri, path))))
        except FileNotFoundError:
            lost = Problem(path, "is missing, and the run is complete", "chunk", chunk_id)
            return None, lost if self.record.is_complete else None
        except (OSError, ValueError, TypeError) as error:
            return None, Problem(path, f"is no commit: {reason(error)}", "chunk", chunk_id)
        if commit.fingerprint != self.record.fingerprint:
            return None, Problem(path, "is the commit of another run", "chunk", chunk_id)
        return commit, None

    def _file(self, file: dict[str, Any]) -> tuple[pa.Table | None, str]:
        """The table of a file, and what is wrong with the file; no table if its bytes are not those that were written."""
        try:
            data = read_bytes(join_uri(self.uri, file["path"]))
        except FileNotFoundError:
            return None, "is missing"
        except OSError as error:
            return None, f"cannot be read: {reason(error)}"
        if len(data) != file["bytes"]:
            return None, f"has {len(data):,} bytes, and {file['bytes']:,} were written"
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            return None, "holds other bytes than were written: its sha256 differs"
        try:
            table = table_of(pa.BufferReader(data))
        except (OSError, pa.ArrowException) as error:
            return None, f"is no Parquet file: {reason(error)}"
        wrong = tables.wrong_form(file, table, self.record)
        return (None, wrong) if wrong else (table, "")

    # ---- All chunks together.

    def _count(self, checked: Checked, totals: Counter[str]) -> None:
        if (commit := checked.commit) is None:
            return
        self.done += 1
        self.named.add(commit_file(commit.chunk_id))
        self.images += commit.images
        self.files += len(commit.files)
        for file in commit.files:
            self.named.add(file["path"])
            self.bytes += file["bytes"]
            self.rows[file["table"]] += file["rows"]
        totals.update(commit.refused)
        self.committed.add(commit.chunk_id)
        if checked.content is not tables.NOTHING:
            self.digests[commit.chunk_id] = checked.content.digest
        if checked.content.fires is not None:
            self.fires += checked.content.fires

    def _totals(self, refused: Counter[str]) -> Iterator[Problem]:
        """What run.json says of the whole against what the commits add up to."""
        said = {"images": self.record.images, "refused": self.record.refused, "rows": self.record.rows}
        counted = {"images": self.images, "refused": dict(refused), "rows": dict(self.rows)}
        for key, value in counted.items():
            if said[key] != value:
                yield Problem("run.json", f"says {key} {said[key]}, and the chunks have {value}", "close")

    def _strays(self, plan: pa.Table) -> Iterator[Problem]:
        """Visible files that readers of a folder would take for the run's."""
        planned = set(plan["chunk_id"].to_pylist())
        for folder in (*TABLES, "commits"):
            for info in Place(join_uri(self.uri, folder)).entries():
                path = f"{folder}/{info.base_name}"
                chunk = _CHUNK.fullmatch(info.base_name)
                # A file whose commit does not count is that of a chunk that is being done, or is to be done again.
                is_chunks = chunk is not None and int(chunk[1]) in planned and int(chunk[1]) not in self.committed
                if path not in self.named and not is_chunks and not info.base_name.startswith("."):
                    yield Problem(path, "is no file of this run", "move")


def reopen(uri: str, chunk_ids: Iterable[int]) -> None:
    """Let the command that made a run do some chunks again, and write manifest and run.json again: remove commits, no data."""
    record = read_record(uri)
    write_record(uri, dataclasses.replace(record, status="running"))
    for chunk_id in chunk_ids:
        with contextlib.suppress(FileNotFoundError):
            Place(join_uri(uri, f"commits/chunk-{chunk_id:08d}.json")).remove()


class Manifest:
    """A manifest, whose rows are asked for by their chunk."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.sort_by("chunk_id")
        self.chunk_ids = self.table["chunk_id"].to_numpy()

    def differs(self, commit: Commit) -> str:
        """What is wrong with the rows of a chunk; empty if they are those of its commit."""
        first, last = np.searchsorted(self.chunk_ids, [commit.chunk_id, commit.chunk_id + 1])
        rows = self.table.slice(first, last - first).drop_columns(["chunk_id"]).to_pylist()
        if sorted(rows, key=lambda row: row["path"]) == sorted(commit.files, key=lambda row: row["path"]):
            return ""
        return (
            f"names other files of chunk {commit.chunk_id} than its commit"
            if rows
            else f"lacks chunk {commit.chunk_id}"
        )

"""How far a run is, from its files alone: what is done, by whom, how fast, and what is missing.

    status(uri, now)     of any run, from any machine

Cost: run.json, the plan, and one listing for each folder of tables and for the commits. The commits of a run that is not
complete are read too, `MOST_READ` of them at most, since only they know of refused images. A chunk counts as done if its commit
is there; `saecore.upkeep.verify` opens what it names.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from saecore.query import by_latent
from saecore.runs import latents
from saecore.runs.files import TABLES, read_lengths, read_manifest
from saecore.runs.record import Record, read_record
from saecore.storage import Place, is_file, join_uri, read_json
from saecore.upkeep.holder import Holder
from saecore.upkeep.indexed import stale_chunks
from saecore.upkeep.lock import holder_of

MOST_READ = 1000
"""Commits that are read: 30 seconds on a store that takes a second for each, by 32 threads."""

RECENT = 600.0
"""Seconds before the newest commit over which speed is taken."""


class Status(NamedTuple):
    """What there is to say of a run."""

    record: Record
    state: str
    """`complete`, `running` or `stopped`."""
    holder: Holder | None
    """Who writes into the folder; None if nobody does."""
    silent: float
    """Seconds since the holder's last sign of life."""
    planned: int
    """Images, as is `done`."""
    done: int
    chunks: int
    pending: int
    """Chunks without a commit."""
    refused: dict[str, int]
    """Images by reason, of the chunks that were read."""
    read: int
    """Chunks whose commits were read, or all of a complete run."""
    rate: float
    """Images a second over the last minutes before the newest commit; 0 if there are too few commits."""
    bytes: dict[str, int]
    """By table."""
    indexed: str
    """Whether the run is indexed: `none`, `present` or `stale`."""
    named: bool
    """Whether latents have names."""

    @property
    def left(self) -> float | None:
        """Seconds that remain at this speed; None if nobody works, or the speed is not known."""
        return (self.planned - self.done) / self.rate if self.rate and self.state == "running" else None


def status(uri: str, now: float) -> Status:
    """What there is to say of the run at `uri`; ValueError if there is none. `now` is in seconds since 1970."""
    if not is_file(join_uri(uri, "run.json")):
        raise ValueError(f"{uri} holds no run: there is no run.json")
    record = read_record(uri)
    chunk_ids, lengths = read_lengths(uri)
    commits = _commits(uri, chunk_ids)
    images = lengths[np.searchsorted(chunk_ids, commits[:, 0].astype(np.int64))]
    found = holder_of(uri, now)
    holder, silent = (None, 0.0) if found is None else found
    is_complete = record.is_complete and len(commits) == len(chunk_ids)
    refused, read = (record.refused, len(commits)) if is_complete else _refused(uri, commits[:, 0].astype(np.int64))
    return Status(
        record,
        "complete" if is_complete else "stopped" if found is None else "running",
        holder,
        silent,
        int(lengths.sum()),
        int(images.sum()),
        len(chunk_ids),
        len(chunk_ids) - len(commits),
        refused,
        read,
        _rate(commits[:, 1], images),
        record.bytes if is_complete else _bytes(uri),
        _index(uri, record),
        _has_names(uri),
    )


def _commits(uri: str, chunk_ids: np.ndarray) -> np.ndarray:
    """Chunk id and time of each commit of a planned chunk, float64 (commits, 2), oldest first."""
    found = [
        (int(number), (info.mtime_ns or 0) / 1e9)
        for info in Place(join_uri(uri, "commits")).entries()
        if (number := info.base_name.removeprefix("chunk-").removesuffix(".json")).isdigit()
    ]
    commits = np.array(found, np.float64).reshape(-1, 2)
    commits = commits[np.isin(commits[:, 0], chunk_ids)]
    return commits[np.argsort(commits[:, 1], kind="stable")]


def _rate(times: np.ndarray, images: np.ndarray) -> float:
    """Images a second: those that came after the first of the recent commits, in the time since that one."""
    if not len(times):
        return 0.0
    first = int(np.searchsorted(times, times[-1] - RECENT))
    seconds = times[-1] - times[first]
    # A folder that was copied has all its commits at once.
    return float(images[first + 1 :].sum() / seconds) if seconds >= 1 else 0.0


def _refused(uri: str, chunk_ids: np.ndarray) -> tuple[dict[str, int], int]:
    """Refused images by reason of at most `MOST_READ` chunks, evenly spread, and how many chunks these are."""
    step = max(1, -(-len(chunk_ids) // MOST_READ))
    some = chunk_ids[::step].tolist()

    def refused(chunk_id: int) -> dict[str, int]:
        try:
            commit = read_json(join_uri(uri, f"commits/chunk-{chunk_id:08d}.json"))
            return dict(commit["refused"])
        except (OSError, ValueError, TypeError, KeyError):  # damaged: `saecore.upkeep.verify` tells
            return {}

    with ThreadPoolExecutor(32) as pool:
        return dict(sum(map(Counter, pool.map(refused, some)), Counter[str]())), len(some)


def _bytes(uri: str) -> dict[str, int]:
    """The size of each table that has files."""
    sizes = {table: sum(info.size or 0 for info in Place(join_uri(uri, table)).entries()) for table in TABLES}
    return {table: size for table, size in sizes.items() if size}


def _has_names(uri: str) -> bool:
    file = join_uri(uri, latents.NAME)
    if not is_file(file):
        return False
    try:
        with Place(file).open_parquet() as parquet:
            return "name" in parquet.schema_arrow.names
    except (OSError, pa.ArrowException):  # damaged: `saecore.upkeep.verify` tells
        return False


def _index(uri: str, record: Record) -> str:
    if not is_file(join_uri(uri, by_latent.ROWS, "_index.json")):
        return "none"
    try:
        index = by_latent.read_index(uri, record.fingerprint)
        stale = index is None or not record.is_complete or stale_chunks(index, read_manifest(uri)) > 0
    except (OSError, ValueError, TypeError, KeyError):
        stale = True
    return "stale" if stale else "present"

"""The commit record of a chunk, and what the records of all chunks add up to: manifest and run.json.

RUN/commits/chunk-00000017.json    a `Commit`; written last, so that it makes the chunk done (`saecore.runs.run`)
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from saecore.runs.files import MANIFEST
from saecore.runs.fit import Fit
from saecore.runs.record import Record, Unread
from saecore.schema import growths_of

ADDED_UP = ("images", "refused", "rows", "bytes", "growths")
"""Fields of the record that change if chunks are added or done again."""


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
    again: int = 0
    """How often images of the chunk were read again. Old records lack it."""

    def file(self, table: str) -> str:
        """The chunk's file of a table, below the run."""
        return next(file["path"] for file in self.files if file["table"] == table)


def commit_file(chunk_id: int) -> str:
    """Where the run keeps a chunk's commit record."""
    return f"commits/chunk-{chunk_id:08d}.json"


def worst_error(payload: pa.Table) -> float | None:
    """The worst completeness error of a payload; None without maps, and where the method's maps are no decomposition (NaN)."""
    if "completeness" not in payload.column_names:
        return None
    errors = payload["completeness"].drop_null().to_pylist()
    return None if any(map(math.isnan, errors)) else max(errors, default=0.0)


def manifest_of(commits: Iterable[Commit]) -> pa.Table:
    """MANIFEST: the files that these commit records name."""
    rows = [{"chunk_id": commit.chunk_id, **file} for commit in commits for file in commit.files]
    return pa.Table.from_pylist(rows, schema=MANIFEST)


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
        growths=growths_of(plan),
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

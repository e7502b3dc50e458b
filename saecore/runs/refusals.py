"""Images that a run refused: of each reason how many, and the names of the first few.

All of them are the rows of the table `images` whose column `error` is not null. Only the files of a few chunks are read here:
the commit records say which chunks refused an image, and why.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from saecore.numbering import index_of
from saecore.runs.commits import Commit
from saecore.runs.files import read_file
from saecore.runs.run import Run
from saecore.schema import PART

SHOWN = 3
"""Names of each reason."""

MAY_PASS = ("missing-file", "unreadable", "damaged-shard", "killed-worker", "timed-out")
"""Reasons that may have passed when an image is read again: they are those of storage and of machines, not of the image."""


class Refusal(NamedTuple):
    """The refused images of one reason."""

    reason: str
    images: int
    names: list[str]
    """The first few, each as the image is called in its shard."""


def refusals(run: Run, shown: int = SHOWN) -> list[Refusal]:
    """What a run refused, the most frequent reason first; empty if it refused nothing."""
    commits = run.commits()
    counts = sum((Counter(commit.refused) for commit in commits), Counter[str]())
    return [
        Refusal(reason, count, _names(run, [commit for commit in commits if reason in commit.refused], reason, shown))
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _names(run: Run, commits: Iterable[Commit], reason: str, shown: int) -> list[str]:
    names = list[str]()
    for commit in commits:
        if len(names) >= shown:
            break
        images = read_file(run.uri, commit.file("images"), ["uri", "key", "error"])
        names += [_name(row) for row in images.filter(pc.equal(images["error"], reason)).to_pylist()]
    return names[:shown]


def _name(row: dict[str, str]) -> str:
    """An image of a shard by its key; what stands for the lost rest of a shard has no key, and is called as the shard is."""
    return row["key"] or row["uri"]


def refused_chunks(run: Run, commits: Iterable[Commit], reasons: Collection[str]) -> pa.Table:
    """The PLAN rows of chunks that hold images refused for these reasons, with the indices of these images in `only`.

    Not the row that stands for the unknown rest of a shard that was damaged when it was planned: the plan knows no image there.
    """
    plan, indices = run.plan(), dict[int, list[int]]()
    for commit in commits:
        if commit.refused.keys() & set(reasons):
            images = read_file(run.uri, commit.file("images"), ["image_id", "error"])
            found = images.filter(pc.is_in(images["error"], pa.array(reasons, pa.string())))
            indices[commit.chunk_id] = index_of(found["image_id"].to_numpy()).tolist()
    rows = plan.filter(pc.is_in(plan["chunk_id"], pa.array(indices, pa.int64()))).to_pylist()
    for row in rows:
        of_damage = row["end"] - 1 if row["damage"] is not None else -1
        row["only"] = [index for index in indices[row["chunk_id"]] if index != of_damage]
    return pa.Table.from_pylist([row for row in rows if row["only"]], schema=PART)

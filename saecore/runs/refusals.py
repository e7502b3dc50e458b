"""Images that a run refused: of each reason how many, and the names of the first few.

All of them are the rows of the table `images` whose column `error` is not null. Only the files of a few chunks are read here:
the commit records say which chunks refused an image, and why.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import pyarrow.compute as pc

from saecore.runs.files import chunk_file, read_file
from saecore.runs.run import Commit, Run

SHOWN = 3
"""Names of each reason."""


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
        images = read_file(run.uri, chunk_file("images", commit.chunk_id), ["uri", "key", "error"])
        names += [_name(row) for row in images.filter(pc.equal(images["error"], reason)).to_pylist()]
    return names[:shown]


def _name(row: dict[str, str]) -> str:
    """An image of a shard by its key; what stands for the lost rest of a shard has no key, and is called as the shard is."""
    return row["key"] or row["uri"]

"""Tell what has changed in a run's inputs since its plan was made.

A run is made of the inputs that its plan lists. A chunk that is done keeps its results if its input is gone or has changed. A
chunk that is not done needs its input as it was. New inputs are no part of a run until it grows (`saecore.pipeline.growth`).
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from saecore.images.chunks import SCANNERS, empty_shards
from saecore.images.listing import Shard
from saecore.storage import Place, join_uri


class Changes(NamedTuple):
    """Addresses of shards, and of images in folders."""

    gone: list[str]
    new: list[str]
    changed: list[str]
    """Shards of another size, or written since; for images of a folder, the folder."""

    def __str__(self) -> str:
        """How many of each kind, and the names of the first."""
        kinds = zip(("no longer listed", "new", "changed in size or time"), self, strict=True)
        return ", ".join(f"{len(names):,} {kind} ({shortened(names)})" for kind, names in kinds if names)

    def of(self, chunks: pa.Table) -> "Changes":
        """The changes to the inputs of some chunks of the plan. Nothing of them is new."""
        files = {file for uri, state in _planned(chunks).items() for file in (uri, *_files(uri, state))}
        gone, changed = ([name for name in names if name in files] for names in (self.gone, self.changed))
        return Changes(gone, [], changed)


class _State(NamedTuple):
    """Size, time and names of a file, or of all listed files of a folder."""

    bytes: int
    mtime_ns: int
    members: frozenset[str] | None


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, in words."""
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")


def since(plan: pa.Table, shards: Iterable[Shard], is_limited: bool) -> Changes:
    """The changes from the inputs of a plan to those that are listed now.

    A limited plan holds only the first of its inputs, so that no input counts as new.
    """
    before, now = _planned(plan), _states(shards)
    changes = Changes([], [], [])
    for uri in sorted(before.keys() | now.keys()):
        old, new = before.get(uri), now.get(uri)
        if old is not None and new is not None and old.members == new.members:
            changes.changed.extend([uri] if old != new else [])
            continue
        old_files, new_files = _files(uri, old), _files(uri, new)
        changes.gone.extend(sorted(old_files - new_files))
        changes.new.extend([] if is_limited else sorted(new_files - old_files))
    known = set(empty_shards(plan))
    return changes._replace(new=[uri for uri in changes.new if uri not in known])


def other_files(chunks: pa.Table) -> list[str]:
    """The tars and Parquet files of some chunks of a plan that are gone, or have another size than when they were planned."""
    files = chunks.filter(pc.not_equal(chunks["kind"], "folder"))
    planned = dict(zip(files["uri"].to_pylist(), files["bytes"].to_pylist(), strict=True))
    with ThreadPoolExecutor(SCANNERS) as pool:
        sizes = pool.map(lambda uri: Place(uri).info().size, planned)
        return [uri for uri, size in zip(planned, sizes, strict=True) if size != planned[uri]]


def _planned(plan: pa.Table) -> dict[str, _State]:
    """The inputs of a plan. Each chunk of a folder repeats the size and time of its shard, and holds a part of its names."""
    shards: dict[int, Shard] = {}
    for row in plan.select(["shard_id", "uri", "kind", "bytes", "mtime_ns", "members"]).to_pylist():
        shard_id, members = row.pop("shard_id"), row.pop("members")
        if shard_id in shards and members is not None:
            members = [*(shards[shard_id].members or []), *members]
        shards[shard_id] = Shard(**row, members=members)
    return _states(shards.values())


def _states(shards: Iterable[Shard]) -> dict[str, _State]:
    """Shards by their address; those of one folder are joined."""
    states: dict[str, _State] = {}
    for shard in shards:
        other = states.get(shard.uri)
        state = _State(shard.bytes, shard.mtime_ns, None if shard.members is None else frozenset(shard.members))
        if other is not None and other.members is not None and state.members is not None:
            total, newest = state.bytes + other.bytes, max(state.mtime_ns, other.mtime_ns)
            state = _State(total, newest, state.members | other.members)
        states[shard.uri] = state
    return states


def _files(uri: str, state: _State | None) -> set[str]:
    """The address of a shard, or the addresses of a folder's images; none if there is no such input."""
    if state is None or state.members is None:
        return set() if state is None else {uri}
    return {join_uri(uri, name) for name in state.members}

"""What has changed in a run's inputs since its plan was made.

A run is made of the inputs that its plan lists. Those that are gone or have changed take nothing away from a run that is
complete, new ones are no part of it; a run that is not complete needs its inputs as they were.

Left out: growing a run by new shards.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa

from saecore.images.chunks import empty_shards
from saecore.images.listing import Shard
from saecore.storage import join_uri


class Changes(NamedTuple):
    """Addresses of shards, and of images that lie in folders."""

    gone: list[str]
    new: list[str]
    changed: list[str]
    """Of another size, or written since; for images of a folder, the folder."""

    def __str__(self) -> str:
        """How many, and the first by name."""
        whats = zip(("no longer listed", "new", "changed in size or time"), self, strict=True)
        return ", ".join(f"{len(found):,} {what} ({shortened(found)})" for what, found in whats if found)


class _Held(NamedTuple):
    """A file, or all files of a folder."""

    bytes: int
    mtime_ns: int
    members: frozenset[str] | None


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first of the names."""
    return ", ".join(names[:most]) + (", .." if len(names) > most else "")


def since(plan: pa.Table, shards: Iterable[Shard], is_limited: bool) -> Changes:
    """From the inputs of a plan to those that are listed now. A limited plan holds the first of its inputs only: what it does
    not hold is not called new."""
    before, now = _planned(plan), _held(shards)
    changes = Changes([], [], [])
    for uri in sorted(before.keys() | now.keys()):
        old, new = before.get(uri), now.get(uri)
        if old is not None and new is not None and old.members == new.members:
            changes.changed.extend([uri] if old != new else [])
            continue
        lost, found = (_files(uri, one) for one in (old, new))
        changes.gone.extend(sorted(lost - found))
        changes.new.extend([] if is_limited else sorted(found - lost))
    known = set(empty_shards(plan))
    return changes._replace(new=[uri for uri in changes.new if uri not in known])


def _planned(plan: pa.Table) -> dict[str, _Held]:
    """A folder's chunks repeat the size and time of their shard, and hold its names between them."""
    shards: dict[int, Shard] = {}
    for row in plan.select(["shard_id", "uri", "kind", "bytes", "mtime_ns", "members"]).to_pylist():
        shard_id, members = row.pop("shard_id"), row.pop("members")
        if shard_id in shards and members is not None:
            members = [*(shards[shard_id].members or []), *members]
        shards[shard_id] = Shard(**row, members=members)
    return _held(shards.values())


def _held(shards: Iterable[Shard]) -> dict[str, _Held]:
    """Shards by address, those of a folder together."""
    held: dict[str, _Held] = {}
    for shard in shards:
        other = held.get(shard.uri)
        one = _Held(shard.bytes, shard.mtime_ns, None if shard.members is None else frozenset(shard.members))
        if other is not None and other.members is not None and one.members is not None:
            total, newest = one.bytes + other.bytes, max(one.mtime_ns, other.mtime_ns)
            one = _Held(total, newest, one.members | other.members)
        held[shard.uri] = one
    return held


def _files(uri: str, held: _Held | None) -> set[str]:
    """The address of a shard, or those of a folder's images."""
    if held is None or held.members is None:
        return set() if held is None else {uri}
    return {join_uri(uri, name) for name in held.members}

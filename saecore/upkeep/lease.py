"""A lease on a run folder: of several processes that want to write there, one at a time holds it, on any file system.

    RUN/.lease-{id}.json     a claim: who wants to write, or does; a process writes its own claim and no other

pyarrow's file systems have no conditional write (version 26), so a lease is made of files with names of their own. To acquire
it, a process writes its claim, then lists the claims, and holds the lease if it sees no other claim that lives. The store must
show in a listing what was written before (Amazon S3, Google Cloud Storage and local disks do).

**Why two never hold it.** Say A and B both saw no other claim, and A wrote its claim first. B listed after it had written its
own, so after A had written, and the claim of A stays until A ends: B saw it. So one of them did not hold the lease. No clock
and no waiting time is part of this. Two that write at the same moment may both see each other: the one with the smaller id
stays, the other one withdraws.

**How a dead one's lease ends.** The holder writes its claim again every `Times.renew` seconds. A claim is dead if its process
is known to have ended (it ran on this machine), or if its time of change lies more than `Times.lease` seconds before that of
a claim that was written just now. The store's own times are compared, and no clock of a machine. Whoever finds a claim dead
names it in its own claim (`Claim.over`) before it goes on. A holder that finds another one holding over it stops
(`TakenError`). A silent holder on another machine is waited for: its next sign of life refuses the newcomer, and if there is
none until its lease ends, the newcomer holds.

**What this cannot exclude.** A holder that was paused for longer than the lease, or could not reach the store for so long,
works besides the one that took over until it renews its lease. So the safety of data never rests on the lease: the names and
the content of a chunk's files follow from the plan. Two at once do work twice and write equal files. Columns of latents.parquet
may be lost in that case; running that job again writes them. On a network disk that answers listings from a cache, two jobs
that begin on two machines within the time of that cache may both begin.
"""

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from saecore.storage import Place, StorageError, join_uri, write_atomic
from saecore.upkeep.holder import Holder

PREFIX, ENDING = ".lease-", ".json"


class Times(NamedTuple):
    """Seconds."""

    lease: float = 60.0
    """A claim that is not renewed for so long is dead. Four renewals may fail, or wait for other work of their process."""
    renew: float = 15.0
    poll: float = 1.0
    """Between two looks at a silent holder."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """The content of a claim's file."""

    id: str
    holder: Holder
    held: bool = False
    """False while it only asks for the lease."""
    over: tuple[str, ...] = ()
    """Ids of the claims that it takes for dead."""


class Seen(NamedTuple):
    """A claim as it lies in the store."""

    claim: Claim
    changed: float
    """When it was written last, in seconds, by the store."""


class HeldError(ValueError):
    """Another process writes into the run folder; says who."""


class TakenError(StorageError):
    """Another process holds the lease of this one, which gave no sign of life for too long; says who."""


class Store(Protocol):
    """Where claims lie. A listing shows all that was written before it."""

    def write(self, claim: Claim) -> None: ...

    def seen(self) -> dict[str, Seen]: ...

    def remove(self, claim_id: str) -> None: ...


class Folder:
    """The claims in a run folder."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def write(self, claim: Claim) -> None:
        """Write a claim, or write it again."""
        write_atomic(self._file(claim.id), json.dumps(dataclasses.asdict(claim)).encode())

    def seen(self) -> dict[str, Seen]:
        """All claims by their ids."""
        place = Place(self.uri)
        found = {}
        for info in place.entries():
            if info.base_name.startswith(PREFIX) and info.base_name.endswith(ENDING):
                with contextlib.suppress(FileNotFoundError):  # withdrawn since it was listed
                    with place.open(info.path) as file:
                        claim = _claim(file.read())
                    if claim is not None:
                        found[claim.id] = Seen(claim, info.mtime_ns / 1e9)
        return found

    def remove(self, claim_id: str) -> None:
        """Remove a claim, if it is there."""
        place = Place(self._file(claim_id))
        with contextlib.suppress(FileNotFoundError):
            place.remove()

    def _file(self, claim_id: str) -> str:
        return join_uri(self.uri, f"{PREFIX}{claim_id}{ENDING}")


def _claim(content: bytes) -> Claim | None:
    """A claim from its file; None for what no version of this program wrote."""
    try:
        held: dict[str, Any] = json.loads(content)
        return Claim(held["id"], Holder(**held["holder"]), held["held"], tuple(held["over"]))
    except (ValueError, TypeError, KeyError):
        return None


class Lease:
    """A lease that this process holds."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self.store, self.claim = store, claim

    def renew(self) -> None:
        """Give a sign of life; `TakenError` if another process has taken this one for dead."""
        self._check(self.store.seen(), must_be_there=True)
        self.store.write(self.claim)
        self._check(self.store.seen(), must_be_there=False)

    def _check(self, seen: dict[str, Seen], must_be_there: bool) -> None:
        for other in seen.values():
            if other.claim.held and self.claim.id in other.claim.over:
                raise TakenError(
                    f"this job was taken for dead, since it gave no sign of life: {other.claim.holder.words()}, went on"
                )
        if must_be_there and self.claim.id not in seen:
            raise TakenError(
                "this job was taken for dead, since it gave no sign of life: another process has held the folder since"
            )

    def release(self) -> None:
        """End the lease."""
        self.store.remove(self.claim.id)


def acquire(
    store: Store,
    holder: Holder,
    times: Times,
    what: str,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Lease:
    """The lease, perhaps after waiting for that of a silent holder to end; `HeldError` if another process holds it.

    `what` names the folder in sentences; `say` is told of a wait.
    """
    asking = _Asking(store, Claim(uuid.uuid4().hex, holder), times, what, clock)
    try:
        while (living := asking.look()) != []:
            if living is not None:
                asking.refuse(living)
                if not asking.first_seen and not living[0].claim.holder.is_alive():
                    wait = f"waiting up to {times.lease:g} s for its next sign of life"
                    say(f"{_in_use(what, living[0], asking.now)}; {wait}")
                asking.first_seen |= {
                    one.claim.id: one.changed for one in living if one.claim.id not in asking.first_seen
                }
                sleep(times.poll)
        asking.hold()
    except BaseException:
        with contextlib.suppress(OSError):
            store.remove(asking.claim.id)
        raise
    for claim_id in asking.dead:
        with contextlib.suppress(OSError):
            store.remove(claim_id)
    return Lease(store, asking.claim)


class _Asking:
    """A process that asks for the lease."""

    def __init__(self, store: Store, claim: Claim, times: Times, what: str, clock: Callable[[], float]) -> None:
        self.store, self.claim, self.times, self.what, self.clock = store, claim, times, what, clock
        self.now = 0.0
        """The store's time."""
        self.dead: dict[str, Seen] = {}
        self.first_seen: dict[str, float] = {}
        """When the claims that are waited for had changed, as this process first saw them."""

    def look(self) -> list[Seen] | None:
        """Ask, and see which other claims live; None if what was seen does not count, and is to be looked at again."""
        began = self.clock()
        self.store.write(self.claim)
        seen = self.store.seen()
        if self.clock() - began > self.times.lease / 2:
            return None  # this process was paused: what it saw may be old
        own = seen.pop(self.claim.id, None)
        if own is None:  # taken for dead, while it asked
            self.claim = dataclasses.replace(self.claim, id=uuid.uuid4().hex)
            return None
        self.now = own.changed
        self.dead = {claim_id: other for claim_id, other in seen.items() if _is_dead(other, self.now, self.times)}
        if not self.dead.keys() <= set(self.claim.over):
            self.claim = dataclasses.replace(self.claim, over=tuple(sorted(self.dead.keys() | set(self.claim.over))))
            return None
        return [other for claim_id, other in seen.items() if claim_id not in self.dead]

    def refuse(self, living: Iterable[Seen]) -> None:
        """`HeldError` if one goes before this process: it holds the lease and shows life, or asked with a smaller id."""
        for other in living:
            before = self.first_seen.get(other.claim.id)
            # One that was just killed may need a moment to end, so that it is looked at twice.
            shows_life = before is not None and (other.claim.holder.is_alive() or other.changed > before)
            if shows_life if other.claim.held else other.claim.id < self.claim.id:
                raise HeldError(f"{_in_use(self.what, other, self.now)}; wait until it has ended, or end it")

    def hold(self) -> None:
        """Say that this process holds the lease; `HeldError` if one that it took for dead comes back meanwhile."""
        self.claim = dataclasses.replace(self.claim, held=True)
        self.store.write(self.claim)
        if self.dead:
            seen = self.store.seen()
            for claim_id, before in self.dead.items():
                if claim_id in seen and seen[claim_id].changed > before.changed:
                    raise HeldError(f"{_in_use(self.what, before, self.now)}; wait until it has ended, or end it")


def _is_dead(other: Seen, now: float, times: Times) -> bool:
    if other.claim.holder.is_alive():
        return False
    return other.claim.holder.is_gone() or now - other.changed > times.lease


def _in_use(what: str, other: Seen, now: float) -> str:
    ago = max(0, round(now - other.changed))
    return f"{what} is in use: {other.claim.holder.words()}, last sign of life {ago} s ago, writes into it"

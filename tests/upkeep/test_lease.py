"""The lease: in thousands of interleavings of several processes never two hold it, and a dead one's ends."""

import random
import threading

import pytest

from saecore.upkeep import lease
from saecore.upkeep.holder import Holder
from saecore.upkeep.lease import Claim, HeldError, Seen, TakenError, Times, acquire

TIMES = Times()

SLOWEST = 5.0
"""The longest that one operation of the store takes in a simulation: three in a row are far less than a lease."""


class Killed(BaseException):
    """Ends a simulated process where it stands."""


class World:
    """A store, a clock, and processes that take turns: one operation of one process at a time, in an order drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 0.0
        self.claims: dict[str, Seen] = {}
        self.processes: list[Process] = []
        self.holders: set[str] = set()
        self.most_at_once = 0
        self.outcomes: dict[str, str] = {}

    def run(self) -> None:
        for process in self.processes:
            process.thread.start()
            process.stopped.wait(10)
        while waiting := [process for process in self.processes if not process.ended]:
            ready = [process for process in waiting if process.wakes <= self.now]
            if not ready:
                self.now = min(process.wakes for process in waiting)
                continue
            self.draw.choice(ready).step()
            self.most_at_once = max(self.most_at_once, len(self.holders))

    def hold(self, name: str) -> None:
        self.holders.add(name)
        self.most_at_once = max(self.most_at_once, len(self.holders))


class Process:
    """A simulated process, which is the `lease.Store` of its own protocol: each operation waits for its turn."""

    def __init__(self, world: World, name: str, begins: float, lives: float, works: float, pause: float = 0.0) -> None:
        self.world, self.name, self.wakes, self.works, self.pause = world, name, begins, works, pause
        self.dies = begins + lives
        self.turn, self.stopped = threading.Event(), threading.Event()
        self.ended = False
        self.thread = threading.Thread(target=self.work, daemon=True)
        world.processes.append(self)

    def step(self) -> None:
        self.stopped.clear()
        self.turn.set()
        assert self.stopped.wait(10)

    def wait(self, seconds: float) -> None:
        """Let others go on; the next operation happens that much later, or never."""
        self.wakes = max(self.wakes, self.world.now + seconds)
        self.stopped.set()
        assert self.turn.wait(10)
        self.turn.clear()
        if self.world.now >= self.dies:
            raise Killed

    def write(self, claim: Claim) -> None:
        self.wait(self.world.draw.random() * SLOWEST)
        self.world.claims[claim.id] = Seen(claim, self.world.now)

    def seen(self) -> dict[str, Seen]:
        self.wait(self.world.draw.random() * SLOWEST)
        return dict(self.world.claims)

    def remove(self, claim_id: str) -> None:
        self.wait(self.world.draw.random() * SLOWEST)
        self.world.claims.pop(claim_id, None)

    def work(self) -> None:
        world, outcome = self.world, "killed"
        try:
            self.wait(0.0)
            holder = Holder(self.name, 1, "job", 0.0, self.name, "")
            held = acquire(self, holder, TIMES, "RUN", lambda _: None, self.wait, lambda: world.now)
            world.hold(self.name)
            until = world.now + self.works
            while world.now < until:
                self.wait(TIMES.renew)
                if self.pause:
                    self.wait(self.pause)
                    self.pause = 0.0
                held.renew()
            world.holders.discard(self.name)
            held.release()
            outcome = "worked"
        except HeldError:
            outcome = "refused"
        except TakenError:
            outcome = "taken"
        except Killed:
            pass
        finally:
            world.holders.discard(self.name)
            world.outcomes[self.name] = outcome
            self.ended = True
            self.stopped.set()


def simulate(seed: int, n: int = 3, kind: type[Process] = Process) -> World:
    """Some processes that begin at about the same time; some are killed. None is silent for as long as a lease and goes on."""
    world = World(seed)
    for number in range(n):
        lives = world.draw.choice([1e9, world.draw.random() * 60])
        kind(world, f"p{number}", world.draw.random() * 20, lives, world.draw.random() * 90)
    # Long after all others have ended or died: a lease that never ends would refuse it.
    kind(world, "last", 2_000.0, 1e9, 10.0)
    world.run()
    return world


SEEDS = range(400)


def test_never_two_hold_it_and_a_dead_ones_lease_ends() -> None:
    outcomes = list[str]()
    for seed in SEEDS:
        world = simulate(seed)
        assert world.most_at_once == 1, seed
        assert world.outcomes["last"] == "worked", (seed, world.outcomes)
        assert "taken" not in world.outcomes.values()
        outcomes += world.outcomes.values()
    assert min(outcomes.count(kind) for kind in ("worked", "refused", "killed")) > 100, "each happens often"


def one_after_the_other(seed: int, lives: float, works: float, then: float, pause: float = 0.0) -> World:
    """A holder from 0 s on, and one that asks at 50 s."""
    world = World(seed)
    Process(world, "first", 0.0, lives, works, pause)
    Process(world, "next", 50.0, 1e9, then)
    world.run()
    return world


@pytest.mark.parametrize("seed", range(20))
def test_a_newcomer_and_a_holder(seed: int) -> None:
    """That died at 40 s, that works on, that was paused for longer than its lease and comes back."""
    dead = one_after_the_other(seed, lives=40.0, works=1e9, then=1.0)
    assert dead.outcomes == {"first": "killed", "next": "worked"}
    assert dead.now < 40 + TIMES.lease + TIMES.renew + 10 * SLOWEST, "the wait ends soon after the lease"
    living = one_after_the_other(seed, lives=1e9, works=500.0, then=1.0)
    assert living.outcomes == {"first": "worked", "next": "refused"}
    zombie = one_after_the_other(seed, lives=1e9, works=1e4, then=1e3, pause=200.0)
    assert zombie.outcomes == {"first": "taken", "next": "worked"}


# ---- The simulation finds what is wrong: each of these breaks the protocol in one place.


class ListsBeforeItWrites(Process):
    """What others wrote between the two is not seen."""

    def write(self, claim: Claim) -> None:
        if claim.held:
            return super().write(claim)
        self.asked = claim
        return None

    def seen(self) -> dict[str, Seen]:
        seen = super().seen()
        super().write(self.asked)
        return seen | {self.asked.id: Seen(self.asked, self.world.now)}


class SeesOnlyThoseThatHold(Process):
    """Two that ask at once do not see each other."""

    def seen(self) -> dict[str, Seen]:
        return {key: one for key, one in super().seen().items() if one.claim.held or one.claim.holder.host == self.name}


@pytest.mark.parametrize("mutant", [ListsBeforeItWrites, SeesOnlyThoseThatHold])
def test_a_broken_protocol_is_found(mutant: type[Process]) -> None:
    assert any(simulate(seed, kind=mutant).most_at_once > 1 for seed in SEEDS)


def test_a_lease_that_ends_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_is_dead", lambda other, now, times: now - other.changed > times.renew / 2)
    found = [simulate(seed) for seed in range(100)]
    assert any(world.most_at_once > 1 or "taken" in world.outcomes.values() for world in found)


def test_a_lease_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_is_dead", lambda other, now, times: False)
    world = World(0)
    Process(world, "dead", 0.0, 40.0, 1e9)
    Process(world, "next", 50.0, 1_000.0, 1.0)
    world.run()
    assert world.outcomes["next"] == "killed", "it waits for ever"

"""The arguments of `python -m benchmarks chaos`, whose rounds are in `benchmarks.chaos`."""

import dataclasses
import math
import os
import platform
import tempfile
from pathlib import Path

from jobs import commands


@dataclasses.dataclass(frozen=True)
class Chaos:
    """Faults at random moments of the job, on Ray and in one process, and what becomes of the rows after at most one more run
    of the same command. Exit code 1 if a row is lost, double or unequal, or if finished work was done again."""

    faults: int = 200
    """Faults that have to hit. One that comes too late to hit anything does not count."""
    kinds: tuple[str, ...] = ()
    """Kinds of faults; nothing is all."""
    where: tuple[str, ...] = ("ray", "local", "nodes")
    """Where the job runs: ray, local, or nodes, which is a Ray of two nodes on this machine."""
    seed: int = 0
    """Says which faults come, and when."""
    images: int = 192
    """Images of each run, in four shards."""
    chunk_size: int = 8
    """Images per chunk."""
    json: str = ""
    """A file to which each round is appended as a line of JSON. The rounds in it count, so that the same command goes on."""
    seconds: float = math.inf
    """No round is begun after this time. With --json, the same command goes on from there."""
    folder: str = ""
    """Where runs are made; nothing is a temporary folder. A folder that is named keeps the undisturbed runs."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        from benchmarks.faults import KINDS

        commands.at_least(self, faults=1, images=16, chunk_size=1)
        if wrong := set(self.where) - KINDS.keys():
            raise ValueError(f"--where {wrong.pop()}: must be of {', '.join(KINDS)}")
        if wrong := set(self.kinds) - {kind for where in self.where for kind in KINDS[where]}:
            raise ValueError(f"--kinds {wrong.pop()}: no such faults --where {' '.join(self.where)}")

    def tell(self) -> int:
        """Play the rounds, and print."""
        from benchmarks import aftermath, chaos

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(self.folder or temporary).absolute()
            settings = chaos.Settings(folder, self.images, self.chunk_size, self.seed, self.kinds, self.where)
            played = []
            for each in chaos.measure(settings, self.faults, Path(self.json) if self.json else None, self.seconds):
                played.append(each)
                print(aftermath.line(each), flush=True)
        good, said = aftermath.verdict(played, self.faults)
        print(f"{platform.machine()}, {os.cpu_count()} CPUs", aftermath.table(played), said, sep="\n\n")
        return 0 if good else 1

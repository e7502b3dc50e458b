"""What a command and all that it starts take of the CPUs, seen from outside, and what other programs take meanwhile.

    command -> Watched: seconds, samples of CPU time, the first moment of each kind of process

CPU time is /proc's, of the command and of every process below it. What a process takes between the last look at it and its end
is missed, `EVERY` seconds of it at most. Needs Linux.
"""

import os
import subprocess
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.load import descendants

EVERY = 0.2
"""Seconds between two looks. A look takes 3 to 10 ms of CPU, which count as other programs' time."""

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds of one unit in which /proc counts CPU time."""


class Sample(NamedTuple):
    """What was used up to a moment."""

    moment: float
    """As `time.time` gives it."""
    own: float
    """CPU seconds of the command and of what it started, those that have ended too."""
    all: float
    """CPU seconds of the machine since it started, all programs together. Time that other machines of the same host took
    counts too."""


class Watched(NamedTuple):
    """A command that has ended."""

    code: int
    """Its exit code."""
    began: float
    """The moment at which it was started, as `time.time` gives it."""
    ended: float
    samples: list[Sample]
    seen: dict[str, float]
    """By mark: the moment at which a process was first seen whose command line holds it."""

    @property
    def seconds(self) -> float:
        """From its start to its end."""
        return self.ended - self.began

    def used(self, start: float, end: float) -> tuple[float, float]:
        """CPU seconds between two moments: of the command, and of all other programs."""
        first, last = self._at(start), self._at(end)
        return last.own - first.own, (last.all - last.own) - (first.all - first.own)

    def _at(self, moment: float) -> Sample:
        """The sample nearest to a moment."""
        place = bisect_left(self.samples, moment, key=lambda sample: sample.moment)
        near = self.samples[max(place - 1, 0) : place + 1]
        return min(near, key=lambda sample: abs(sample.moment - moment))


def watch(
    command: Sequence[str], output: Path, marks: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Watched:
    """Run a command to its end. Both of its outputs go to the file `output`."""
    used, samples, seen = dict[int, float](), list[Sample](), dict[str, float]()
    began = time.time()
    with open(output, "wb") as sink, subprocess.Popen(command, stdout=sink, stderr=sink, env=environment) as process:
        try:
            while True:
                has_ended = process.poll() is not None  # asked before the look, so that one look comes after the end
                pids = descendants(process.pid)
                used |= {pid: seconds for pid in pids if (seconds := cpu_seconds(pid))}
                moment = time.time()
                samples.append(Sample(moment, sum(used.values()), machine_seconds()))
                for mark in set(marks) - seen.keys():
                    if any(mark in _read(f"/proc/{pid}/cmdline") for pid in pids):
                        seen[mark] = moment
                if has_ended:
                    return Watched(process.returncode, began, moment, samples, seen)
                time.sleep(EVERY)
        except BaseException:
            process.terminate()  # it would go on, and this process would wait for it
            raise


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far; 0 if it has ended."""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) * TICK if stat else 0.0


def machine_seconds() -> float:
    """CPU seconds of all programs since the machine started, and what the host gave to other machines."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, _read("/proc/stat").splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) * TICK


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _read(path: str) -> str:
    """A file of /proc; "" if its process has ended."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""

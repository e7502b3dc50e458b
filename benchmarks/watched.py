"""Inside the processes of a job that `benchmarks.faults` disturbs: count what is explained, wait at a step, refuse to write.

Every process of the job, Ray's workers too, runs `watch` when Python starts: the harness puts a folder with a `sitecustomize`
on PYTHONPATH. So the job itself has no hook for tests. Steps are seen by Python's audit events, which name every file that is
opened or renamed:

    open PATH N         before the temporary file of PATH is opened
    rename PATH N       before it gets its final name
    renamed PATH N      after that, before the folder is synced

PATH is a file below the run, and N counts how often the process has done this. The harness and the processes meet in a folder:

    wait                a step; the process that reaches it renames this file to waiting-PID, and waits until it is killed
    go                  or until this file is there
    refuse              while it is there, nothing can be written below the run
    explained           a line for every chunk that a replica begins to explain: nanoseconds since 1970, chunk_id

Left out: files that are not written from Python. Writes of a run all are.
"""

import errno
import functools
import importlib.util
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FOLDER, RUN = "RELMAP_CHAOS_FOLDER", "RELMAP_CHAOS_RUN"
"""Environment variables: where the harness and the processes meet, and the run."""

STEPS = "saecore.pipeline.steps"

WAITS_SECONDS = 60.0
"""A process that nobody kills goes on after this time."""


def watch() -> None:
    """Begin to look at this process, if it belongs to a job that is disturbed."""
    if FOLDER in os.environ:
        seen = Seen(os.environ[FOLDER], os.environ[RUN])
        sys.addaudithook(seen.event)
        sys.meta_path.insert(0, Counting(seen.folder))


class Own(threading.local):
    """What each thread has of its own: a replica writes several chunks at once."""

    renamed: str = ""
    """The file that was renamed last."""
    is_busy: bool = False
    """Whether an event is being looked at: that opens files too."""


class Seen:
    """The steps of this process so far."""

    def __init__(self, folder: str, run: str) -> None:
        self.folder, self.run = folder, run
        self.counts = Counter[str]()
        self.own = Own()

    def event(self, name: str, given: tuple[Any, ...]) -> None:
        """An audit hook: Python calls it before it does what the event names."""
        if name not in ("open", "os.rename") or self.own.is_busy:
            return
        self.own.is_busy = True
        try:
            if step := self.step_of(name, given):
                self.counts[step] += 1
                self.reach(f"{step} {self.counts[step]}")
        finally:
            self.own.is_busy = False

    def step_of(self, name: str, given: tuple[Any, ...]) -> str:
        """What is about to happen to a file of the run; empty for any other file."""
        paths = [str(path) for path in given[: 1 + (name == "os.rename")]]
        if name == "os.rename" and paths[1].startswith(self.run):
            self.own.renamed = paths[1]
            return f"rename {self.inside(paths[1])}"
        if name == "open" and ".tmp-" in paths[0] and paths[0].startswith(self.run):
            folder, _, file = paths[0].rpartition("/")
            return f"open {self.inside(folder + '/' + file[1:].partition('.tmp-')[0])}"
        if name == "open" and self.own.renamed and paths[0] == os.path.dirname(self.own.renamed):
            return f"renamed {self.inside(self.own.renamed)}"
        return ""

    def inside(self, path: str) -> str:
        """The path below the run."""
        return path[len(self.run) :].lstrip("/")

    def reach(self, step: str) -> None:
        """Refuse the step, or wait before it, if the harness wants that."""
        self.refuse(step)
        wanted = f"{self.folder}/wait"
        try:
            with open(wanted) as file:
                if file.read() != step:
                    return
            os.rename(wanted, f"{self.folder}/waiting-{os.getpid()}")
        except FileNotFoundError:
            return
        deadline = time.monotonic() + WAITS_SECONDS
        while time.monotonic() < deadline and not os.path.exists(f"{self.folder}/go"):
            time.sleep(0.005)
        self.refuse(step)

    def refuse(self, step: str) -> None:
        """Raise what a store that refuses raises, if the harness wants that."""
        if os.path.exists(f"{self.folder}/refuse") and not step.startswith("renamed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class Counting:
    """Finds `saecore.pipeline.steps` as Python would, and makes its replicas note each chunk that they begin."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What `importlib` asks of a finder."""
        if name != STEPS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module.Replica._compute = self.noting(module.Replica._compute)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def noting(self, compute: Any) -> Any:
        """The method, which notes its chunk first."""

        @functools.wraps(compute)
        def noted(replica: Any, chunk_id: int, decoded: Any) -> Any:
            with open(f"{self.folder}/explained", "a") as file:
                file.write(f"{time.time_ns()} {chunk_id}\n")
            return compute(replica, chunk_id, decoded)

        return noted

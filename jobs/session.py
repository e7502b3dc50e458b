"""What every job needs around its pipeline: clear mistakes, a Ray session that keeps quiet, a progress line."""

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import tyro
from rich.console import Console

from saecore.isolation import Suspects, Work

T = TypeVar("T")

LINES_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""


class MistakeError(ValueError):
    """Something the user can mend: told in one sentence, exit code 2, no traceback."""


@contextmanager
def mistakes() -> Iterator[None]:
    """ValueErrors inside are the user's to mend. Wrap the checks before the work, never the work: a bug must stay loud."""
    try:
        yield
    except ValueError as error:
        raise MistakeError(str(error)) from error


def run_job(job: Callable[[], int]) -> int:
    """A job's exit code: its own, or 2 with one sentence for a mistake."""
    try:
        return job()
    except MistakeError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


class Checked(Protocol):
    """A job's arguments."""

    def check(self) -> None:
        """ValueError for what contradicts itself. Not at construction: tyro would draw a box around the sentence."""


A = TypeVar("A", bound=Checked)


def at_least(arguments: Any, **least: float) -> None:
    """ValueError for the first argument below its least value."""
    for name, value in least.items():
        if getattr(arguments, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {value}")


def parse(kind: type[A], argv: list[str], module: str) -> A:
    """The command line's arguments; SystemExit 2 for one that does not exist, ValueError for one that cannot be."""
    arguments = tyro.cli(kind, args=argv, prog=f"python -m {module}", config=(tyro.conf.FlagCreatePairsOff,))
    arguments.check()
    return arguments


def hush() -> None:
    """No reports of transformers on loading: it takes the half of CLIP that is not asked for as weights not expected."""
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def check_templates(templates: Sequence[str]) -> None:
    """ValueError if a word cannot be put into one of them, or there is none."""
    if wrong := [template for template in templates if "{}" not in template]:
        raise ValueError(f"--templates {wrong[0]!r}: must hold {{}} where the word goes")
    if not templates:
        raise ValueError("--templates: give at least one")


@contextmanager
def quiet(out: str) -> Iterator[None]:
    """Send everything on standard error, Ray's C++ parts included, to run.log in a local run; tracebacks are not touched.

    Standard output is left to the job. What is said before there is a run folder, or on an object store, is not kept.
    """
    hush()
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            if "://" not in out and Path(out).is_dir():
                with (Path(out) / "run.log").open("ab") as log:
                    shutil.copyfileobj(said, log)


def versions() -> dict[str, str]:
    """What results may depend on, beside the models."""
    names = ("relevance-map-sae", "torch", "transformers", "ray", "pyarrow", "numpy", "pillow")
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    # Ours is not installed where a checkout is shipped as a working_dir: there the commit says it.
    return {"python": platform.python_version(), **{name: found[name] for name in names if name in found}}


def git_commit() -> str | None:
    """The checkout's commit, with a + if it was changed since; None where this is no checkout (a shipped working_dir)."""
    here = Path(__file__).parent
    answers = [
        subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    if any(answer.returncode for answer in answers):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout else "")


class Pool(NamedTuple):
    """Where the replicas run."""

    replicas: int
    device: str
    """`cpu` or `cuda`."""
    cpus_per_replica: float
    gpus_per_replica: float
    threads: int
    """CPU threads of one replica's forward; 0 leaves PyTorch's choice."""


def make_pool(replicas: int, gpus_per_replica: float, local: bool) -> Pool:
    """As many replicas as the GPUs carry, or one on the CPU; connects to Ray unless `local`. ValueError if they do not fit."""
    import torch

    if local:
        if replicas > 1:
            raise ValueError(f"--replicas {replicas} needs Ray: leave --local away")
        return Pool(1, "cuda" if torch.cuda.is_available() and gpus_per_replica else "cpu", 0.0, 0.0, 0)
    connect(replicas or 1)
    import ray

    cluster = ray.cluster_resources()
    cpus, gpus = int(cluster.get("CPU", 0)), cluster.get("GPU", 0.0)
    share = gpus_per_replica if gpus_per_replica >= 0 else (1.0 if gpus else 0.0)
    if share:
        wanted = replicas or int(gpus / share)
        if wanted < 1 or wanted * share > gpus:
            raise ValueError(
                f"{max(wanted, 1)} replicas of {share:g} GPUs need more than the {gpus:g} GPUs of this cluster"
            )
        cpus_each, threads, device = 1.0, 0, "cuda"
    else:
        wanted = replicas or 1
        # An eighth of the CPUs, at least one, is left to read, decode and write: a guess, not a measurement.
        cpus_each = float(max(1, (cpus - max(1, cpus // 8)) // wanted))
        threads, device = max(1, cpus // wanted), "cpu"
    if wanted * cpus_each + 1 > cpus:
        raise ValueError(
            f"{wanted} replicas of {cpus_each:g} CPUs leave none of the cluster's {cpus} CPUs to read images"
        )
    return Pool(wanted, device, cpus_each, share, threads)


def connect(replicas: int) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS, set by `ray job submit`), or start Ray on this machine."""
    import ray

    if ray.is_initialized():
        return
    # Ray 2.60 warns of a coming default for GPU visibility in tasks without GPUs; ours is that coming default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=os.environ["RAY_ADDRESS"], **quiet)
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
    else:
        # A replica holds a CPU for its whole life: on a single-core machine the tasks would wait for ever.
        cpus = max(os.cpu_count() or 1, replicas + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)


class Clock:
    """Seconds by step, for one chunk."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, step: str) -> None:
        """The time since the last lap was spent on `step`."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._mark
        self._mark = now

    def each(self, waiting: str, working: str, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; the time to get one is spent on `waiting`, the time until the next is asked for on `working`."""
        for item in items:
            self.lap(waiting)
            yield item
            self.lap(working)
        self.lap(waiting)


class RemoteSuspects:
    """A `saecore.isolation.Suspects` in an actor of its own, as the `Witness` that workers talk to."""

    def __init__(self) -> None:
        import ray

        # num_cpus=0: it only keeps books, and must never wait for a CPU.
        self._actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Suspects).remote()

    def begin(self, step: str, chunk_id: int, n_images: int) -> Work:
        """See `Suspects.begin`."""
        return _answer(self._actor.begin.remote(step, chunk_id, n_images))

    def enter(self, step: str, chunk_id: int, start: int, end: int) -> None:
        """See `Suspects.enter`; waits, since what is entered must be known before the worker can die of it."""
        _answer(self._actor.enter.remote(step, chunk_id, start, end))

    def done(self, step: str, chunk_id: int) -> None:
        """See `Suspects.done`."""
        _answer(self._actor.done.remote(step, chunk_id))


def _answer(reference: Any) -> Any:
    import ray

    return ray.get(reference)


class Progress:
    """One line a person can read: images done of total, images/s, refused, time left. Of `words`, none is ever refused."""

    def __init__(self, total: int, done: int, unit: str = "images") -> None:
        self.total = total
        self.unit = unit
        self.before = self.done = done
        self.refused = 0
        self.started = time.perf_counter()
        self._console = Console(highlight=False)
        self._last_line = self.started

    def add(self, done: int, refused: int) -> None:
        """Some more are done."""
        self.done += done
        self.refused += refused
        now = time.perf_counter()
        if self._console.is_terminal:
            print(f"\r{self.text()}\033[K", end="", flush=True)
        elif now - self._last_line >= LINES_EVERY and self.done < self.total:
            self._last_line = now
            print(self.text(), flush=True)

    def seconds(self) -> float:
        """Since this session began."""
        return time.perf_counter() - self.started

    def text(self) -> str:
        """The line."""
        rate = self.rate()
        left = (self.total - self.done) / rate if rate else 0.0
        refused = f"{self.refused:,} refused   " if self.unit == "images" else ""
        return (
            f"{self.done:,} of {self.total:,} {self.unit}   {rate:,.1f} {self.unit}/s   {refused}"
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )

    def rate(self) -> float:
        """Images, or words, per second of this session."""
        return (self.done - self.before) / max(self.seconds(), 1e-9)

    def close(self) -> None:
        """Leave the line standing."""
        print(f"\r{self.text()}\033[K" if self._console.is_terminal else self.text(), flush=True)

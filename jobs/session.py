"""What every job needs around its work: clear mistakes, an end in good order, quiet libraries, a progress line."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import tyro
from rich.console import Console

from saecore import storage
from saecore.storage import WriteError, check_address

from . import cluster, signals

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

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


class UnfinishedError(Exception):
    """Work that ended before its end. str() is what is done, and what the same command does next; `__cause__` is why."""


AGAIN = "the same command starts again"

RESUMES = "the same command resumes from here"


def run_job(job: Callable[[], int]) -> int:
    """A job's exit code: its own; 2 with one sentence for a mistake, 1 for a place that refuses what is written.

    Asked to end by Ctrl-C or SIGTERM it is 130 or 143, with one line that says what the same command does next; 141, without a
    word, where nobody reads on, as after `| head`. A bug is loud.
    """
    with signals.listening() as asked:
        try:
            code = job()
            sys.stdout.flush()  # not while Python ends: a reader that has gone is an exception that nobody catches there
            return code
        except MistakeError as mistake:
            print(f"error: {mistake}", file=sys.stderr)
            return 2
        except (Exception, KeyboardInterrupt) as error:
            then = str(error) if isinstance(error, UnfinishedError) else AGAIN
            if asked.number is not None or _behind(error, KeyboardInterrupt):
                print(f"stopped: {then}", file=sys.stderr, flush=True)
                if asked.number is not None and "ray" in sys.modules:
                    os._exit(asked.exit_code)  # Ray Data's threads would go on while Python ends, and complain
                return asked.exit_code
            if _behind(error, BrokenPipeError) and signals.nobody_reads():
                return signals.unread()
            if refused := _behind(error, WriteError):
                said = str(refused).splitlines()[0]  # Ray Data adds advice about its own retries
                print(f"error: {said}; {then}", file=sys.stderr)
                return 1
            if isinstance(error, UnfinishedError):
                print(f"failed: {then}", file=sys.stderr)
            raise


def _behind(error: BaseException | None, kind: type[E]) -> E | None:
    """The exception of a kind that made another: Ray brings what a worker raised as the `cause` of its own."""
    while error is not None:
        if (cause := getattr(error, "cause", None)) is not None:
            error = cause  # before Ray's own, which is of the same kind too and says a traceback
        elif isinstance(error, kind):
            return error
        else:
            error = error.__cause__
    return None


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
    check_addresses(arguments)
    arguments.check()
    return arguments


def check_addresses(arguments: Any) -> None:
    """ValueError for an argument that is almost an address, or empty where something has to be named."""
    for field in dataclasses.fields(arguments):
        given = getattr(arguments, field.name)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        for text in given if isinstance(given, tuple) else (given,):
            if isinstance(text, str) and (text or required or isinstance(given, tuple)):
                try:
                    check_address(text)
                except ValueError as error:
                    raise ValueError(f"--{field.name.replace('_', '-')}: {error}") from error


def check_writable(flag: str, folder: str) -> None:
    """ValueError, naming the flag, if no file can be written into the folder."""
    try:
        storage.check_writable(folder)
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def check_file(flag: str, file: str) -> None:
    """ValueError, naming the flag, if the file cannot be written."""
    check_writable(flag, storage.parent(file))
    if storage.is_folder(file):
        raise ValueError(f"{flag} {file} is a folder; name a file")


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


class Log:
    """Where `quiet` keeps what was said."""

    run: str = ""
    """A run of ours, once it is known to be one; nothing is kept elsewhere."""

    def keep(self, said: IO[bytes]) -> None:
        """Append to RUN/run.log, if that is a local folder; less what only looks like an error."""
        lines = [line for line in said.read().splitlines(keepends=True) if not any(noise in line for noise in NOISE)]
        if lines and self.run and "://" not in self.run and Path(self.run).is_dir():
            # A disk that is full, or read-only, has been told of where it mattered.
            with contextlib.suppress(OSError), (Path(self.run) / "run.log").open("ab") as log:
                log.writelines(lines)


NOISE = (
    # Ray Data 2.60 starts its own pools in this way and holds on to the arguments that its core warns of, at level error.
    b"has constructor arguments in the object store and max_restarts > 0",
    # Jobs have a progress line of their own.
    b"Progress bars disabled.",
)
"""Of lines that a good run brings, and that say nothing of it."""


@contextmanager
def quiet() -> Iterator[Log]:
    """Send everything on standard error, Ray's C++ parts included, to the log of a run; tracebacks are not touched.

    Standard output is left to the job. What is said where there is no run, or to one on an object store, is not kept. Asked to
    end, Ray goes down in here: it has much to say then.
    """
    hush()
    sys.stderr.flush()
    terminal, log = os.dup(2), Log()
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield log
        except BaseException as error:
            if _behind(error, KeyboardInterrupt):
                cluster.leave()
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            log.keep(said)


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


class Progress:
    """One line a person can read: images done of total, images/s, refused, time left. Of `words`, none is ever refused."""

    def __init__(self, total: int, done: int, unit: str = "images") -> None:
        self.total = total
        self.unit = unit
        self.before = self.done = done
        self.refused = 0
        self.started = time.perf_counter()
        self._out = sys.stdout
        self._console = Console(file=self._out)
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

    def leave(self) -> None:
        """What is printed next goes below the line, where there is one."""
        if self._console.is_terminal:
            print(file=self._out, flush=True)

    def close(self) -> None:
        """Leave the line standing."""
        print(f"\r{self.text()}\033[K" if self._console.is_terminal else self.text(), flush=True)

"""The terminal while a command works: a progress line, and libraries kept quiet, with their words in run.log."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from rich.console import Console

from saecore.storage import is_file, join_uri, read_bytes, write_atomic
from saecore.stores import without_secrets

from . import cluster, head

S = TypeVar("S", bound=Sized)

LINES_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""


def hush() -> None:
    """Keep transformers from reporting on a load: it calls the half of CLIP that is not loaded `unexpected weights`."""
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Log:
    """Where `quiet` keeps what libraries say."""

    run: str = ""
    """The folder of a run, once it is known to hold one; nothing is kept elsewhere."""

    def keep(self, said: IO[bytes]) -> None:
        """Append to RUN/run.log, without the lines of `NOISE` and without secrets."""
        lines = [line for line in said.read().splitlines(keepends=True) if not any(noise in line for noise in NOISE)]
        text = without_secrets(b"".join(lines).decode(errors="backslashreplace")).encode()
        # If the place is full, read-only or down, writing the run has reported that already.
        with contextlib.suppress(OSError):
            if text and "://" in self.run:
                file = join_uri(self.run, "run.log")
                write_atomic(file, (read_bytes(file) if is_file(file) else b"") + text)  # stores append nothing
            elif text and self.run and Path(self.run).is_dir():
                with (Path(self.run) / "run.log").open("ab") as log:
                    log.write(text)


NOISE = (
    # Ray Data 2.60 starts its own pools in the way that its core warns of, at level error.
    b"has constructor arguments in the object store and max_restarts > 0",
    # Said because jobs have a progress line of their own.
    b"Progress bars disabled.",
)
"""Parts of lines that every good run causes, and that say nothing about the run."""


@contextmanager
def quiet() -> Iterator[Log]:
    """Send everything on standard error, also from Ray's C++ parts, to the log of a run. Tracebacks still reach the terminal.

    Standard output belongs to the job. Where there is no run, the words are dropped. If the job ends by an exception, Ray is
    ended inside this block, since it says much then.
    """
    hush()
    sys.stderr.flush()
    terminal, log = os.dup(2), Log()
    head.terminal = terminal
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield log
        except BaseException:
            cluster.leave()
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            head.terminal = 2
            os.close(terminal)
            said.seek(0)
            log.keep(said)


class Progress:
    """One line that a person can read: images done of total, images/s, refused, time left. Other units are never refused."""

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
        """Count some more as done, and show the line."""
        self.done += done
        self.refused += refused
        now = time.perf_counter()
        if self._console.is_terminal:
            print(f"\r{self.text()}\033[K", end="", flush=True)
        elif now - self._last_line >= LINES_EVERY and self.done < self.total:
            self._last_line = now
            print(self.text(), flush=True)

    def seconds(self) -> float:
        """Seconds since this session began."""
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
        """Let what is printed next begin below the line."""
        if self._console.is_terminal:
            print(file=self._out, flush=True)

    def close(self) -> None:
        """Print the line for the last time."""
        print(f"\r{self.text()}\033[K" if self._console.is_terminal else self.text(), flush=True)


def with_progress(blocks: Iterable[S], total: int, unit: str) -> Iterator[S]:
    """The same blocks, whose lengths add up to the total, with a progress line."""
    progress = Progress(total, 0, unit)
    for block in blocks:
        yield block
        progress.add(len(block), 0)
    progress.close()

"""What a command says while it works: a progress line, quiet libraries, and run.log for what they would have said."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console

from . import cluster
from .commands import behind

LINES_EVERY = 10.0
"""Seconds between progress lines where the output is not a terminal."""


def hush() -> None:
    """No reports of transformers on loading: it takes the half of CLIP that is not asked for as weights not expected."""
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
            if behind(error, KeyboardInterrupt):
                cluster.leave()
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            log.keep(said)


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

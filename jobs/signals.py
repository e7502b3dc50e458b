"""Ctrl-C, SIGTERM, and readers that have gone: a command that is asked to end ends in good order; asked again, it ends at once.

A handler raises `Stopped` where the process stands; `commands.run_job` turns it into one line and an exit code. On the way Ray
and DuckDB may turn `Stopped` into exceptions of their own: `Asked` remembers that a signal, and no failure, was the cause.

Chunks that are worked on are worth finishing: within `finishing` the first signal leaves some seconds for that.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from . import exits

SIGNALS = (signal.SIGINT, signal.SIGTERM)

AGAIN = "the same command starts again"
"""What a person is told of a command that has done nothing yet."""


class Stopped(KeyboardInterrupt):
    """The process was asked to end. A KeyboardInterrupt, so that code that cleans up after Ctrl-C does so for SIGTERM too.

    Its argument is the signal's number.
    """


class Asked:
    """Which signal asked this process to end."""

    number: int | None = None
    """None so far."""
    finish: Callable[[], None] | None = None
    """What the first signal does in place of raising `Stopped`, while there is work to finish."""

    @property
    def exit_code(self) -> int:
        """The exit code that shells use: 143 for SIGTERM, 130 for Ctrl-C, also if that came without a signal."""
        return 128 + (self.number or signal.SIGINT)


@contextmanager
def listening() -> Iterator[Asked]:
    """Within the block the first signal raises `Stopped`, and the second ends the process at once.

    After the first signal, what is printed goes to standard error, since Ray prints a report of every actor that it ends.
    """
    asked, stdout = Asked(), sys.stdout

    def stop(number: int, frame: FrameType | None) -> None:
        if asked.number is not None:
            end_at_once(number, frame)
        asked.number = number
        if asked.finish is None:
            stop_here()
        asked.finish()

    global _asked
    with kept():
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                signal.signal(each, stop)
        before, _asked = _asked, asked
        try:
            yield asked
        finally:
            _asked = before
            sys.stdout = stdout


_asked: Asked | None = None
"""Of the innermost `listening`."""


def stop_here(*_: object) -> NoReturn:
    """Raise `Stopped`; a handler of signals too."""
    sys.stdout = sys.stderr
    raise Stopped(_asked.number if _asked else None)


@contextmanager
def finishing(chunks: int, seconds: float) -> Iterator[Callable[[], None]]:
    """Within the block the first signal does not raise `Stopped` at once: after as many more chunks, or seconds, if earlier.

    Call what is yielded each time that a chunk is done. Where the work ends first, `Stopped` is raised at its end.
    """
    asked, left = _asked, chunks
    if asked is None or not seconds or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def finish() -> None:
        # Not by print: what is being printed at this moment must not be entered again.
        some = "the chunk that is" if chunks == 1 else f"{chunks} chunks that are"
        line = f"\nfinishing {some} worked on, for at most {seconds:g} s; a second Ctrl-C ends at once\n"
        with contextlib.suppress(OSError):
            os.write(1, line.encode())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def done() -> None:
        nonlocal left
        if asked.number is not None:
            left -= 1
            if not left:
                stop_here()

    before = signal.signal(signal.SIGALRM, stop_here)
    asked.finish = finish
    try:
        yield done
        if asked.number is not None:
            stop_here()
    finally:
        asked.finish = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def kept() -> Iterator[None]:
    """Put the handlers back after the block: Ray takes SIGTERM for itself when it starts.

    Python sets handlers only in the main thread; in other threads nothing happens.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: a library set it, and Python cannot set it again
                    signal.signal(number, handler)


@contextmanager
def ending_at_once(line: str) -> Iterator[None]:
    """Within the block a signal ends the process with one line. For the time before a command has begun: nothing can be lost.

    An exception would not do: modules written in C that are being imported may turn it into one of their own.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{line}\n".encode())
        end_at_once(number, frame)

    with kept():
        if threading.current_thread() is threading.main_thread():
            for each in SIGNALS:
                signal.signal(each, stop)
        yield


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone."""
    poll = select.poll()
    poll.register(sys.__stdout__ or 1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def unread() -> int:
    """The exit code that shells use for a program whose output nobody reads. What is still in a buffer is dropped."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return exits.UNREAD


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler that waits for nothing. Ray's processes on this machine end by themselves once this process is gone."""
    os._exit(128 + number)

"""The lock of a run folder around what a job writes there: a second job is refused in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from saecore.upkeep import lock
from saecore.upkeep.lease import HeldError
from saecore.upkeep.lock import Lock

from . import commands


@contextmanager
def held(flag: str, folder: str, job: str) -> Iterator[Lock]:
    """Hold the lock of the run folder that a flag names while a job writes there; a mistake if another job holds it.

    A job that was given no run folder needs no lock.
    """
    if not folder:
        yield Lock()
        return
    try:
        with lock.alone(folder, commands.program(job), print) as lock_of_run:
            yield lock_of_run
    except HeldError as error:
        raise commands.MistakeError(f"{flag} {error}") from error

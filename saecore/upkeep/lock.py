"""One writer at a time for each run folder: a lease that is held, and renewed, while a block of code runs.

    with alone(uri, "relmap index", print) as lock:
        ...
        lock.check()        before what must not be written twice

A thread of this process renews the lease (`saecore.upkeep.lease`), and ends with the process, however that ends. A renewal that
fails is said on standard error and tried again: a store that is down for some minutes ends no run. Readers need no lock.

Limits: the lease ends while code keeps Python from running its threads for longer than three quarters of a lease. A folder that
cannot be written has no lock, since nothing can be lost there.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saecore.storage import Place, WriteError, reason
from saecore.upkeep.holder import Holder, this_process
from saecore.upkeep.lease import Folder, Lease, TakenError, Times, acquire

TIMES = Times()


class Lock:
    """What the block holds."""

    taken: TakenError | None = None
    """Why it is held no longer."""

    def check(self) -> None:
        """`TakenError` if another process has taken this one for dead, and holds the lease now."""
        if self.taken is not None:
            raise self.taken


@contextmanager
def alone(uri: str, command: str, say: Callable[[str], None], times: Times = TIMES) -> Iterator[Lock]:
    """Hold the lease of the run folder `uri`, which need not exist, in the block.

    `HeldError` if another process holds it. `say` is told if the lease of a silent one has to be waited for.
    """
    with _no_empty_folder_stays(uri):
        try:
            lease = acquire(Folder(uri), this_process(command), times, uri, say)
        except WriteError as error:
            if error.is_down:
                raise  # it may be written soon, and then by another job too
            yield Lock()
            return
        lock, ended = Lock(), threading.Event()
        thread = threading.Thread(target=_renew, args=(lock, lease, ended, times), name="lease", daemon=True)
        thread.start()
        try:
            yield lock
        finally:
            ended.set()
            thread.join(times.renew)  # a store that does not answer must not hold the end up for ever
            with contextlib.suppress(OSError):
                lease.release()


def _renew(lock: Lock, lease: Lease, ended: threading.Event, times: Times) -> None:
    while not ended.wait(times.renew):
        try:
            lease.renew()
        except TakenError as error:
            lock.taken = error
            return
        except OSError as error:
            print(f"the lease could not be renewed, and the work goes on: {reason(error)}", file=sys.stderr, flush=True)


@contextmanager
def _no_empty_folder_stays(uri: str) -> Iterator[None]:
    """After the block, remove the local folders that it made and left empty, as after a command that was refused."""
    place = Place(uri)
    missing = [
        folder for folder in (Path(place.path), *Path(place.path).parents) if place.is_local and not folder.exists()
    ]
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # never made, or not empty
                folder.rmdir()


def holder_of(uri: str, now: float, times: Times = TIMES) -> tuple[Holder, float] | None:
    """Who writes into a run folder, and how many seconds ago it gave its last sign of life; None if nobody does.

    Nothing is written for this, so that of a holder on another machine the time is compared with `now`, in seconds since 1970.
    """
    living = [
        (one.claim.holder, max(0.0, now - one.changed))
        for one in Folder(uri).seen().values()
        if one.claim.held
        and not one.claim.holder.is_gone()
        and (one.claim.holder.is_alive() or now - one.changed <= times.lease)
    ]
    return min(living, key=lambda holder: holder[1], default=None)

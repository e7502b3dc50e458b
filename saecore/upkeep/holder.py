"""Who writes into a run folder: a process, as other processes and other machines can tell it.

Whether a process of this machine lives can be asked at once. The machine is known by the number of its start and by the
namespace of its process ids, and the process by its id and by the moment at which it started, since ids are used again. Of a
process elsewhere, only the signs of life are known (`saecore.upkeep.lease`).
"""

import dataclasses
import os
import socket
import time
import uuid
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that writes into a run folder."""

    host: str
    pid: int
    command: str
    """The command without its arguments, which may name what nobody else should read."""
    since: float
    """When it began to write, in seconds since 1970, by its own clock."""
    machine: str
    """Tells machines and containers apart, where host names do not."""
    started: str
    """When the process started, in ticks since its machine did; empty where the system does not say."""

    def words(self) -> str:
        """Who it is, in words."""
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.command} on {self.host}, process {self.pid}, since {began}"

    def is_gone(self) -> bool:
        """Whether it is known to have ended. Of a process on another machine nothing is known."""
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's, so it exists
            pass
        state, started = _process(self.pid)
        return state in ("Z", "X") or bool(started and self.started and started != self.started)

    def is_alive(self) -> bool:
        """Whether it is known to live."""
        return self.machine == _machine() and not self.is_gone() and bool(_process(self.pid)[1])


def this_process(command: str) -> Holder:
    """This process, which runs a command, as a holder from now on."""
    return Holder(socket.gethostname(), os.getpid(), command, time.time(), _machine(), _process(os.getpid())[1])


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{uuid.getnode():x} {socket.gethostname()}"


def _process(pid: int) -> tuple[str, str]:
    """State and start of a process, see proc(5); empty where the system does not say."""
    try:
        # The name of the program stands in brackets before these fields, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]

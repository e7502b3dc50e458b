"""The head of a Ray that a job started itself: if it ends before the job, the job ends at once and leaves nothing behind.

Nobody starts that head (`gcs_server`) again. Ray's own way takes 61 s, says nothing, and its agents outlive the job by another
60 s, in which they try to report to the head. Left out: a cluster that was there before the job; its head may come back.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from . import exits

LOOK_SECONDS = 0.5
"""Seconds between two looks at the head."""

terminal = 2
"""Where a line reaches the user: `console.quiet` sends standard error itself to the log of a run."""


def watch() -> None:
    """Look at the head of the Ray that this process has just started, until that is shut down."""
    from ray._private import worker

    threading.Thread(target=_look, args=(worker, worker._global_node), daemon=True, name="head").start()


def _look(worker: Any, node: Any) -> None:
    [head] = node.all_processes["gcs_server"]
    while worker.is_initialized() and worker._global_node is node:
        if head.process.poll() is not None:
            # `ray.shutdown` says that it is not initialized any more before it ends the head.
            if worker.is_initialized() and worker._global_node is node:
                _end(node)
            return
        time.sleep(LOOK_SECONDS)


def _end(node: Any) -> None:
    import psutil  # Ray brings it

    os.write(terminal, b"failed: the head of Ray (gcs_server) has ended; run the same command again\n")
    started = [each.process.pid for kind in node.all_processes.values() for each in kind]
    for pid in started:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in (*process.children(recursive=True), process):  # children first, while they can be found
                with suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
    os._exit(exits.FAULT)

"""jobs.head: a job whose own Ray has lost its head ends at once with a sentence, and so do all processes of that Ray."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

SCRIPT = """
import os, subprocess, sys, threading
from types import SimpleNamespace as Named
import ray  # its psutil
from jobs import head

gcs = subprocess.Popen(["sleep", "60"])
raylet = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True)
print(gcs.pid, raylet.pid, raylet.stdout.readline(), flush=True)
node = Named(all_processes={"gcs_server": [Named(process=gcs)], "raylet": [Named(process=raylet)]})
is_there = True
worker = Named(is_initialized=lambda: is_there, _global_node=node)
looking = threading.Thread(target=head._look, args=(worker, node))
looking.start()
is_there = sys.argv[1] == "ends"  # otherwise Ray is being shut down, which ends the head too
gcs.kill()
looking.join(30)
os.killpg(raylet.pid, 9)
"""
"""Two processes that stand for a head and a raylet with one worker."""


@pytest.mark.parametrize("head", ["ends", "is ended"])
def test_a_head_that_ends(head: str) -> None:
    job = subprocess.run([sys.executable, "-c", SCRIPT, head], cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = "failed: the head of Ray (gcs_server) has ended; run the same command again\n"
    assert (job.returncode, job.stderr) == ((1, said) if head == "ends" else (0, ""))
    gcs, raylet, worker = (Path("/proc") / pid for pid in job.stdout.split())
    for process in (gcs, raylet, worker):
        # A process that was killed stays as a zombie until the one that inherited it looks.
        assert not process.exists() or "\nState:\tZ" in (process / "status").read_text()

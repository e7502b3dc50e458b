"""A cluster of several nodes on this machine, in a process of its own: its Ray is not that of the tests.

    python -m tests.helpers.nodes FOLDER

It prints the address, then obeys a line each: `add CPUS GPUS` starts a node and prints its id, `end ID` kills a node. At the
end of its input it ends the cluster. GPUs are pretended.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
"""Of every process that belongs to the cluster. Threads as in a replica with a GPU, so that sums are equal to the last bit."""


class Nodes:
    """The cluster as its starter sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.asked: IO[str] = process.stdin
        self.told: IO[str] = process.stdout
        self.address = self.told.readline().strip()

    def add(self, cpus: int, gpus: int = 0) -> str:
        """Start a node; returns its id."""
        return self._ask(f"add {cpus} {gpus}")

    def end(self, node: str) -> None:
        """Kill a node with all that runs there."""
        assert self._ask(f"end {node}") == node

    def _ask(self, line: str) -> str:
        print(line, file=self.asked, flush=True)
        return self.told.readline().strip()


@contextlib.contextmanager
def started() -> Iterator[Nodes]:
    """A head with one CPU; other nodes are added."""
    # A short path: sockets lie in it, whose names may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        environment = os.environ | ENVIRONMENT | {"RAY_TMPDIR": folder}
        words = [sys.executable, "-m", "tests.helpers.nodes"]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
            yield Nodes(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0


def serve() -> None:
    from ray.cluster_utils import Cluster

    # A node that is killed counts as dead after one second, where Ray's own setting takes 15.
    quick = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 2}
    cluster = Cluster(True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": quick})
    print(cluster.address, flush=True)
    nodes = {}
    for line in sys.stdin:
        order, *words = line.split()
        if order == "add":
            node = cluster.add_node(num_cpus=int(words[0]), num_gpus=int(words[1]))
            nodes[node.node_id] = node
            print(node.node_id, flush=True)
        else:
            cluster.remove_node(nodes.pop(words[0]), allow_graceful=False)
            print(words[0], flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    serve()

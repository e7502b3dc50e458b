"""`relmap explain` that marks on which node each step ran; its replicas use the CPU, where nodes only pretend to have GPUs.

    python -m tests.helpers.marking FOLDER ...

A mark is a line with a node's id, in FOLDER/decode or FOLDER/explain. If FOLDER/held names a node, a step that begins there
marks this and never ends: whatever ends it then, ends it in the middle of its work.
"""

import dataclasses
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa

from saecore.images.preprocess import Preprocess
from saecore.pipeline import stages


def mark(folder: str, step: str) -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    with Path(folder, step).open("a") as marks:
        print(node, file=marks, flush=True)
    if (held := Path(folder, "held")).exists() and held.read_text() == node:
        threading.Event().wait()


@dataclasses.dataclass(frozen=True)
class Decode:
    """A `stages.Decode` that marks where it runs."""

    folder: str
    inner: stages.Decode

    @property
    def preprocess(self) -> Preprocess:
        """Its pixels say how much memory a chunk takes."""
        return self.inner.preprocess

    def __call__(self, raw: pa.Table) -> pa.Table:
        mark(self.folder, "decode")
        return self.inner(raw)


class Explain(stages.Explain):
    """The stage, which marks where it runs."""

    folder = ""

    def __call__(self, decoded: pa.Table) -> pa.Table:
        mark(self.folder, "explain")
        return super().__call__(decoded)


def main(folder: str, argv: list[str]) -> int:
    from jobs import decoding, explain, pool

    def decode(*given: Any) -> Decode:
        return Decode(folder, stages.Decode(*given))

    pool.GPU_DEVICE = "cpu"
    vars(decoding)["Decode"] = decode
    vars(explain)["Explain"] = type("Explain", (Explain,), {"folder": folder})
    return explain.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""The steps of one chunk: decode; compute and write. Arrow tables of one row in and out; no Ray.

    PLAN row -> decode_chunk -> (chunk_id, DECODED, seconds) -> Replica -> counts

Between the steps a chunk's table is packed into one value of a row, so that Ray cannot split it. Before a step works on
images, it tells a `Witness` which ones. So an image that ends its worker is refused, and the others go on
(`saecore.pipeline.isolation`).

Left out: where the steps run, side by side on Ray or one after the other in one process (`jobs.pipeline`), and what a stage
computes (`saecore.pipeline.stages`).
"""

import json
import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import pyarrow as pa

from saecore import numbering, schema
from saecore.images.chunks import read_chunk
from saecore.images.decode import blank
from saecore.pipeline.clock import Clock
from saecore.pipeline.isolation import Witness, pieces, refuse, survive
from saecore.pipeline.stages import Decode
from saecore.runs.run import Commit, Run


class Stage(Protocol):
    """DECODED -> a payload, the table that `Run.write_chunk` takes."""

    step: str
    """Its name in `step_seconds` of run.json."""

    def __call__(self, decoded: pa.Table) -> pa.Table: ...


def decode_chunk(row: pa.Table, decode: Decode, witness: Witness) -> pa.Table:
    """PLAN row -> chunk_id, DECODED, seconds. Encoded images are read as a stream and dropped once they are decoded.

    A row may have the column `only`, the indices of some images in the shard: no others are read then.
    """
    chunk = row.to_pylist()[0]
    chunk_id, only, clock = chunk["chunk_id"], chunk.get("only"), Clock()
    work = witness.begin("decode", chunk_id, len(numbering.ids_of(chunk)))
    decoded, position = [], 0
    for raw in clock.each("read", "decode", read_chunk(chunk, indices=only)):
        for start, end in pieces(witness, "decode", chunk_id, work, position, position + raw.num_rows):
            piece = refuse(raw.slice(start - position, end - start), start, work.refused, "data")
            decoded.append(survive(decode, piece, "data", lambda _: blank()))
        position += raw.num_rows
    witness.done("decode", chunk_id)
    return _pack(chunk_id, pa.concat_tables(decoded), clock.seconds)


class Replica:
    """chunk_id, DECODED, seconds -> images, refused, fit, event: a small row for the driver. It computes and commits a chunk.

    The stage's models stay on their device. Several threads may call: chunks are computed one after the other, and the next
    chunk is computed while those before it are written.
    """

    def __init__(self, make_stage: Callable[[], Stage], witness: Witness, run: Run, tags: dict[str, str]) -> None:
        self.stage = make_stage()
        self.witness = witness
        self.run, self.tags = run, tags
        self._turn = threading.Lock()

    def __call__(self, row: pa.Table) -> pa.Table:
        chunk_id, decoded, seconds = _unpack(row)
        # A replica that died after its commit has not answered, so the chunk comes a second time.
        if (commit := self.run.committed(chunk_id)) is None:
            with self._turn:
                payload, computing = self._compute(chunk_id, decoded)
            commit = self.run.write_chunk(chunk_id, payload, seconds | computing, self.tags)
        return told(commit, decoded["uri"][0].as_py())

    def _compute(self, chunk_id: int, decoded: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """The stage's payload, and how many seconds it took."""
        step, clock = self.stage.step, Clock()
        work = self.witness.begin(step, chunk_id, decoded.num_rows)
        n_images, payloads = decoded.num_rows, []
        for start, end in pieces(self.witness, step, chunk_id, work, 0, n_images):
            piece = refuse(decoded.slice(start, end - start), start, work.refused, "pixels")
            payloads.append(survive(self.stage, piece, "pixels", _black))
        if work.whole:  # Values round by the batch: those of a chunk that was never halved are wanted.
            self.witness.enter(step, chunk_id, 0, n_images)
            payloads = [survive(self.stage, refuse(decoded, 0, work.refused, "pixels"), "pixels", _black)]
        self.witness.done(step, chunk_id)
        clock.lap(step)
        return pa.concat_tables(payloads), clock.seconds


def _black(pixels: bytes) -> bytes:
    """As many pixels, all black."""
    return bytes(len(pixels))


def told(commit: Commit, shard: str) -> pa.Table:
    """What the driver is told of a chunk that this process has committed."""
    event = {
        "chunk": commit.chunk_id,
        "shard": shard,
        "images": commit.images,
        "refused": commit.refused,
        "bytes": sum(file["bytes"] for file in commit.files),
        "seconds": {step: round(value, 4) for step, value in commit.seconds.items()},
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    refused = sum(commit.refused.values())
    columns = {"images": [commit.images], "refused": [refused], "fit": [list(commit.fit)], "event": [json.dumps(event)]}
    return pa.table(columns)


def _pack(chunk_id: int, table: pa.Table, seconds: dict[str, float]) -> pa.Table:
    return pa.table({"chunk_id": [chunk_id], "payload": schema.pack(table), "seconds": [json.dumps(seconds)]})


def _unpack(row: pa.Table) -> tuple[int, pa.Table, dict[str, float]]:
    return row["chunk_id"][0].as_py(), schema.unpack(row["payload"]), json.loads(row["seconds"][0].as_py())

"""The steps of one chunk: what is committed is not computed again."""

from pathlib import Path

import pyarrow as pa
import pytest

from saecore import schema
from saecore.pipeline.isolation import Suspects
from saecore.pipeline.steps import Replica
from saecore.runs.run import open_run
from tests.helpers import planted


class Counting:
    """A stage that makes the planted rows of chunk 0, and notes for how many images it was called."""

    step = "explain"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, decoded: pa.Table) -> pa.Table:
        self.calls.append(decoded.num_rows)
        return planted.explained(0, planted.METHODS)


def made(folder: Path) -> tuple[Counting, Suspects, Replica, pa.Table]:
    """A replica with its stage and its witness, and its row for a chunk of three images."""
    made_by = {"command": "python -m planted", "grid": list(planted.GRID), "n_latents": planted.N_LATENTS}
    run = open_run(str(folder), {"schema": schema.VERSION}, made_by, planted.plan)
    stage, suspects = Counting(), Suspects()
    decoded = pa.table({"uri": ["/shard-0.tar"] * 3, "pixels": pa.nulls(3, pa.binary())})
    row = pa.table({"chunk_id": [0], "payload": schema.pack(decoded), "seconds": ["{}"]})
    return stage, suspects, Replica(lambda: stage, suspects, run, {}), row


@pytest.mark.parametrize("damaged", [False, True])
def test_a_chunk_that_is_committed_is_told_again_and_not_computed_again(damaged: bool, tmp_path: Path) -> None:
    """As where Ray sends a chunk a second time, since the replica died after the commit; unless a file is damaged."""
    stage, _, replica, row = made(tmp_path)
    first = replica(row)
    if damaged:
        (tmp_path / "maps" / "chunk-00000000.parquet").write_bytes(b"cut")
    assert replica(row).drop_columns("event") == first.drop_columns("event")
    assert stage.calls == [3] * (1 + damaged)


def test_a_chunk_that_was_halved_is_computed_in_the_batches_of_one_that_was_not(tmp_path: Path) -> None:
    """Two replicas died with it. Values round by the batch, so those of the halves are not the ones that are written."""
    stage, suspects, replica, row = made(tmp_path)
    for _ in range(2):
        suspects.begin("explain", 0, 3)
        suspects.enter("explain", 0, 0, 3)
    told = replica(row)
    assert stage.calls == [1, 2, 3]
    assert told["images"].to_pylist() == [3]  # and not six

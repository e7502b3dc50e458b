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
    """A stage that makes the planted rows of chunk 0, and counts how often."""

    step = "explain"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, decoded: pa.Table) -> pa.Table:
        self.calls += 1
        return planted.explained(0, planted.METHODS)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_chunk_that_is_committed_is_told_again_and_not_computed_again(damaged: bool, tmp_path: Path) -> None:
    """As where Ray sends a chunk a second time, since the replica died after the commit; unless a file is damaged."""
    made_by = {"command": "python -m planted", "grid": list(planted.GRID), "n_latents": planted.N_LATENTS}
    run = open_run(str(tmp_path), {"schema": schema.VERSION}, made_by, planted.plan)
    stage = Counting()
    replica = Replica(lambda: stage, Suspects(), run, {})
    decoded = pa.table({"uri": ["/shard-0.tar"] * 3, "pixels": pa.nulls(3, pa.binary())})
    row = pa.table({"chunk_id": [0], "payload": schema.pack(decoded), "seconds": ["{}"]})
    first = replica(row)
    if damaged:
        (tmp_path / "maps" / "chunk-00000000.parquet").write_bytes(b"cut")
    assert replica(row).drop_columns("event") == first.drop_columns("event")
    assert stage.calls == 1 + damaged

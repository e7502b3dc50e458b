"""What is computed is committed at once, so that a kill of the driver loses no more than what is inside the replicas."""

import functools
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import pipeline
from jobs.pool import Pool
from saecore import schema
from saecore.images.chunks import plan_chunks
from saecore.images.listing import list_shards
from saecore.images.preprocess import load_preprocess
from saecore.pipeline.stages import Decode
from saecore.runs.run import open_run
from tests.conftest import N_SCENES

CHUNK = 1
"""Images a chunk. With as many chunks as scenes, "most of them first" and "one after the other" are far apart."""


class Noted:
    """A stage that computes nothing, and notes in a folder when it was done with which chunk."""

    step = "noted"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, decoded: pa.Table) -> pa.Table:
        (self.folder / f"{time.time_ns()}-{os.getpid()}").touch()
        columns = [
            decoded[field.name] if field.name in decoded.column_names else pa.nulls(decoded.num_rows, field.type)
            for field in schema.IMAGES
        ]
        return pa.Table.from_arrays(columns, schema=schema.IMAGES)


@pytest.mark.usefixtures("ray_session")
def test_computed_chunks_are_committed_at_once(shards: Path, tmp_path: Path) -> None:
    """With all CPUs but one in the hands of replicas: nothing may be left that a step for writing waits for."""
    import ray

    replicas = min(3, int(ray.cluster_resources()["CPU"]) - 1)
    plan = plan_chunks(list_shards([str(shards)]), CHUNK)
    notes = tmp_path / "notes"
    notes.mkdir()
    run = open_run(str(tmp_path / "run"), {}, {}, lambda: plan)
    pool = Pool(replicas, "cpu", 1.0, 0.0, 1, on_ray=True)
    job = pipeline.Job(run, Decode(load_preprocess("demo")), functools.partial(Noted, notes), {}, pool)
    assert sum(row["images"] for row in pipeline.on_ray(job, plan)) == N_SCENES

    computed = sorted(int(note.name.partition("-")[0]) for note in notes.iterdir())
    committed = sorted(file.stat().st_mtime_ns for file in (tmp_path / "run" / "commits").iterdir())
    assert len(computed) == len(committed) == N_SCENES
    open_at = [sum(moment <= then for moment in computed) - place for place, then in enumerate(committed)]
    # An mtime is up to a clock tick older than the commit, which only makes `open_at` smaller by a chunk or so.
    assert 1 <= max(open_at) <= replicas * pipeline.CALLS, open_at

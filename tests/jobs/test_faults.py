"""What goes wrong in a run and does not end it, and what is seen of it: rows with reasons, exit codes, the log for machines."""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import commands, explain, pipeline
from saecore.images.chunks import read_chunk
from saecore.pipeline.decoder import Limited
from tests.conftest import command
from tests.helpers.decoders import pause_on
from tests.jobs.test_jobs import DEADLY, rows

Flow = Callable[[pipeline.Job, pa.Table], Iterator[dict[str, Any]]]


@pytest.mark.parametrize("flow", [pipeline.in_process, pipeline.on_ray], ids=["local", "ray"])
def test_an_image_that_hangs_its_decoder_becomes_a_row(
    flow: Flow, ray_session: None, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    """At the first attempt, in about the time of the limit, also where the decoder keeps Python's lock."""
    arguments = command(shards, tmp_path / "run", "--limit", "32", "--ray", "--image-seconds", "1.5")
    job = explain.prepare(commands.parse(explain.Arguments, arguments, "jobs.explain"), arguments)
    assert job is not None
    assert isinstance(job.decode.decode, Limited)
    assert job.decode.decode.seconds == 1.5
    raw = pa.concat_tables(batch for chunk in job.run.plan().to_pylist() for batch in read_chunk(chunk)).to_pylist()
    (data,) = (row["data"] for row in raw if row["key"] == DEADLY)
    hanging = functools.partial(pause_on, sha256=hashlib.sha256(data).hexdigest(), decode=job.decode.decode.decode)
    job.decode.decode = dataclasses.replace(job.decode.decode, decode=hanging)
    began = time.monotonic()
    list(flow(job, job.run.pending()))
    assert time.monotonic() - began < 40
    job.run.finish(0, 0.0)
    images = rows(tmp_path / "run", "images")
    refused = {row["key"]: (row["error"], row["error_detail"]) for row in images.values() if row["error"] is not None}
    assert refused == {DEADLY: ("timed-out", "its decoder was not done after 1.5 s")}
    fine = {key[0] for key, row in images.items() if row["error"] is None}
    assert len(fine) == 31
    assert rows(tmp_path / "run", "maps").keys() == {key for key in rows(local_run, "maps") if key[0] in fine}

"""Without Ray: a chunk is decoded while the one before it is computed."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import pipeline
from saecore.images.preprocess import Preprocess
from saecore.pipeline.decoder import Limited
from saecore.pipeline.stages import Decode
from tests.conftest import command

ROOT = Path(__file__).parents[2]


PREPROCESS = Preprocess(8, (8, 8), 3, (0.0,) * 3, (1.0,) * 3, 1 / 255)


def rows(n: int) -> Iterator[pa.Table]:
    return (pa.table({"chunk_id": [number]}) for number in range(n))


def test_one_chunk_is_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    began = [threading.Event() for _ in range(4)]

    def decode(row: pa.Table, *_: object) -> pa.Table:
        number = row["chunk_id"][0].as_py()
        began[number].set()
        if number == 2:
            raise ValueError("chunk 2 is bad")
        return row

    monkeypatch.setattr(pipeline, "decode_chunk", decode)
    chunks = pipeline._decoded_ahead(Decode(PREPROCESS), rows(4))
    assert next(chunks)["chunk_id"].to_pylist() == [0]
    assert began[1].wait(5)
    assert not began[2].wait(0.1)  # one is enough: each takes memory
    assert next(chunks)["chunk_id"].to_pylist() == [1]
    with pytest.raises(ValueError, match="chunk 2 is bad"):
        next(chunks)
    assert not began[3].is_set()


def test_who_stops_waits_for_one_image_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk would never end; its thread has ended once the flow is closed."""
    asked = []

    def ask(_: Limited, data: bytes) -> None:
        asked.append(data)
        time.sleep(0.01)

    def decode(row: pa.Table, stage: Decode, _: object) -> pa.Table:
        while row["chunk_id"][0].as_py() == 1:
            stage.decode(b"an image")
        return row

    monkeypatch.setattr(pipeline, "decode_chunk", decode)
    monkeypatch.setattr(Limited, "__call__", ask)
    chunks = pipeline._decoded_ahead(Decode(PREPROCESS, seconds=60.0), rows(2))
    next(chunks)
    while not asked:
        time.sleep(0.01)
    chunks.close()
    assert [thread for thread in threading.enumerate() if thread.name == "decode"] == []


def test_threads_of_pytorch_sleep_while_they_wait(tmp_path: Path) -> None:
    """It is told before PyTorch loads, and not against what the environment says."""
    script = """if True:
        import os, sys
        from jobs import explain

        class Watch:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ.get("OMP_WAIT_POLICY"))

        sys.meta_path.insert(0, Watch())
        explain.main(sys.argv[1:])
    """
    words = [sys.executable, "-c", script, *command(tmp_path / "nowhere", tmp_path / "run", "--dry-run")]
    for given, wanted in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert set(ended.stdout.splitlines()) == {wanted}, ended.stderr  # some ask several times where it is

"""What makes a chunk done, and what does not."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saecore import schema
from saecore.runs.commits import Commit
from saecore.runs.files import MANIFEST, open_dataset
from saecore.runs.run import Run, open_run

PARTS = {"clip": "aaaa", "k": 2}


def plan(n_chunks: int = 3) -> pa.Table:
    rows = [
        {
            "chunk_id": i,
            "shard_id": 0,
            "uri": "/a.tar",
            "kind": "tar",
            "start": 2 * i,
            "end": 2 * i + 2,
            "bytes": 9,
            "mtime_ns": 1,
        }
        for i in range(n_chunks)
    ]
    return pa.Table.from_pylist(rows, schema=schema.PLAN)


def explained(chunk_id: int) -> pa.Table:
    """Two images of a 1 x 2 grid; the second is refused."""
    base = dict.fromkeys(schema.explained_schema(2).names)
    good = {
        "image_id": 2 * chunk_id, "uri": "/a.tar", "key": "a", "width": 4, "height": 4, "format": "PNG", "l0": 2, "cosine": 1.0,
        "fvu": 0.0, "completeness": 2e-7,
        "activations": [{"rank": r, "latent": 5 + r, "activation": 1.5, "pre_activation": 1.5} for r in range(2)],
        "maps": [
            {"latent": 5 + r, "method": "contrib", "map": b"\x01\xff", "scale": 0.5, "pre_activation": 1.0, "remainder": 1.5,
             "sink_share": 0.0}
            for r in range(2)
        ],
    }  # fmt: skip
    bad = {"image_id": 2 * chunk_id + 1, "uri": "/a.tar", "key": "b", "error": "truncated", "error_detail": "at byte 7"}
    return pa.Table.from_pylist([{**base, **good}, {**base, **bad}], schema=schema.explained_schema(2))


def started(folder: Path, parts: dict[str, object] = PARTS) -> Run:
    return open_run(str(folder), dict(parts), {"command": "test"}, plan)


def write(run: Run, chunk_id: int) -> Commit:
    return run.write_chunk(chunk_id, explained(chunk_id), {"read": 1.0}, {"grid_height": "1", "grid_width": "2"})


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    assert run.pending()["chunk_id"].to_pylist() == [0, 1, 2]
    for chunk_id in (2, 0):
        write(run, chunk_id)
    assert run.pending()["chunk_id"].to_pylist() == [1]
    with pytest.raises(RuntimeError, match=r"1 of 3 chunks are not done, the first is \[1\]"):
        run.finish(6, 1.0)
    write(run, 1)
    record = run.finish(6, 2.0)
    assert record.status == "complete"
    assert record.images == 6
    assert record.refused == {"truncated": 3}
    assert record.rows == {"images": 6, "activations": 6, "maps": 6}
    assert record.worst_completeness_error == pytest.approx(2e-7)
    assert record.step_seconds["read"] == 3.0
    manifest = pq.read_table(tmp_path / "run" / "manifest.parquet")
    assert manifest.schema.remove_metadata() == MANIFEST
    assert sum(manifest["bytes"].to_pylist()) == sum(
        path.stat().st_size for path in (tmp_path / "run").glob("*/*.parquet")
    )
    assert open_dataset(run.uri, "images").to_table().sort_by("image_id")["image_id"].to_pylist() == list(range(6))
    assert not [path for path in (tmp_path / "run").rglob("*") if "tmp" in path.name]


def test_files_hold_the_declared_schemas_and_say_what_made_them(tmp_path: Path) -> None:
    run = started(tmp_path)
    write(run, 0)
    for name, expected in (
        ("images", schema.IMAGES),
        ("activations", schema.ACTIVATIONS),
        ("maps", schema.maps_schema(2)),
    ):
        file = pq.ParquetFile(tmp_path / name / "chunk-00000000.parquet")
        assert file.schema_arrow.remove_metadata() == expected
        assert file.schema_arrow.metadata[b"fingerprint"].decode() == run.fingerprint
        assert file.schema_arrow.metadata[b"grid_width"] == b"2"


def test_writing_a_chunk_twice_writes_the_same(tmp_path: Path) -> None:
    run = started(tmp_path)
    assert write(run, 0).files == write(run, 0).files
    assert len(list(tmp_path.glob("*/chunk-*"))) == 4


@pytest.mark.parametrize(
    "damage", ["record-cut", "record-not-json", "file-gone", "file-cut", "other-fingerprint", "no-record"]
)
def test_a_chunk_with_anything_amiss_is_done_again(tmp_path: Path, damage: str) -> None:
    run = started(tmp_path)
    for chunk_id in range(3):
        write(run, chunk_id)
    record, maps = tmp_path / "commits" / "chunk-00000001.json", tmp_path / "maps" / "chunk-00000001.parquet"
    if damage == "record-cut":
        record.write_bytes(record.read_bytes()[:-20])
    elif damage == "record-not-json":
        record.write_text("[]")
    elif damage == "file-gone":
        maps.unlink()
    elif damage == "file-cut":
        maps.write_bytes(maps.read_bytes()[:-1])
    elif damage == "other-fingerprint":
        record.write_text(json.dumps({**json.loads(record.read_text()), "fingerprint": "0"}))
    else:
        record.unlink()
    assert started(tmp_path).pending()["chunk_id"].to_pylist() == [1]
    write(run, 1)
    assert run.finish(0, 0.0).images == 6


def test_another_configuration_is_refused_by_what_differs(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(ValueError, match=r"k was 2, now 3\)"):
        started(tmp_path, {**PARTS, "k": 3})
    with pytest.raises(ValueError, match="layers was None, now 'all'"):
        started(tmp_path, {**PARTS, "layers": "all"})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files and no run"):
        started(tmp_path)


def test_a_start_that_was_interrupted_after_its_plan_starts_again(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "run.json").unlink()
    assert started(tmp_path).pending().num_rows == 3

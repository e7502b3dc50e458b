"""benchmarks.same_tables: equal runs are equal, and each thing that may differ is told by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks import same_tables
from tests.helpers import planted


def changed(file: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    """Rewrite a table of a run."""

    def apply(run: Path) -> None:
        pq.write_table(change(pq.read_table(run / file)), run / file)

    return apply


def with_column(name: str, change: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, change(table[name]))


def other_methods(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["parts"]["methods"] = ["rollout"]
    (run / "run.json").write_text(json.dumps(record))


FIRST = "chunk-00000000.parquet"
NEXT_FLOAT = pa.scalar(2.0**-21, pa.float32())
"""One step of single precision above 4.0, the largest value of the first chunk's first image."""

CHANGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "the last bit of a value": (
        changed(f"activations/{FIRST}", with_column("activation", lambda column: pc.add(column, NEXT_FLOAT))),
        ["activations: 4 rows only before", "activations: 4 rows only after"],
    ),
    "a missing row": (
        changed(f"images/{FIRST}", lambda table: table.slice(1)),
        ["images: 1 row only before"],
    ),
    "a row twice": (
        changed(f"images/{FIRST}", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        ["images: 1 row only after"],
    ),
    "maps": (
        changed(f"maps/{FIRST}", with_column("map", lambda column: pa.chunked_array([[b"abc"] * len(column)], column.type))),
        ["maps: 12 rows only before", "maps: 12 rows only after"],
    ),
    "a column's name": (
        changed(f"images/{FIRST}", lambda table: table.rename_columns({"width": "breadth"})),
        ["images: columns are ["],
    ),
    "a column's type": (
        changed(f"images/{FIRST}", with_column("width", lambda column: column.cast(pa.int64()))),
        ["images: columns are ["],
    ),
    "names of latents": (
        changed("latents.parquet", with_column("name", lambda column: pa.chunked_array([["blue"]]))),
        ["latents: 1 row only before", "latents: 1 row only after"],
    ),
    "a table": (lambda run: shutil.rmtree(run / "maps"), ["maps: only "]),
    "a part of the fingerprint": (
        other_methods,
        ["fingerprint: methods is ['contrib', 'chefer'] before and ['rollout'] after"],
    ),
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two equal runs of one chunk, with the name of a latent."""
    for name in ("before", "after"):
        planted.write(tmp_path / name, 1)
        pq.write_table(pa.table({"latent": [0], "name": ["red"]}), tmp_path / name / "latents.parquet")
    return [str(tmp_path / name) for name in ("before", "after")]


def test_equal_runs(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Also where one has no names yet, and the inputs lay elsewhere."""
    elsewhere = with_column("uri", lambda column: pa.chunked_array([["s3://bucket/a.tar"] * len(column)]))
    changed(f"images/{FIRST}", elsewhere)(Path(runs[1]))
    assert same_tables.main(runs) == 0
    *counted, last = capsys.readouterr().out.splitlines()
    rows = [line.split(" rows compared")[0] for line in counted]
    assert rows == ["images: 3", "activations: 4", "maps: 12", "latents: 1"]
    assert last.startswith("equal: ")
    (Path(runs[1]) / "latents.parquet").unlink()
    assert same_tables.main(runs) == 0


@pytest.mark.parametrize("change", CHANGES)
def test_each_difference_is_told(change: str, runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And is one in either order."""
    apply, told = CHANGES[change]
    apply(Path(runs[1]))
    assert same_tables.main(runs) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if " rows compared" not in line]
    assert len(said) == len(told)
    assert all(line.startswith(start) for line, start in zip(said, told, strict=True))
    assert same_tables.main(runs[::-1]) == 1


def test_a_folder_without_a_run(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        same_tables.main([runs[0], str(tmp_path)])
    assert ended.value.code == 2
    assert f"{tmp_path} holds no run" in capsys.readouterr().err

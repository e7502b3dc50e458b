"""Planted damage of every kind is found, named by its file, and mended by what the command says; a sound run has no problem."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import explain, index, verify
from saecore.runs.record import read_record
from saecore.upkeep import tables
from saecore.upkeep.problem import Problem
from saecore.upkeep.verify import Verification
from tests.conftest import command
from tests.helpers import planted
from tests.helpers.mistakes import mistake


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted run, with an index and statistics."""
    run = tmp_path_factory.mktemp("sound") / "run"
    planted.write(run)
    assert index.main(["--run", str(run)]) == 0
    return run


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def problems(run: Path) -> list[Problem]:
    return list(Verification(str(run), read_record(str(run))).problems())


def rewritten(run: Path, table: str, change: Callable[[pa.Table], pa.Table], chunk_id: int = 1) -> None:
    """Change a file and everything that says what is in it, as a program with a mistake would: only the content is wrong."""
    path = f"{table}/chunk-{chunk_id:08d}.parquet"
    changed = change(pq.read_table(run / path))
    pq.write_table(changed, run / path)
    data = (run / path).read_bytes()
    now = {"rows": changed.num_rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    commit = run / "commits" / f"chunk-{chunk_id:08d}.json"
    document = json.loads(commit.read_text())
    document["files"] = [{**file, **now} if file["path"] == path else file for file in document["files"]]
    commit.write_text(json.dumps(document))
    manifest = pq.read_table(run / "manifest.parquet")
    rows = [{**row, **now} if row["path"] == path else row for row in manifest.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=manifest.schema), run / "manifest.parquet")


def flip(path: Path, place: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_in_page(path: Path) -> None:
    """In the values of the first column: Parquet's headers have no checksum."""
    column = pq.read_metadata(path).row_group(0).column(0)
    flip(path, (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1)


def last_twice(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table, table.slice(table.num_rows - 1)])


def beyond(table: pa.Table) -> pa.Table:
    return table.set_column(2, table.schema.field(2), pa.array([99] * table.num_rows, pa.int32()))


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def first_of(run: Path, folder: str) -> Path:
    return min((run / folder).glob("*.parquet"))


CHUNK, COMMIT = "chunk-00000001", "commits/chunk-00000001.json"
INDEX = "by_latent/_index.json"

DAMAGE: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "a flipped bit": (lambda run: flip(run / f"maps/{CHUNK}.parquet"), f"maps/{CHUNK}.parquet", "sha256 differs", "chunk"),
    "a truncated file": (
        lambda run: (run / f"images/{CHUNK}.parquet").write_bytes((run / f"images/{CHUNK}.parquet").read_bytes()[:-9]),
        f"images/{CHUNK}.parquet", "were written", "chunk",
    ),
    "a missing file": (
        lambda run: (run / f"activations/{CHUNK}.parquet").unlink(), f"activations/{CHUNK}.parquet", "is missing", "chunk",
    ),
    "an image twice": (
        lambda run: rewritten(run, "images", last_twice), f"images/{CHUNK}.parquet", "are missing, 1 are", "chunk",
    ),
    "an image less": (
        lambda run: rewritten(run, "images", lambda table: table.slice(1)), f"images/{CHUNK}.parquet", "1 planned", "chunk",
    ),
    "an activation twice": (
        lambda run: rewritten(run, "activations", last_twice), f"activations/{CHUNK}.parquet", "number of rows than 2", "chunk",
    ),
    "ranks in another order": (
        lambda run: rewritten(run, "activations", lambda table: table.take([1, 0, 2, 3])),
        f"activations/{CHUNK}.parquet", "ranks 0 to 1", "chunk",
    ),
    "a latent that does not exist": (
        lambda run: rewritten(run, "activations", beyond),
        f"activations/{CHUNK}.parquet", "none of 0 to 5", "chunk",
    ),
    "maps of one method only": (
        lambda run: rewritten(run, "maps", lambda table: table.filter(pc.equal(table["method"], "chefer"))),
        f"maps/{CHUNK}.parquet", "each method of contrib, chefer", "chunk",
    ),
    "a map in place of another": (
        lambda run: rewritten(run, "maps", lambda table: table.take([0, 0, *range(2, table.num_rows)])),
        f"maps/{CHUNK}.parquet", "has maps twice", "chunk",
    ),
    "other columns": (
        lambda run: rewritten(run, "images", lambda table: table.drop_columns(["fvu"])),
        f"images/{CHUNK}.parquet", "other columns", "chunk",
    ),
    "another run's file": (
        lambda run: rewritten(run, "maps", lambda table: table.replace_schema_metadata({b"fingerprint": b"0"})),
        f"maps/{CHUNK}.parquet", "fingerprint of another run", "chunk",
    ),
    "a reason that the commit does not know": (
        lambda run: edited(run / "commits/chunk-00000000.json", refused={"empty": 1}),
        "images/chunk-00000000.parquet", "its commit says {'empty': 1}", "chunk",
    ),
    "a deleted commit": (lambda run: (run / COMMIT).unlink(), COMMIT, "is missing", "chunk"),
    "a damaged commit": (lambda run: (run / COMMIT).write_text("{"), COMMIT, "is no commit", "chunk"),
    "another run's commit": (lambda run: edited(run / COMMIT, fingerprint="0"), COMMIT, "of another run", "chunk"),
    "a commit of another length": (lambda run: edited(run / COMMIT, images=3), COMMIT, "3 images, and 2 are", "chunk"),
    "a file more": (lambda run: (run / "images" / "copy.parquet").write_bytes(b"x"), "images/copy.parquet", "no file", "move"),
    "a chunk more": (
        lambda run: shutil.copy(run / f"maps/{CHUNK}.parquet", run / "maps/chunk-00000009.parquet"),
        "maps/chunk-00000009.parquet", "no file of", "move",
    ),
    "no manifest": (lambda run: (run / "manifest.parquet").unlink(), "manifest.parquet", "cannot be read", "close"),
    "a manifest without a chunk": (
        lambda run: pq.write_table(pq.read_table(run / "manifest.parquet").slice(0, 6), run / "manifest.parquet"),
        "manifest.parquet", "lacks chunk 2", "close",
    ),
    "wrong totals": (lambda run: edited(run / "run.json", images=7), "run.json", "images 7, and the chunks have 6", "close"),
    "a flip in the index": (lambda run: flip_in_page(first_of(run, "by_latent")), "by_latent/", "cannot be read", "index"),
    "no file of the index": (lambda run: first_of(run, "top_images").unlink(), "top_images/", "is missing", "index"),
    "a file of an older index": (
        lambda run: (run / "by_latent" / "old.parquet").write_bytes(b"x"), "by_latent/old.parquet", "of this index", "move",
    ),
    "a damaged index": (lambda run: (run / INDEX).write_text("{}"), INDEX, "no index", "index"),
    "statistics of another index": (
        lambda run: pq.write_table(
            pq.read_table(run / "latents.parquet").replace_schema_metadata({"indexed": "older"}), run / "latents.parquet"
        ),
        "latents.parquet", "counts another index", "index",
    ),
    "a latent less": (
        lambda run: pq.write_table(pq.read_table(run / "latents.parquet").slice(1), run / "latents.parquet"),
        "latents.parquet", "each of the 6 latents", "index",
    ),
}  # fmt: skip
"""What is wrong -> how it comes about, the file that is to be named, what is said, what mends it."""


def test_a_sound_run_has_no_problem(run: Path) -> None:
    assert problems(run) == []
    (run / ".hidden").write_text("x")
    (run / "notes.txt").write_text("one's own files next to the tables are nobody's business")
    assert problems(run) == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(run: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant, path, what, remedy = DAMAGE[damage]
    plant(run)
    found = problems(run)
    assert [one for one in found if one.path.startswith(path) and what in one.what and one.remedy == remedy], found
    capsys.readouterr()
    assert verify.main([str(run), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["sound"]
    assert [Problem(**one) for one in said["problems"]] == found


def test_an_index_of_other_rows_is_found(run: Path) -> None:
    """Bytes and counts are right, and one activation is another: only the rows themselves tell."""
    file = first_of(run, "by_latent")
    table = pq.read_table(file)
    strengths = table["activation"].to_numpy().copy()
    strengths[0] += 1
    pq.write_table(table.set_column(3, table.schema.field(3), pa.array(strengths)), file)
    content = json.loads((run / INDEX).read_text())
    content["segments"][0]["rows"][0]["bytes"] = file.stat().st_size
    (run / INDEX).write_text(json.dumps(content))
    assert [(one.what, one.remedy) for one in problems(run)] == [("holds other rows than the activations", "index")]


def test_a_run_that_grew_has_a_stale_index(tmp_path: Path) -> None:
    run = planted.write(tmp_path / "run", 2)
    assert index.main(["--run", run]) == 0
    planted.write(run, 3)
    assert [one.what for one in problems(Path(run))] == ["is stale: 1 chunks are not indexed as they are now"]
    assert index.main(["--run", run]) == 0
    assert problems(Path(run)) == []


def test_the_digest_does_not_depend_on_the_order_and_on_every_value() -> None:
    draw = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "image_id": draw.integers(0, 1 << 40, 1000),
        "latent": draw.integers(0, 50, 1000).astype(np.int32),
        "activation": draw.random(1000).astype(np.float32),
    }
    table = pa.table(columns)
    assert tables.digest(table) == tables.digest(table.take(draw.permutation(1000)))
    halves = [tables.digest(table.slice(0, 300)), tables.digest(table.slice(300))]
    assert tables.digest(table) == sum(halves) % (1 << 64)
    for name, values in columns.items():
        other = values.copy()
        other[[3, 4]] = other[[4, 3]]  # each value is still there, in another row
        assert tables.digest(pa.table({**columns, name: other})) != tables.digest(table), name


@pytest.mark.slow
def test_damaged_chunks_are_done_again_by_the_same_command(
    local_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = command(shards, out, "--local")
    assert explain.main(given) == 0
    whole = {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))}
    times = {path: path.stat().st_mtime_ns for path in whole}
    flip(out / "maps" / "chunk-00000002.parquet")
    (out / "commits" / "chunk-00000004.json").unlink()
    (out / "manifest.parquet").unlink()
    assert mistake(verify.main, [str(tmp_path)], capsys).endswith("holds no run: there is no run.json")
    assert verify.main([str(out)]) == 1
    said = capsys.readouterr().out
    assert f"jobs.verify {out} --repair" in said.replace("'", "")
    assert said.count("chunk-0000000") == 2
    assert read_record(str(out)).is_complete
    assert verify.main([str(out), "--repair"]) == 1
    assert "2 chunks are marked as not done; then the command that made the run mends it" in capsys.readouterr().out
    assert not read_record(str(out)).is_complete
    assert explain.main(given) == 0
    assert "32 of 48 images are done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))} == whole
    again = {path.name for path in whole if path.stat().st_mtime_ns != times[path]}
    assert again == {"chunk-00000002.parquet", "chunk-00000004.parquet", "manifest.parquet"}
    assert verify.main([str(out)]) == 0
    assert "sound         48 images in 6 chunks, 18 files" in capsys.readouterr().out


def test_a_run_that_is_not_complete_is_sound_so_far(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(run / "run.json", status="running")
    (run / COMMIT).unlink()
    shutil.rmtree(run / "by_latent")
    assert verify.main([str(run)]) == 0
    assert "1 chunks are not done" in capsys.readouterr().out
    flip(run / "maps" / "chunk-00000002.parquet")
    assert [one.path for one in problems(run)] == ["maps/chunk-00000002.parquet"]


def test_nothing_is_said_of_counts_that_hold_a_damaged_chunk(run: Path) -> None:
    """What fires there cannot be read, so neither index nor statistics are at fault."""
    flip(run / f"activations/{CHUNK}.parquet")
    assert [problem.path for problem in problems(run)] == [f"activations/{CHUNK}.parquet"]

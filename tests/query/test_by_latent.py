"""The index: sorted, complete, small to read; grown, interrupted, foreign. Answers are those of the run's own files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import synthetic
from jobs import commands, index
from saecore.query import by_latent, indexing, results
from saecore.runs import latents
from saecore.runs.files import TABLES, open_dataset
from saecore.runs.record import read_complete
from saecore.schema import ACTIVATIONS
from tests.helpers.mistakes import mistake

N_LATENTS = 50


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few hundred images fill several files, and a latent crosses their borders."""
    monkeypatch.setattr(indexing, "ROWS_PER_FILE", {by_latent.ROWS: 400, by_latent.TOP: 300})
    monkeypatch.setattr(indexing, "ROW_GROUP_ROWS", {by_latent.ROWS: 90, by_latent.TOP: 64})


def grown(folder: Path, images: int) -> str:
    """A synthetic run of chunks of 32 images, 6 latents each, or the same run with more of them."""
    synthetic.write_run(str(folder), images, N_LATENTS, k=6, grid=(2, 3), chunk_size=32)
    return str(folder)


def indexed(uri: str, *more: str) -> by_latent.Index:
    assert index.main(["--run", uri, "--top", "25", *more]) == 0
    found = by_latent.read_index(uri, read_complete(uri).fingerprint)
    assert found is not None
    return found


def order(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("latent", "ascending"), ("activation", "descending"), ("image_id", "ascending")])


def test_it_is_the_activations_in_another_order(tmp_path: Path) -> None:
    uri = grown(tmp_path / "run", 300)
    held = indexed(uri)
    (segment,) = held.segments
    files = [pq.ParquetFile(tmp_path / "run" / file.path) for file in segment.rows]
    rows = pa.concat_tables([file.read() for file in files])
    assert rows.equals(order(open_dataset(uri, "activations").to_table()))
    assert [file.metadata.num_rows for file in files] == [400, 400, 400, 400, 200]
    assert {file.schema_arrow.remove_metadata() for file in files} == {ACTIVATIONS}
    assert {file.schema_arrow.metadata[b"fingerprint"].decode() for file in files} == {held.fingerprint}
    assert segment.chunks == [(0, 9)]
    for listed, file in zip(segment.rows, files, strict=True):
        found = file.read()["latent"].to_pylist()
        assert (listed.first, listed.last) == (found[0], found[-1])
        assert (listed.rows, listed.bytes) == (len(found), (tmp_path / "run" / listed.path).stat().st_size)
    assert sum(segment.maps) == rows.num_rows


def test_a_look_up_opens_the_files_of_its_latent_alone(tmp_path: Path) -> None:
    uri = grown(tmp_path / "run", 300)
    (segment,) = indexed(uri).segments
    run = results.open(uri)
    wanted = {latent: run.top_images(latent, 25, maps=True) for latent in (7, 30)}
    for latent in wanted:
        assert wanted[latent].num_rows == 25
        needed = {file.path for file in (*segment.rows, *segment.top) if file.first <= latent <= file.last}
        assert 2 <= len(needed) <= 5
        hidden = [tmp_path / "run" / file.path for file in (*segment.rows, *segment.top) if file.path not in needed]
        # Of the run itself, the first chunk alone: its files say how maps were made, and of what type columns are.
        hidden += [path for table in TABLES for path in sorted((tmp_path / "run" / table).glob("*"))[1:]]
        for path in hidden:
            path.rename(path.with_suffix(".hidden"))
        assert results.open(uri).top_images(latent, 25, maps=True).equals(wanted[latent])
        for path in hidden:
            path.with_suffix(".hidden").rename(path)


def test_a_run_that_grew_is_indexed_by_what_is_new(tmp_path: Path) -> None:
    """And answers, statistics included, are those of an index made at once, and of the run's own files."""
    uri = grown(tmp_path / "run", 160)
    first = indexed(uri)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "by_latent").glob("*.parquet")}
    grown(tmp_path / "run", 300)
    half, plain = results.open(uri), results.open(grown(tmp_path / "plain", 300))
    assert half.tables.not_indexed.tolist() == [5, 6, 7, 8, 9]
    both = indexed(uri)
    assert [segment.chunks for segment in both.segments] == [[(0, 4)], [(5, 9)]]
    assert both.segments[0] == first.segments[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = results.open(grown(tmp_path / "whole", 300))
    (segment,) = indexed(whole.uri).segments
    assert segment.maps == np.sum([segment.maps for segment in both.segments], axis=0).tolist()
    np.testing.assert_allclose(segment.extent, np.sum([segment.extent for segment in both.segments], axis=0), atol=1e-3)

    every = [plain, half, results.open(uri), results.open(whole.uri)]
    for latent in range(0, N_LATENTS, 6):
        for n in (3, 300):
            one, *others = (run.top_images(latent, n, maps=True) for run in every)
            assert all(other.equals(one) for other in others)
    for question in (
        lambda run: run.co_firing(3),
        lambda run: run.histogram(3),
        lambda run: run.compare("image_id < 99"),
    ):
        one, *others = (question(run) for run in every)
        assert all(other.equals(one) for other in others)
    statistics = [run.latents for run in every[2:]]
    assert statistics[0].drop_columns("extent").equals(statistics[1].drop_columns("extent"))


def test_the_same_command_again_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = grown(tmp_path / "run", 64)
    indexed(uri)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    indexed(uri)
    said = f"{uri} is indexed: nothing to do\nnext          {commands.line('name', '--run', uri)}\n"
    assert capsys.readouterr().out == said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    # Nor does it when it was stopped between the index and the statistics, but for these.
    (tmp_path / "run" / "latents.parquet").unlink()
    indexed(uri)
    assert capsys.readouterr().out.startswith("counted")
    assert latents.read(uri) is not None


def test_an_index_that_is_interrupted_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = grown(tmp_path / "run", 160)
    first = indexed(uri)
    wanted = results.open(grown(tmp_path / "plain", 300)).top_images(2, 40, maps=True)
    grown(tmp_path / "run", 300)
    written: list[str] = []

    def until_full(address: str, data: pa.Buffer) -> None:
        if len(written) == 4:
            raise OSError("No space left on device")
        written.append(address)
        by_latent.write_atomic(address, data)

    for more in ((), ("--rebuild",)):
        written.clear()
        with monkeypatch.context() as full:
            full.setattr(indexing, "write_atomic", until_full)
            with pytest.raises(OSError, match="No space"):
                index.main(["--run", uri, "--top", "25", *more])
        assert by_latent.read_index(uri, first.fingerprint) == first
        assert results.open(uri).top_images(2, 40, maps=True).equals(wanted)
    held = indexed(uri)
    assert results.open(uri).top_images(2, 40, maps=True).equals(wanted)
    files = {file.path for segment in held.segments for file in (*segment.rows, *segment.top)}
    folders = [tmp_path / "run" / name for name in ("by_latent", "top_images")]
    left = {f"{folder.name}/{path.name}" for folder in folders for path in folder.glob("*")}
    assert left == {*files, "by_latent/_index.json"}, "what was interrupted is cleared away"


def test_the_index_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = grown(tmp_path / "run", 64)
    held = indexed(uri)
    by_latent.write_index(uri, dataclasses.replace(held, fingerprint="another", segments=held.segments))
    with pytest.raises(ValueError, match="is the index of another run"):
        results.open(uri)
    assert "--rebuild" in mistake(index.main, ["--run", uri], capsys)
    assert indexed(uri, "--rebuild").segments == held.segments


def test_chunks_that_were_made_again_otherwise_are_indexed_again(tmp_path: Path) -> None:
    uri = grown(tmp_path / "run", 64)
    first = indexed(uri)
    path = tmp_path / "run" / "manifest.parquet"
    manifest = pq.read_table(path)
    changed = ["0" * 64, *manifest["sha256"].to_pylist()[1:]]
    pq.write_table(manifest.set_column(5, "sha256", [changed]), path)
    second = indexed(uri)
    assert second.segments[0].name != first.segments[0].name
    assert second.segments[0].maps == first.segments[0].maps


def test_many_segments_become_one(tmp_path: Path) -> None:
    uri = str(tmp_path / "run")
    for chunks in range(1, indexing.MOST_SEGMENTS + 1):
        held = indexed(grown(tmp_path / "run", 32 * chunks))
        assert len(held.segments) == chunks
    held = indexed(grown(tmp_path / "run", 32 * (chunks + 1)))
    assert [segment.chunks for segment in held.segments] == [[(0, chunks)]]
    assert json.loads((tmp_path / "run" / "by_latent" / "_index.json").read_text())["top"] == 25
    assert results.open(uri).sql("SELECT count(*) AS n FROM by_latent")["n"].to_pylist() == [32 * (chunks + 1) * 6]


def test_segments_on_ray_are_those_of_this_process(ray_session: None, tmp_path: Path) -> None:
    here, there = (grown(tmp_path / name, 300) for name in ("here", "there"))
    one = indexed(here)
    three = indexed(there, "--segments", "3", "--memory", "0.5")
    assert [segment.chunks for segment in three.segments] == [[(0, 3)], [(4, 6)], [(7, 9)]]
    for latent in (0, 20, 47):
        assert (
            results.open(there)
            .top_images(latent, 60, maps=True)
            .equals(results.open(here).top_images(latent, 60, maps=True))
        )
    assert one.fingerprint == three.fingerprint


def test_extent() -> None:
    """(sum r)^2 / (P sum r^2) over positive values: all in one of four patches, evenly on two, on four, and nowhere."""
    maps = [b"\x05\x00\x00\xff", b"\x07\x07\x80\xff", b"\x01\x01\x01\x01", b"\xff\x00\x00\x00", b"\x01\x03\x00\x00"]
    found = indexing.extent(pa.array([b"\x7f\x7f\x7f\x00", *maps], pa.binary(4))[1:])  # a slice, as batches may be
    np.testing.assert_allclose(found, [1 / 4, 2 / 4, 1, np.nan, 16 / (4 * 10)])
    with np.errstate(all="raise"):
        assert indexing.extent(pa.array([b"\x7f" * 1024], pa.binary(1024)))[0] == pytest.approx(1)

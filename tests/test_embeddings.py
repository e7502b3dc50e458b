"""Embeddings to train on: the same rows from every format, sound statistics, every row once an epoch, from any step on."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize

from saecore.embeddings import Batches, choose, geometric_median, open_embeddings, survey

ROWS, WIDTH = 3000, 6


def numbers(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


def mapped(folder: Path, rows: np.ndarray) -> str:
    path = folder / f"some_clip_train_image_{len(rows)}_{rows.shape[1]}.npy"
    rows.tofile(path)
    return str(path)


def table(rows: np.ndarray, kind: pa.DataType, gaps: bool = False) -> pa.Table:
    lists: list[Any] = [row.tolist() for row in rows]
    if gaps:  # refused images, at both ends and in a run that fills a row group
        lists = [None, *lists[:1000], *[None] * 600, *lists[1000:], None]
    return pa.table({"key": [f"{i}" for i in range(len(lists))], "embedding": pa.array(lists, kind)})


def everything(address: str) -> np.ndarray:
    source = open_embeddings(address)
    found = [source.read(block) for block in range(len(source.block_rows))]
    assert [len(rows) for rows in found] == source.block_rows.tolist()
    assert source.width == WIDTH
    return np.concatenate(found)


@pytest.mark.parametrize("kind", ["raw", "npy", "half", "list", "large", "fixed", "gaps", "folder"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows, path = numbers(), tmp_path / "rows.parquet"
    if kind == "raw":
        address = mapped(tmp_path, rows)
    elif kind in ("npy", "half"):
        rows = rows.astype(np.float16) if kind == "half" else rows
        np.save(tmp_path / "rows.npy", rows)
        address = str(tmp_path / "rows.npy")
    else:
        types = {"large": pa.large_list(pa.float32()), "fixed": pa.list_(pa.float32(), WIDTH)}
        found = table(rows, types.get(kind, pa.list_(pa.float32())), gaps=kind == "gaps")
        address = str(path)
        if kind == "folder":
            pq.write_table(found.slice(0, 1100), tmp_path / "a.parquet", row_group_size=300)
            pq.write_table(found.slice(1100), tmp_path / "b.parquet", row_group_size=300)
            address = str(tmp_path)
        else:
            pq.write_table(found, path, row_group_size=300)
    np.testing.assert_array_equal(everything(address), rows.astype(np.float32))


def test_a_run_with_embeddings_is_read(local_run: Path) -> None:
    stored = pq.read_table(sorted((local_run / "images").glob("*.parquet")))["embedding"].to_pylist()
    source = open_embeddings(str(local_run))
    assert source.block_rows.sum() == len(stored)
    np.testing.assert_array_equal(source.read(0), np.array(stored, np.float32)[: source.block_rows[0]])


def write_wrong(folder: Path, what: str) -> str:
    path = folder / "rows_10_6.npy"
    if what == "name":
        path = folder / "rows.npy"
        numbers(10).tofile(path)
    elif what == "size":
        numbers(9).tofile(path)
    elif what == "integers":
        np.save(path, np.zeros((10, 6), np.int64))
    elif what == "ragged":
        path = folder / "rows.parquet"
        pq.write_table(pa.table({"embedding": [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]}), path)
    elif what == "column":
        path = folder / "rows.parquet"
        pq.write_table(pa.table({"vector": [[1.0, 2.0]]}), path)
    elif what == "text":
        path = folder / "rows.parquet"
        pq.write_table(pa.table({"embedding": ["a", "b"]}), path)
    elif what == "none":
        path = folder / "rows.parquet"
        pq.write_table(pa.table({"embedding": pa.array([None, None], pa.list_(pa.float32()))}), path)
    return str(path)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("missing", "no such file"),
        ("name", "says its shape in its name"),
        ("size", "240 bytes, the file has 216"),
        ("integers", "expected a float32 matrix, found int64"),
        ("ragged", "not all 2 long"),
        ("column", "no column 'embedding'"),
        ("text", "expected lists of numbers"),
        ("none", "no embedding in column"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, what: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        everything(write_wrong(tmp_path, what))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    rows = numbers()
    rows[2500, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        survey(open_embeddings(mapped(tmp_path, rows)), 100, 0)


def test_mean_and_scale_hold_far_from_the_origin(tmp_path: Path) -> None:
    """At 10,000 standard deviations from it, a sum of squares in float32, or one not centred, has no digit left."""
    rows = numbers(20_000) + np.float32(1e4)
    found = survey(open_embeddings(mapped(tmp_path, rows)), 500, 3)
    train = np.delete(rows, found.held_out, axis=0).astype(np.float64)
    np.testing.assert_allclose(found.mean, train.mean(0), rtol=1e-7)
    expected = np.sqrt(WIDTH) / np.sqrt(((train - train.mean(0)) ** 2).sum(1).mean())
    assert found.scale == pytest.approx(expected, rel=1e-9)
    np.testing.assert_array_equal(found.evaluation, rows[found.held_out])
    assert len(np.unique(found.held_out)) == 500
    assert not found.unit_norm


def test_rows_of_length_one_are_noticed(tmp_path: Path) -> None:
    rows = numbers(100)
    assert survey(
        open_embeddings(mapped(tmp_path, rows / np.linalg.norm(rows, axis=1, keepdims=True))), 10, 0
    ).unit_norm
    assert not choose(open_embeddings(mapped(tmp_path, rows)), 1000, 0).unit_norm


def test_all_rows_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to learn"):
        survey(open_embeddings(mapped(tmp_path, np.ones((50, WIDTH), np.float32))), 5, 0)


@pytest.mark.parametrize("buffer", [200, 10**6])
@pytest.mark.parametrize("kind", ["raw", "parquet"])
def test_every_row_comes_once_an_epoch_in_another_order(kind: str, buffer: int, tmp_path: Path) -> None:
    rows = np.repeat(np.arange(ROWS, dtype=np.float32)[:, None], WIDTH, axis=1)
    address = mapped(tmp_path, rows)
    if kind == "parquet":
        address = str(tmp_path / "rows.parquet")
        pq.write_table(table(rows, pa.list_(pa.float32())), address, row_group_size=170)
    source = open_embeddings(address)
    held_out = survey(source, 120, 1).held_out
    batches = Batches(source, held_out, 64, seed=5, buffer_rows=buffer)
    assert batches.steps_per_epoch == (ROWS - 120) // 64
    epochs = []
    stream = batches.start(0)
    for _ in range(2):
        epochs.append(np.concatenate(list(itertools.islice(stream, batches.steps_per_epoch)))[:, 0])
    for epoch in epochs:
        assert len(np.unique(epoch)) == len(epoch) == ROWS - 120
        assert not np.isin(held_out, epoch).any()
        # Neighbours in the data are no neighbours in a batch.
        assert np.median(np.abs(np.diff(epoch))) > 50
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("buffer", [200, 1500, 10**6])
def test_a_stream_taken_up_anywhere_is_the_same_stream(buffer: int, tmp_path: Path) -> None:
    source = open_embeddings(mapped(tmp_path, numbers()))
    batches = Batches(source, survey(source, 100, 1).held_out, 70, seed=2, buffer_rows=buffer)
    whole = list(itertools.islice(batches.start(0), 100))  # more than two epochs of 41 steps
    for step in (0, 1, 13, 40, 41, 42, 60, 82, 97):
        for index, batch in enumerate(itertools.islice(batches.start(step), 3)):
            np.testing.assert_array_equal(batch, whole[step + index])


def test_the_geometric_median() -> None:
    rows = numbers(201).astype(np.float64) ** 3
    best = minimize(lambda point: np.linalg.norm(rows - point, axis=1).sum(), rows.mean(0), tol=1e-10).x
    np.testing.assert_allclose(geometric_median(rows), best, atol=1e-3)
    line = np.array([[0.0], [1.0], [2.0], [50.0], [900.0]])
    np.testing.assert_allclose(geometric_median(line), [2.0], atol=0.05)

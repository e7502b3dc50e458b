"""Where embeddings come from, what a survey says of them, and the order in which batches come."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize

from jobs import embed
from saecore.runs.files import open_dataset
from saecore.training import embeddings
from saecore.training.embeddings import Batches, Embeddings, draw, geometric_median, open_embeddings, survey

ROWS, WIDTH = 2500, 6


def normal(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def everything(source: Embeddings) -> np.ndarray:
    blocks = [source.read(block) for block in range(len(source.block_rows))]
    assert [len(block) for block in blocks] == source.block_rows.tolist()
    return np.concatenate(blocks)


def mapped(folder: Path, rows: np.ndarray) -> Embeddings:
    path = folder / f"some_name_{len(rows)}_{rows.shape[1]}.npy"
    rows.tofile(path)
    return open_embeddings(str(path))


def table(lists: list[Any], kind: pa.DataType) -> pa.Table:
    """The column between others, one of them nested: its place among Parquet's leaves is not its place in the schema."""
    other = pa.array([{"a": i, "b": i} for i in range(len(lists))])
    return pa.table({"key": pa.array(map(str, range(len(lists)))), "pair": other, "embedding": pa.array(lists, kind)})


# ---- Where they lie.


def test_memory_maps_with_a_header_and_without(tmp_path: Path) -> None:
    rows = normal()
    np.testing.assert_array_equal(everything(mapped(tmp_path, rows)), rows)
    np.save(tmp_path / "single.npy", rows)
    np.save(tmp_path / "half.npy", rows.astype(np.float16))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows))
    for name, expected in (("single", rows), ("half", rows.astype(np.float16)), ("fortran", rows)):
        found = everything(open_embeddings(str(tmp_path / f"{name}.npy")))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), WIDTH)])
def test_parquet_with_nulls_for_images_that_were_refused(tmp_path: Path, kind: pa.DataType) -> None:
    """Row groups of 100; the third holds none at all, and one file of the folder neither."""
    rows = normal(350).astype(np.float16).astype(np.float32)
    lists: list[Any] = rows.tolist()
    refused = {0, 7, *range(200, 300), 349}
    lists = [None if i in refused else values for i, values in enumerate(lists)]
    for name, some in (("0-none", [None] * 5), ("1", lists[:220]), ("2", lists[220:])):
        pq.write_table(table(some, kind), tmp_path / f"{name}.parquet", row_group_size=100)
    source = open_embeddings(str(tmp_path))
    assert source.width == WIDTH
    assert len(source.block_rows) > 2
    np.testing.assert_array_equal(everything(source), np.delete(rows, sorted(refused), axis=0))
    one = open_embeddings(str(tmp_path / "1.parquet"))
    assert int(one.block_rows.sum()) == 220 - 22
    assert one.identity != source.identity


def test_a_run_of_jobs_embed_in_the_order_of_its_memory_map(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert embed.main(["--images", str(shards), "--out", str(out), "--clip", "demo", "--local", "--limit", "12"]) == 0
    (path,) = out.glob("*.npy")
    found = everything(open_embeddings(str(out)))
    np.testing.assert_array_equal(found, everything(open_embeddings(str(path))))
    stored = open_dataset(str(out), "images").to_table().sort_by("image_id")["embedding"].to_pylist()
    np.testing.assert_array_equal(found, np.array(stored, np.float32))
    (out / "manifest.parquet").unlink()
    with pytest.raises(ValueError, match="this run is not complete"):
        open_embeddings(str(out))


def raw(name: str, rows: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        rows.tofile(folder / name)
        return folder / name

    return write


def saved(rows: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "x.npy", rows)
        return folder / "x.npy"

    return write


def lists(values: list[Any], kind: pa.DataType | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(table(values, kind or pa.list_(pa.float32())), folder / "x.parquet")
        return folder / "x.parquet"

    return write


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda folder: folder / "x_1_2.npy", "no such file"),
        (lambda folder: folder / "nowhere", "no such file or folder"),
        (lambda folder: folder, "no Parquet file in this folder"),
        (raw("x.npy", normal(3)), "says its shape in its name"),
        (raw("x_3_d.npy", normal(3)), "says its shape in its name"),
        (raw("x_4_6.npy", normal(3)), "4 x 6 float32 are 96 bytes, the file has 72"),
        (raw("x_3_6.npy", np.where(np.eye(3, 6) > 0, np.nan, 1).astype(np.float32)), "not finite"),
        (saved(normal(3).astype(np.float64)), "expected a float32 matrix, found float64"),
        (saved(normal(3)[0]), r"expected a float32 matrix, found float32 \(6,\)"),
        (lists([1.0, 2.0], pa.float32()), "holds float, expected lists"),
        (lists([None, None]), "no embedding in column 'embedding'"),
        (lists([[1.0], [2.0]]), "are 1 long"),
        (lists([[], []]), "are 0 long"),
        (lists([[1.0, 2.0, 3.0], [1.0, 2.0]]), "not all 3 long"),
        (lists([[1.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]]), "not all 3 long"),
        (lists([[1.0, 2.0, 3.0], [1.0]]), "not all 3 long"),
        (lists([[1.0, 2.0, 3.0], []]), "not all 3 long"),
        (lists([[1.0, 2.0, 3.0], [1.0, None, 3.0]]), "not finite"),
        (lists([[1.0, 2.0, 3.0], [1.0, np.inf, 3.0]]), "not finite"),
    ],
)
def test_what_holds_no_embeddings_is_refused_in_one_sentence(
    tmp_path: Path, write: Callable[[Path], Path], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        everything(open_embeddings(str(write(tmp_path))))
    assert "\n" not in str(caught.value)


def test_another_column_is_named(tmp_path: Path) -> None:
    pq.write_table(
        table(normal(5).tolist(), pa.list_(pa.float32())).rename_columns(["a", "b", "c"]), tmp_path / "x.parquet"
    )
    with pytest.raises(ValueError, match="has no column 'embedding'"):
        open_embeddings(str(tmp_path / "x.parquet"))
    np.testing.assert_array_equal(everything(open_embeddings(str(tmp_path / "x.parquet"), "c")), normal(5))


# ---- What they are like.


def test_moments_at_an_offset_at_which_float32_fails(tmp_path: Path) -> None:
    """Sums of squares in float32 keep 7 digits: at 1e4 they leave nothing of a variance of 1."""
    rows = normal() + np.float32(1e4)
    found = survey(mapped(tmp_path, rows), held_out=300, seed=1)
    train = np.delete(rows, found.held_out, axis=0).astype(np.float64)
    scale = np.sqrt(WIDTH / np.square(train - train.mean(0)).sum(1).mean())
    assert found.scale == pytest.approx(scale, rel=1e-9)
    np.testing.assert_allclose(found.mean, train.mean(0), rtol=1e-7)
    naive = (np.square(rows).sum(0) / ROWS - np.square(rows.sum(0) / ROWS)).sum()
    assert abs(float(naive) / np.square(train - train.mean(0)).sum(1).mean() - 1) > 0.1


def test_rows_held_out_stay_out(tmp_path: Path) -> None:
    rows = normal()
    source = mapped(tmp_path, rows)
    first = survey(source, held_out=200, seed=1)
    assert (first.rows, len(np.unique(first.held_out)), first.unit_norm) == (ROWS, 200, False)
    np.testing.assert_array_equal(first.evaluation, rows[first.held_out])
    rest = np.delete(rows, first.held_out, axis=0)
    np.testing.assert_array_equal(first.sample, rest)
    rows[first.held_out] = 1e6
    again = survey(mapped(tmp_path, rows), held_out=200, seed=1)
    np.testing.assert_array_equal(again.mean, first.mean)
    assert again.scale == first.scale
    assert not np.array_equal(survey(source, held_out=200, seed=2).held_out, first.held_out)


def test_drawn_rows_are_those_that_a_survey_holds_out(tmp_path: Path) -> None:
    rows = normal()
    source = mapped(tmp_path, rows)
    for count in (1, 200, ROWS - 2):
        numbers, values = draw(source, count, seed=1)
        np.testing.assert_array_equal(numbers, survey(source, count, seed=1).held_out)
        np.testing.assert_array_equal(values, rows[numbers])
    numbers, values = draw(source, ROWS + 5, seed=1)
    np.testing.assert_array_equal(numbers, np.arange(ROWS))
    np.testing.assert_array_equal(values, rows)


def test_rows_of_length_one_and_rows_that_are_all_the_same(tmp_path: Path) -> None:
    rows = normal(50)
    assert survey(mapped(tmp_path, rows / np.linalg.norm(rows, axis=1, keepdims=True)), 5, 0).unit_norm
    with pytest.raises(ValueError, match="all embeddings are the same"):
        survey(mapped(tmp_path, np.ones((50, 3), np.float32)), 5, 0)
    with pytest.raises(ValueError, match="cannot hold out 50 of 50"):
        survey(mapped(tmp_path, rows), 50, 0)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    rows = normal(80, 3) ** 3 + 2
    best = minimize(lambda point: np.linalg.norm(rows - point, axis=1).sum(), rows.mean(0), tol=1e-12, method="Powell")
    np.testing.assert_allclose(geometric_median(rows), best.x, atol=1e-3)


@pytest.mark.parametrize("seed", [*range(5)])
def test_on_a_line_it_is_the_median(seed: int) -> None:
    rows = normal(31, 1, seed=seed)
    np.testing.assert_allclose(geometric_median(rows), np.median(rows, axis=0), atol=1e-3)


def test_a_mean_that_is_a_row_does_not_hold_it_unless_it_is_the_median() -> None:
    """Weiszfeld's iteration starts at the mean: a row there weighs infinitely much."""
    for line, median in (([-3, 0, 1, 1, 1], 1), ([-2, -1, 0, 1, 2], 0), ([2, 2, 2], 2)):
        np.testing.assert_allclose(geometric_median(np.array(line, np.float32)[:, None]), [median], atol=1e-3)


# ---- Batches.


def numbered(folder: Path, rows: int = ROWS) -> Embeddings:
    """Row i holds i, twice."""
    return mapped(folder, np.repeat(np.arange(rows, dtype=np.float32)[:, None], 2, axis=1))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAPPED_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("buffer_rows", [1, 300, 100_000])
def test_every_row_to_train_on_comes_once_an_epoch(tmp_path: Path, buffer_rows: int) -> None:
    held_out = np.arange(0, ROWS, 5)
    batches = Batches(numbered(tmp_path), held_out, batch_size=80, seed=3, buffer_rows=buffer_rows)
    assert batches.steps_per_epoch == 25
    expected = np.delete(np.arange(ROWS), held_out)
    steps = list(itertools.islice(batches.start(0), 50))
    assert {step.shape for step in steps} == {(80, 2)}
    one, two = (np.concatenate(steps[start : start + 25])[:, 0] for start in (0, 25))
    for epoch in (one, two):
        np.testing.assert_array_equal(np.sort(epoch), expected)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, expected)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("buffer_rows", [1, 300, 100_000])
def test_from_any_step_on_batches_are_those_of_an_unbroken_iteration(tmp_path: Path, buffer_rows: int) -> None:
    """A batch size that divides nothing: windows end inside batches, and some rows sit each epoch out."""
    batches = Batches(numbered(tmp_path), np.array([0, 63, 64, 2499]), 77, seed=3, buffer_rows=buffer_rows)
    whole = list(itertools.islice(batches.start(0), 70))
    assert batches.steps_per_epoch == 32
    for step in (1, 3, 4, 31, 32, 33, 65):
        for one, other in zip(whole[step:], batches.start(step), strict=False):
            np.testing.assert_array_equal(one, other)
    again = Batches(batches.source, batches.held_out, 77, seed=4, buffer_rows=buffer_rows)
    assert not np.array_equal(next(again.start(0)), whole[0])


def test_data_no_larger_than_the_buffer_is_mixed_as_a_whole(tmp_path: Path) -> None:
    """The first fifth of an epoch holds rows of every tenth of the data."""
    first = next(Batches(numbered(tmp_path), np.zeros(0, np.int64), 500, seed=0).start(0))[:, 0]
    assert (np.histogram(first, bins=10, range=(0, ROWS))[0] > 20).all()

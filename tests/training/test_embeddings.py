"""Where embeddings lie, and what is no embeddings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import embed
from saecore.runs.files import open_dataset, parquet_bytes, row_group_rows
from saecore.training.embeddings import Embeddings, open_embeddings

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
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):  # Python's floats are no float16 for every pyarrow
        lists = [row if row is None else np.array(row, kind.value_type.to_pandas_dtype()) for row in lists]
    return pa.table({"key": pa.array(map(str, range(len(lists)))), "pair": other, "embedding": pa.array(lists, kind)})


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
        try:
            pq.write_table(table(some, kind), tmp_path / f"{name}.parquet", row_group_size=100)
        except pa.ArrowNotImplementedError:
            assert int(pa.__version__.split(".")[0]) < 26
            pytest.skip("this old pyarrow writes no such lists with nulls")
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


def vectors(path: Path, lists: list[Any], **metadata: str) -> None:
    made = table(lists, pa.list_(pa.float32())).replace_schema_metadata(metadata)
    pq.write_table(made, path, row_group_size=4)


def test_a_list_of_several_vectors_is_several_rows(tmp_path: Path) -> None:
    """In the order of the images, then of their tokens; refused images have none."""
    rows = normal(30)
    lists: list[Any] = [part.ravel().tolist() for part in rows.reshape(10, 3, WIDTH)]
    vectors(tmp_path / "x.parquet", [None, *lists, None], site="layer1.residual:patches", width=str(WIDTH))
    source = open_embeddings(str(tmp_path / "x.parquet"))
    assert (source.site, source.width, source.block_rows.tolist()) == ("layer1.residual:patches", WIDTH, [9, 12, 9])
    np.testing.assert_array_equal(everything(source), rows)


def test_a_width_or_a_site_alone_means_embeddings(tmp_path: Path) -> None:
    """A program may use the key `width` for something else; a run of jobs.explain says the site of its SAE."""
    for key, value in (("width", "1024"), ("site", "layer1.residual:patches")):
        vectors(tmp_path / f"{key}.parquet", normal(5).tolist(), **{key: value})
        source = open_embeddings(str(tmp_path / f"{key}.parquet"))
        assert (source.site, source.width) == ("embedding", WIDTH)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"site": "layer2.residual:cls", "width": "6"},
            "several sites: layer1.residual:cls of width 6 and layer2",
        ),
        (
            {"site": "layer1.residual:cls", "width": "3"},
            "several sites: layer1.residual:cls of width 3 and layer1",
        ),
        ({}, "several sites: embedding and layer1.residual:cls of width 6"),
        ({"site": "layer1.residual:cls", "width": "six"}, "its metadata do not say what its vectors are"),
        ({"site": "the top", "width": "6"}, "its metadata do not say what its vectors are: 'the top' is no site"),
        ({"site": "layer1.residual:cls", "width": "-6"}, "are 6 long|several sites"),
    ],
)
def test_files_that_contradict_each_other_or_say_nothing_sensible(
    tmp_path: Path, other: dict[str, str], sentence: str
) -> None:
    vectors(tmp_path / "a.parquet", normal(5).tolist(), site="layer1.residual:cls", width="6")
    vectors(tmp_path / "b.parquet", normal(5).tolist(), **other)
    with pytest.raises(ValueError, match=sentence) as caught:
        open_embeddings(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_row_groups_of_wide_lists_are_small() -> None:
    """Vectors of 197 tokens of width 768; and what a run wrote before there were such, is cut as it was."""
    values = pa.array(np.zeros(150 * 197 * 768, np.float32))
    offsets = pa.array(np.arange(151, dtype=np.int32) * 197 * 768)
    wide = pa.table({"embedding": pa.ListArray.from_arrays(offsets, values)})
    file = pq.ParquetFile(pa.BufferReader(parquet_bytes(wide, row_group_rows("images", wide))))
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(counts) == 150
    assert 50 < max(counts) <= (64 << 20) // (197 * 768 * 4)
    assert row_group_rows("images", table(normal(50).tolist(), pa.list_(pa.float32()))) == 4096


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
        (raw("x.npy", normal(3)), "must say its shape"),
        (raw("x_3_d.npy", normal(3)), "must say its shape"),
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
    assert "--" not in str(caught.value)


def test_another_column_is_named(tmp_path: Path) -> None:
    pq.write_table(
        table(normal(5).tolist(), pa.list_(pa.float32())).rename_columns(["a", "b", "c"]), tmp_path / "x.parquet"
    )
    with pytest.raises(ValueError, match="has no column 'embedding'"):
        open_embeddings(str(tmp_path / "x.parquet"))
    np.testing.assert_array_equal(everything(open_embeddings(str(tmp_path / "x.parquet"), "c")), normal(5))

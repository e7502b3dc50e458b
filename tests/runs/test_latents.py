"""latents.parquet has two writers."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saecore.runs import latents


def column(*values: int) -> pa.Array:
    return pa.array(values, pa.int32())


def test_columns_are_added_and_replaced_and_the_other_writers_stay(tmp_path: Path) -> None:
    counted = pa.table({"latent": column(0, 1, 2), "images": [5, 0, 7], "co_latents": [[1, 2], None, []]})
    named = pa.table({"latent": column(2, 1, 9), "name": ["sea", "sky", "moss"], "score": [0.5, 0.25, 1.0]})
    latents.merge(str(tmp_path), counted.replace_schema_metadata({"indexed": "a"}))
    latents.merge(str(tmp_path), named.replace_schema_metadata({"vocabulary": "words"}))
    table = pq.read_table(tmp_path / "latents.parquet")
    assert table.to_pydict() == {
        "latent": [0, 1, 2, 9],
        "images": [5, 0, 7, None],
        "co_latents": [[1, 2], None, [], None],
        "name": [None, "sky", "sea", "moss"],
        "score": [None, 0.25, 0.5, 1.0],
    }
    assert table.schema.metadata == {b"indexed": b"a", b"vocabulary": b"words"}

    # Written again: its columns are replaced, also where a latent is no longer in them.
    written = latents.merge(str(tmp_path), pa.table({"latent": column(1, 0), "name": ["haze", "fog"]}))
    assert written["name"].to_pylist() == ["fog", "haze", None, None]
    assert written["score"].to_pylist() == [None, 0.25, 0.5, 1.0]
    assert written.drop_columns("name").equals(
        table.drop_columns("name").select(["latent", "images", "co_latents", "score"])
    )
    assert latents.read(str(tmp_path)) == written


def test_a_latent_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a latent twice"):
        latents.merge(str(tmp_path), pa.table({"latent": column(1, 1)}))
    assert latents.read(str(tmp_path)) is None


def test_both_orders_of_writing_give_one_table(store: Path) -> None:
    """And at an address."""
    tables = [pa.table({"latent": column(3, 1), "a": [3, 1]}), pa.table({"latent": column(1, 2), "b": ["x", "y"]})]
    for name, order in (("forth", (0, 1)), ("back", (1, 0))):
        for place in order:
            latents.merge(f"s3://bucket/{name}", tables[place])
    forth, back = (latents.read(f"s3://bucket/{name}") for name in ("forth", "back"))
    assert forth is not None
    assert back is not None
    assert forth.equals(back.select(forth.column_names))
    assert (store / "back" / "latents.parquet").exists()

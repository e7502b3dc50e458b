"""latents.parquet: one row per latent, with everything that is known of it.

    how often and how strongly it fires, where, with whom      jobs.index, through `saecore.query.statistics`
    what it is called, how surely                              jobs.name

Both jobs write through `merge`, each its own columns, in any order, and hold the lock of the run (`saecore.upkeep.lock`).
"""

import pyarrow as pa
import pyarrow.compute as pc

from saecore.runs.files import parquet_bytes
from saecore.storage import is_file, join_uri, read_parquet, write_atomic

NAME = "latents.parquet"
ROW_GROUP_ROWS = 65_536


def read(run_uri: str) -> pa.Table | None:
    """The table, ordered by `latent`; None if nothing was written yet."""
    uri = join_uri(run_uri, NAME)
    return read_parquet(uri) if is_file(uri) else None


def merge(run_uri: str, table: pa.Table) -> pa.Table:
    """Add the columns of `table` to RUN/latents.parquet, or replace them there; returns what was written.

    `table` has a column `latent`, in which no latent is twice. A latent that only one of the two tables has gets null in the
    columns of the other. Columns and metadata that `table` does not name stay as they are.
    """
    latent = table["latent"].cast(pa.int32())
    assert not latent.null_count, "a row without a latent"
    assert len(pc.unique(latent)) == table.num_rows, "a latent twice"
    before = read(run_uri)
    if before is None:
        before = pa.table({"latent": latent})
    every = pc.unique(pa.chunked_array([*before["latent"].chunks, *latent.chunks]))
    merged = pa.table({"latent": every.take(pc.sort_indices(every))})
    kept = [name for name in before.column_names if name not in table.column_names]
    merged = lookup(merged, before.select(["latent", *kept]), "latent")
    merged = lookup(merged, table.set_column(table.column_names.index("latent"), "latent", latent), "latent")
    metadata = {**(before.schema.metadata or {}), **(table.schema.metadata or {})}
    merged = merged.replace_schema_metadata(metadata)
    write_atomic(join_uri(run_uri, NAME), parquet_bytes(merged, ROW_GROUP_ROWS))
    return merged


def lookup(table: pa.Table, more: pa.Table, key: str) -> pa.Table:
    """`table` with the other columns of the row of `more` that has the same key: of the first such row, null if there is none.

    Rows are looked up by position, since `Table.join` does not take columns of lists.
    """
    place = pc.index_in(table[key], more[key])
    for name in more.column_names:
        if name != key:
            table = table.append_column(name, more[name].take(place))
    return table

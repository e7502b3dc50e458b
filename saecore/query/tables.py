"""A finished run as tables: which files hold what, through its manifest and, where there is one, its index.

Image to chunk is arithmetic on the plan, chunk to file the manifest's business, so that the rows of some images are read from
the files that hold them and no others.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from saecore.images.chunks import read_chunk
from saecore.numbering import Numbering, index_of
from saecore.query import by_latent
from saecore.query.by_latent import Reader
from saecore.runs import latents
from saecore.runs.files import of_chunks, open_dataset, read_manifest, read_plan
from saecore.runs.record import Record
from saecore.storage import Place

ORIGINAL_BYTES = 16 << 20
"""Encoded images that are held at once."""


def connect(**settings: Any) -> duckdb.DuckDBPyConnection:
    """DuckDB in memory, as questions and the index need it. Joins are made as they are written: the small side right."""
    # Nothing is fetched from a network, and the order of rows is nobody's promise.
    fixed = {"autoinstall_known_extensions": False, "preserve_insertion_order": False}
    database = duckdb.connect(config={**fixed, **settings})
    # It takes a data set, of whatever size, for one row, and would hold all of it to look up a few images.
    database.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    # It draws one on standard output where it takes the process for an interactive one, such as those of multiprocessing.
    database.execute("SET enable_progress_bar = false")
    return database


class Tables:
    """The tables of the run at `uri`. Files are opened when they are asked for, footers are kept. For one thread at a time."""

    def __init__(self, uri: str, record: Record) -> None:
        self.uri = uri
        self.n_latents = record.n_latents
        self.manifest = read_manifest(uri).drop_columns(["bytes", "sha256"])
        self.index = by_latent.read_index(uri, record.fingerprint)
        """None where there is none."""
        self.reader = None if self.index is None else Reader(uri, self.index)
        covered = np.zeros(0, np.int64) if self.index is None else self.index.chunk_ids()
        self.not_indexed = np.setdiff1d(self.manifest["chunk_id"].to_numpy(), covered)
        """Chunk ids."""

    def files(self, table: str, chunk_ids: np.ndarray | None = None) -> pyarrow.dataset.Dataset:
        """`images`, `activations` or `maps`: of all chunks, or of some."""
        held = self.manifest if chunk_ids is None else of_chunks(self.manifest, chunk_ids)
        return open_dataset(self.uri, table, held)

    @functools.cached_property
    def schemas(self) -> dict[str, pa.Schema]:
        """Of the tables that the run itself wrote, from one file each."""
        first = self.manifest["chunk_id"].to_numpy()[:1]
        return {table: self.files(table, first).schema for table in self.manifest["table"].unique().to_pylist()}

    @functools.cached_property
    def datasets(self) -> dict[str, pyarrow.dataset.Dataset]:
        """`images`, `activations`, `by_latent`, `top_images`, and `maps` where the run has some.

        by_latent: the sorted files, and of the chunks that they do not cover the activations as they lie. top_images is empty
        without an index.
        """
        found = {table: self.files(table) for table in self.schemas}
        found["top_images"] = pyarrow.dataset.dataset(by_latent.top_schema(self.schemas).empty_table())
        place = Place(self.uri)
        indexed = {} if self.reader is None else self.reader.paths()
        paths = {name: [f"{place.path}/{path}" for path in held] for name, held in indexed.items()}
        waiting = self.files("activations", self.not_indexed).files if len(self.not_indexed) else []
        paths["by_latent"] = [*paths.get("by_latent", []), *waiting] or found["activations"].files
        for name, held in paths.items():
            if held:
                found[name] = place.dataset(held)
        return found

    @functools.cached_property
    def latents(self) -> pa.Table:
        """latents.parquet; where nothing was written yet, the numbers of the latents alone."""
        found = latents.read(self.uri)
        return pa.table({"latent": pa.array(range(self.n_latents), pa.int32())}) if found is None else found

    @functools.cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        # What is asked comes from people: it reads what is registered here, no files, no addresses, no variables of Python's.
        database = connect(enable_external_access=False, python_enable_replacements=False)
        database.execute("SET lock_configuration = true")
        for name, dataset in self.datasets.items():
            database.register(name, dataset)
        database.register("latents", self.latents)
        return database

    def sql(self, query: str, parameters: Sequence[Any] = (), **more: pa.Table | pyarrow.dataset.Dataset) -> pa.Table:
        """DuckDB's answer about `datasets`, `latents`, and `more` by name; ValueError for what is not one SELECT."""
        for name, table in more.items():
            self._database.register(name, table)
        try:
            statements = self._database.extract_statements(query)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                kinds = ", ".join(statement.type.name for statement in statements)
                raise ValueError(
                    "a question is one SELECT (FROM, WITH, VALUES, DESCRIBE, SUMMARIZE and SHOW are some too): "
                    f"this is {len(statements)} statements{kinds and f', {kinds}'}"
                )
            return self._database.sql(statements[0], params=list(parameters)).to_arrow_table()
        finally:
            for name in more:
                self._database.unregister(name)

    @functools.cached_property
    def plan(self) -> pa.Table:
        """plan.parquet: the chunks that the run's input was cut into."""
        return read_plan(self.uri)

    @functools.cached_property
    def numbering(self) -> Numbering:
        """The numbers and places of the run's images."""
        return Numbering(self.plan)

    def rows(
        self,
        table: str,
        image_ids: Sequence[int] | pa.ChunkedArray,
        columns: Sequence[str],
        condition: pyarrow.dataset.Expression | None = None,
    ) -> pa.Table:
        """`image_id` and these columns of the rows of some images, in any order: of the chunks that hold them, no others."""
        wanted = np.asarray(image_ids, np.int64)
        these = pc.field("image_id").isin(pa.array(wanted))
        # At least one file, for its schema.
        dataset = self.files(table, np.unique(self.numbering.chunks_of(wanted if len(wanted) else [0])))
        return dataset.to_table(
            columns=["image_id", *columns], filter=these if condition is None else these & condition
        )

    def originals(self, image_ids: Sequence[int] | np.ndarray) -> Iterator[pa.Table]:
        """RAW rows of some images, from the shards that the run read, chunk by chunk, so that a shard is opened once for all.

        Of a chunk whose storage does not answer there is no row. A shard may have changed since: its row then has another key
        than the run's, or an error.
        """
        wanted = np.asarray(image_ids, np.int64)
        chunk_ids = self.numbering.chunks_of(wanted)
        for chunk in self.plan.filter(pc.is_in(self.plan["chunk_id"], pa.array(np.unique(chunk_ids)))).to_pylist():
            places = index_of(wanted[chunk_ids == chunk["chunk_id"]])
            # The storage does not answer, or the shard is gone.
            with contextlib.suppress(OSError):
                yield from read_chunk(chunk, batch_bytes=ORIGINAL_BYTES, indices=set(places.tolist()))

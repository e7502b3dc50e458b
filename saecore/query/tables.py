"""A finished run as tables: which files hold what, through its manifest and, if there is one, its index.

The plan gives the chunk of an image (`saecore.numbering`), the manifest gives the files of a chunk. So the rows of some images
are read from the files that hold them and from no others.
"""

import contextlib
import functools
import weakref
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
from saecore.runs.files import of_chunks, of_images, open_dataset, read_manifest, read_plan
from saecore.runs.record import Record
from saecore.storage import Place

ORIGINAL_BYTES = 16 << 20
"""Encoded images that are held at once."""


def connect(**settings: Any) -> duckdb.DuckDBPyConnection:
    """DuckDB in memory, as questions and the index need it. A join stays as it is written: put the small side right."""
    # DuckDB downloads no extension, and promises no order of rows.
    fixed = {"autoinstall_known_extensions": False, "preserve_insertion_order": False}
    database = duckdb.connect(config={**fixed, **settings})
    # DuckDB estimates one row for an Arrow data set and would load all of it, so joins stay as written.
    database.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    # DuckDB draws a progress bar on standard output if it takes the process to be interactive, as it does multiprocessing's.
    database.execute("SET enable_progress_bar = false")
    return database


class Tables:
    """The tables of the run at `uri`. Files are opened when they are needed, and footers are kept. For one thread at a time."""

    def __init__(self, uri: str, record: Record) -> None:
        self.uri = uri
        self.n_latents = record.n_latents
        manifest = read_manifest(uri)
        self.manifest = manifest.drop_columns(["bytes", "sha256"])
        index = by_latent.read_index(uri, record.fingerprint)
        self.index = None if index is None else by_latent.held_by(index, manifest)
        """None if the run has no index."""
        self.reader = None if self.index is None else Reader(uri, self.index)
        covered = np.zeros(0, np.int64) if self.index is None else self.index.chunk_ids()
        self.not_indexed = np.setdiff1d(self.manifest["chunk_id"].to_numpy(), covered)
        """Ids of the chunks that no segment of the index covers."""

    def files(self, table: str, chunk_ids: np.ndarray | None = None) -> pyarrow.dataset.Dataset:
        """`images`, `activations` or `maps`: of all chunks, or of some."""
        held = self.manifest if chunk_ids is None else of_chunks(self.manifest, chunk_ids)
        return open_dataset(self.uri, table, held)

    @functools.cached_property
    def schemas(self) -> dict[str, pa.Schema]:
        """The schemas of the tables that the run itself wrote, each read from one file."""
        first = self.manifest["chunk_id"].to_numpy()[:1]
        return {table: self.files(table, first).schema for table in self.manifest["table"].unique().to_pylist()}

    @functools.cached_property
    def datasets(self) -> dict[str, pyarrow.dataset.Dataset]:
        """`images`, `activations`, `by_latent`, `top_images`, and `maps` if the run has some.

        by_latent: the sorted files, and the unsorted activations of the chunks that these do not cover. Without an index
        top_images is empty.
        """
        datasets = {table: self.files(table) for table in self.schemas}
        datasets["top_images"] = pyarrow.dataset.dataset(by_latent.top_schema(self.schemas).empty_table())
        place = Place(self.uri)
        indexed = {} if self.reader is None else self.reader.paths()
        paths = {name: [f"{place.path}/{path}" for path in held] for name, held in indexed.items()}
        waiting = self.files("activations", self.not_indexed).files if len(self.not_indexed) else []
        paths["by_latent"] = [*paths.get("by_latent", []), *waiting] or datasets["activations"].files
        for name, held in paths.items():
            if held:
                datasets[name] = place.dataset(held)
        return datasets

    @functools.cached_property
    def latents(self) -> pa.Table:
        """latents.parquet; if it is not there yet, a table with the numbers of the latents only."""
        table = latents.read(self.uri)
        return pa.table({"latent": pa.array(range(self.n_latents), pa.int32())}) if table is None else table

    @functools.cached_property
    def _database(self) -> duckdb.DuckDBPyConnection:
        # People write these queries. They may read the tables that are registered here: no file, no address, no Python object.
        database = connect(enable_external_access=False, python_enable_replacements=False)
        database.execute("SET lock_configuration = true")
        for name, dataset in self.datasets.items():
            database.register(name, dataset)
        database.register("latents", self.latents)
        # Threads of DuckDB that let go of Arrow's objects while Python ends abort the process: close it before, at exit too.
        weakref.finalize(self, database.close)
        return database

    def sql(self, query: str, parameters: Sequence[Any] = (), **more: pa.Table | pyarrow.dataset.Dataset) -> pa.Table:
        """DuckDB's answer about `datasets`, `latents`, and the tables of `more` by name; ValueError unless it is one SELECT."""
        for name, table in more.items():
            self._database.register(name, table)
        try:
            statements = self._database.extract_statements(query)
            if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
                kinds = ", ".join(statement.type.name for statement in statements)
                raise ValueError(
                    "a question is one SELECT (FROM, WITH, VALUES, DESCRIBE, SUMMARIZE and SHOW are SELECTs too): "
                    f"this is {len(statements)} statements{kinds and f', {kinds}'}"
                )
            return self._database.sql(statements[0], params=list(parameters)).to_arrow_table()
        finally:
            for name in more:
                self._database.unregister(name)

    @functools.cached_property
    def plan(self) -> pa.Table:
        """The chunks of the manifest. The plan of a run that grows holds more: their rows do not count before all are there."""
        plan = read_plan(self.uri)
        return plan.filter(pc.is_in(plan["chunk_id"], self.manifest["chunk_id"].combine_chunks()))

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
        """`image_id` and these columns of the rows of some images, in any order. Opens only files that hold these images."""
        wanted = np.asarray(image_ids, np.int64)
        these = of_images(wanted)
        # At least one file, since the schema comes from it.
        dataset = self.files(table, np.unique(self.numbering.chunks_of(wanted if len(wanted) else [0])))
        return dataset.to_table(
            columns=["image_id", *columns], filter=these if condition is None else these & condition
        )

    def originals(self, image_ids: Sequence[int] | np.ndarray) -> Iterator[pa.Table]:
        """RAW rows of some images, read again from the run's input, chunk by chunk, so that a shard is opened once for all.

        A chunk whose storage does not answer has no row. A shard may have changed since the run: its row then has an error, or
        another key than in the run.
        """
        wanted = np.asarray(image_ids, np.int64)
        chunk_ids = self.numbering.chunks_of(wanted)
        for chunk in self.plan.filter(pc.is_in(self.plan["chunk_id"], pa.array(np.unique(chunk_ids)))).to_pylist():
            places = index_of(wanted[chunk_ids == chunk["chunk_id"]])
            # The storage does not answer, or the shard is gone.
            with contextlib.suppress(OSError):
                yield from read_chunk(chunk, batch_bytes=ORIGINAL_BYTES, indices=set(places.tolist()))

"""What latents.parquet says of each latent: how often and how strongly it fires, where in the picture, and with whom.

All of it is exact and over all images, but for co-firing in runs of more than a million: that is counted on evenly spread
chunks of so many. Each pass goes by ranges of latents or by groups of chunks: memory does not grow with the run.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.query.by_latent import Index
from saecore.query.results import Results
from saecore.runs import latents
from saecore.runs.files import of_chunks
from saecore.runs.latents import lookup
from saecore.schema import LATENTS

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
LISTED_IMAGES, LISTED_LATENTS = 20, 10

ROWS_AT_ONCE = 8_000_000
"""Rows of by_latent whose quantiles are taken together: DuckDB holds all their activations."""

OF = b"indexed"
"""Metadata of latents.parquet: the segments whose statistics it holds."""

CO_FIRING_IMAGES = 1_000_000
IMAGES_AT_ONCE = 65_536
PAIRS_AT_ONCE = 64_000_000
"""Pairs of latents that are counted in one pass over the images: 256 MB."""


def written(uri: str, index: Index) -> bool:
    """Whether latents.parquet says what this index gives."""
    found = latents.read(uri)
    return found is not None and (found.schema.metadata or {}).get(OF) == _of(index)


def write(run: Results) -> pa.Table:
    """Count, and put LATENTS beside what else is in latents.parquet."""
    index = run.tables.index
    assert index is not None, "statistics are those of an index"
    return latents.merge(run.uri, statistics(run, index).replace_schema_metadata({OF: _of(index)}))


def _of(index: Index) -> bytes:
    return ",".join(segment.name for segment in index.segments).encode()


def statistics(run: Results, index: Index) -> pa.Table:
    """LATENTS of an indexed run, all latents."""
    fired = run.sql(
        """SELECT latent, count(*) AS images, avg(activation) AS mean, max(activation) AS max
        FROM by_latent WHERE activation <> 0 GROUP BY latent"""
    )
    images = np.zeros(run.n_latents, np.int64)
    images[fired["latent"].to_numpy()] = fired["images"].to_numpy()
    maps = np.sum([segment.maps for segment in index.segments], axis=0)
    extents = np.sum([segment.extent for segment in index.segments], axis=0)
    found = pa.table(
        {
            "latent": np.arange(run.n_latents, dtype=np.int32),
            "images": images,
            "rate": images / max(run.n_images, 1),
            "dead": images == 0,
            "maps": maps,
            "extent": pa.array(extents / np.maximum(maps, 1), mask=maps == 0),
        }
    )
    for more in (fired.drop_columns("images"), quantiles(run, images), top_images(run), co_firing(run)):
        found = lookup(found, more, "latent")
    return found.select(LATENTS.names).cast(LATENTS)


def quantiles(run: Results, images: np.ndarray) -> pa.Table:
    """Of the activations of each latent that fires, interpolated as NumPy does by default. images: for which each fires."""
    columns = ", ".join(f"quantile_cont(activation, {share}) AS {name}" for name, share in QUANTILES.items())
    # A range ends where its rows, counted from the run's first, pass a multiple of ROWS_AT_ONCE.
    part = np.cumsum(images) // ROWS_AT_ONCE
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    found = [
        run.sql(
            f"SELECT latent, {columns} FROM by_latent WHERE activation <> 0 AND latent BETWEEN ? AND ? GROUP BY latent",
            int(start),
            int(end - 1),
        )
        for start, end in zip(starts, [*starts[1:], len(images)], strict=True)
    ]
    return pa.concat_tables(found)


def top_images(run: Results) -> pa.Table:
    """The first images of each latent that fires, and their activations, as lists."""
    first = f"ORDER BY activation DESC, image_id)[:{LISTED_IMAGES}]"
    return run.sql(
        f"""SELECT latent, list(image_id {first} AS top_images, list(activation {first} AS top_activations
        FROM (SELECT DISTINCT latent, image_id, activation FROM top_images) GROUP BY latent"""
    )


def co_firing(run: Results) -> pa.Table:
    """The latents that fire for the same images, as `Results.co_firing` has them, but for its limit on images; as lists."""
    chunk_ids = np.unique(run.tables.manifest["chunk_id"].to_numpy())
    n_chunks = len(chunk_ids) * min(1.0, CO_FIRING_IMAGES / max(run.n_images, 1))
    chosen = chunk_ids[np.linspace(0, len(chunk_ids) - 1, max(1, round(n_chunks))).astype(int)]
    lists: dict[str, list[Any]] = {"latent": [], "co_latents": [], "co_share": [], "co_lift": []}
    step = max(1, PAIRS_AT_ONCE // run.n_latents)
    for start in range(0, run.n_latents, step):
        pairs = np.zeros((min(step, run.n_latents - start), run.n_latents), np.int32)
        alone, n_images = np.zeros(run.n_latents, np.int64), 0
        for fires in _firing(run, chosen):
            pairs += (fires[:, start : start + step].T @ fires).toarray()
            alone += np.asarray(fires.sum(0)).ravel()
            n_images += fires.shape[0]
        for latent, both in enumerate(pairs, start):
            both = both.astype(np.float64)  # products of counts pass 2^31
            both[latent] = 0
            others = np.flatnonzero(both)
            jaccard = both[others] / (alone[latent] + alone[others] - both[others])
            others = others[_largest(jaccard, LISTED_LATENTS)]
            if alone[latent]:
                lists["latent"].append(latent)
                lists["co_latents"].append(others)
                lists["co_share"].append(both[others] / alone[latent])
                lists["co_lift"].append(both[others] * n_images / (alone[latent] * alone[others]))
    return pa.table(lists)


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Where the n largest are, largest first, of equal ones the first."""
    least = np.partition(values, -n)[-n] if len(values) > n else -np.inf
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:n]


def _firing(run: Results, chunk_ids: np.ndarray) -> Iterator[Any]:
    """Sparse matrices (images, latents) with a 1 where a latent fires, about `IMAGES_AT_ONCE` images each."""
    from scipy import sparse

    held = of_chunks(run.tables.manifest, chunk_ids)
    images = pc.sum(held["rows"].filter(pc.equal(held["table"], "images"))).as_py()
    for group in np.array_split(chunk_ids, min(len(chunk_ids), -(-images // IMAGES_AT_ONCE))):
        rows = run.tables.files("activations", group).to_table(columns=["image_id", "latent", "activation"])
        image_ids, place = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
        fires = rows["activation"].to_numpy() != 0
        where = place[fires], rows["latent"].to_numpy()[fires]
        yield sparse.csr_array((np.ones(len(where[0]), np.int32), where), shape=(len(image_ids), run.n_latents))

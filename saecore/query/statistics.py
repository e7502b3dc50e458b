"""What latents.parquet says of each latent: how often and how strongly it fires, where in the picture, and with which others.

Every figure is exact and counts all images, with one exception: co-firing in runs of more than a million images is counted on
evenly spread chunks of a million. Each pass goes by ranges of latents or by groups of chunks, so memory does not grow with the
run.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from saecore.methods import METHODS, UNKNOWN
from saecore.query.by_latent import Index
from saecore.query.results import Results
from saecore.runs import latents
from saecore.runs.files import of_chunks
from saecore.runs.latents import lookup
from saecore.schema import LATENTS, TOKEN_LATENTS

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
LISTED_IMAGES, LISTED_LATENTS = 20, 10
"""Strongest images, and latents that fire for the same images, of each latent."""

OF = b"indexed"
"""Metadata key of latents.parquet: the segments whose statistics it holds."""


class Limits(NamedTuple):
    """How much is held at once. Only `co_firing_images` changes results."""

    rows: int = 8_000_000
    """Rows of by_latent whose quantiles are taken together: DuckDB holds all their activations."""
    images: int = 65_536
    """Images whose co-firing is counted together."""
    pairs: int = 64_000_000
    """Pairs of latents that are counted in one pass over the images: 256 MB."""
    co_firing_images: int = 1_000_000
    """Images on which co-firing is counted, where a run has more."""


DEFAULT_LIMITS = Limits()


def written(uri: str, index: Index) -> bool:
    """Whether latents.parquet holds the statistics of this index."""
    table = latents.read(uri)
    return table is not None and (table.schema.metadata or {}).get(OF) == _of(index)


def write(run: Results, limits: Limits = DEFAULT_LIMITS) -> pa.Table:
    """Count, and add LATENTS to the other columns of latents.parquet."""
    index = run.tables.index
    assert index is not None, "statistics are those of an index"
    return latents.merge(run.uri, statistics(run, index, limits).replace_schema_metadata({OF: _of(index)}))


def _of(index: Index) -> bytes:
    return ",".join(segment.name for segment in index.segments).encode()


def statistics(run: Results, index: Index, limits: Limits = DEFAULT_LIMITS) -> pa.Table:
    """LATENTS of an indexed run, with a row for every latent; TOKEN_LATENTS where the SAE reads tokens."""
    fired = run.sql(
        """SELECT latent, count(*) AS images, avg(activation) AS mean, max(activation) AS max
        FROM by_latent WHERE activation <> 0 GROUP BY latent"""
    )
    images = np.zeros(run.n_latents, np.int64)
    images[fired["latent"].to_numpy()] = fired["images"].to_numpy()
    maps = np.sum([segment.maps for segment in index.segments], axis=0)
    extents = np.sum([segment.extent for segment in index.segments], axis=0)
    table = pa.table(
        {
            "latent": np.arange(run.n_latents, dtype=np.int32),
            "images": images,
            "rate": images / max(run.n_images, 1),
            "dead": images == 0,
            "maps": maps,
            "extent": pa.array(extents / np.maximum(maps, 1), mask=maps == 0),
        }
    )
    others = fired.drop_columns("images"), quantiles(run, images, limits), top_images(run), co_firing(run, limits)
    schema = TOKEN_LATENTS if run.record.reads_tokens else LATENTS
    for columns in (*others, *(_of_tokens(run) if run.record.reads_tokens else ())):
        table = lookup(table, columns, "latent")
    return table.select(schema.names).cast(schema)


def _of_tokens(run: Results) -> tuple[pa.Table, pa.Table]:
    """At how many patches each latent fires, and how far its causes lie from its activation: means over images."""
    patches = run.sql("SELECT latent, avg(patches) AS patches FROM activations WHERE activation <> 0 GROUP BY latent")
    causes = [method for method in run.methods if METHODS.get(method, UNKNOWN).is_cause]
    apart = run.sql(
        """SELECT latent, avg(rank_correlation) AS rank_correlation, avg(peak_distance) AS peak_distance
        FROM maps WHERE method = ? GROUP BY latent""",
        causes[0] if causes else "",
    )
    return patches, apart


def quantiles(run: Results, images: np.ndarray, limits: Limits) -> pa.Table:
    """Quantiles of the activations of each latent that fires, interpolated as NumPy does by default.

    images: int64 (n latents), for how many images each latent fires.
    """
    columns = ", ".join(f"quantile_cont(activation, {share}) AS {name}" for name, share in QUANTILES.items())
    # A range of latents ends where the rows up to it pass a multiple of `limits.rows`.
    part = np.cumsum(images) // limits.rows
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    parts = [
        run.sql(
            f"SELECT latent, {columns} FROM by_latent WHERE activation <> 0 AND latent BETWEEN ? AND ? GROUP BY latent",
            int(start),
            int(end - 1),
        )
        for start, end in zip(starts, [*starts[1:], len(images)], strict=True)
    ]
    return pa.concat_tables(parts)


def top_images(run: Results) -> pa.Table:
    """The strongest images of each latent that fires, and their activations, as lists."""
    first = f"ORDER BY activation DESC, image_id)[:{LISTED_IMAGES}]"
    return run.sql(
        f"""SELECT latent, list(image_id {first} AS top_images, list(activation {first} AS top_activations
        FROM (SELECT DISTINCT latent, image_id, activation FROM top_images) GROUP BY latent"""
    )


def co_firing(run: Results, limits: Limits) -> pa.Table:
    """The latents that fire for the same images, as lists; as in `Results.co_firing`, on `limits.co_firing_images` images."""
    chunk_ids = np.unique(run.tables.manifest["chunk_id"].to_numpy())
    n_chunks = len(chunk_ids) * min(1.0, limits.co_firing_images / max(run.n_images, 1))
    chosen = chunk_ids[np.linspace(0, len(chunk_ids) - 1, max(1, round(n_chunks))).astype(int)]
    lists: dict[str, list[Any]] = {"latent": [], "co_latents": [], "co_share": [], "co_lift": []}
    step = max(1, limits.pairs // run.n_latents)
    for start in range(0, run.n_latents, step):
        pairs = np.zeros((min(step, run.n_latents - start), run.n_latents), np.int32)
        alone, n_images = np.zeros(run.n_latents, np.int64), 0
        for fires in _firing(run, chosen, limits.images):
            pairs += (fires[:, start : start + step].T @ fires).toarray()
            alone += np.asarray(fires.sum(0)).ravel()
            n_images += fires.shape[0]
        for latent, both in enumerate(pairs, start):
            both = both.astype(np.float64)  # since products of counts pass 2^31
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
    """The places of the n largest values, the largest first; among equal values the first places count."""
    least = np.partition(values, -n)[-n] if len(values) > n else -np.inf
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")][:n]


def _firing(run: Results, chunk_ids: np.ndarray, at_once: int) -> Iterator[Any]:
    """Sparse matrices (images, latents) with a 1 where a latent fires, of about `at_once` images each."""
    from scipy import sparse

    held = of_chunks(run.tables.manifest, chunk_ids)
    images = pc.sum(held["rows"].filter(pc.equal(held["table"], "images"))).as_py()
    for group in np.array_split(chunk_ids, min(len(chunk_ids), -(-images // at_once))):
        rows = run.tables.files("activations", group).to_table(columns=["image_id", "latent", "activation"])
        image_ids, place = np.unique(rows["image_id"].to_numpy(), return_inverse=True)
        fires = rows["activation"].to_numpy() != 0
        where = place[fires], rows["latent"].to_numpy()[fires]
        yield sparse.csr_array((np.ones(len(where[0]), np.int32), where), shape=(len(image_ids), run.n_latents))

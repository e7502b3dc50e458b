"""What a run's first page says besides its record, as plain values.

How often latents fire, how well images are reconstructed, which images were refused, how faithful the maps are where that was
measured. Histograms are counted where the rows are.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from saecore.query.histograms import Bins, alike
from saecore.query.results import Results
from saecore.runs.fit import POOR
from saecore.storage import is_file, join_uri, read_parquet

BINS = 24

REFUSED_LISTED = 50
"""Refused images that are named."""


class Overview(NamedTuple):
    """The figures of a run's first page."""

    rates: Bins
    """Latents that fire, by log10 of their firing rate."""
    figures: dict[str, dict[str, float]]
    """l0, cosine, fvu of the images: mean, low (5 %), median, high (95 %)."""
    histograms: dict[str, Bins]
    """Of those of them that differ between images."""
    poor_fit: bool
    """Whether half of the images or more are reconstructed poorly: what to read before all else."""
    refused: list[dict[str, Any]]
    """The first refused images: image_id, uri, key, error, error_detail."""
    faithfulness: list[dict[str, Any]]
    """Means of faithfulness.parquet by method; empty where nothing was measured."""


def overview(run: Results, firing_rates: Sequence[float]) -> Overview:
    """Of a run with these firing rates, none of them 0; reads three columns of all images."""
    rates = [math.log10(rate) for rate in firing_rates]
    # A decade at least: of one image, every latent that fires does for all.
    counts, edges = np.histogram(rates, BINS, (min(math.floor(min(rates, default=0.0)), -1), 0))
    figures, histograms = {}, {}
    for name in ("l0", "cosine", "fvu"):
        query = f"""SELECT avg({name}), min({name}), max({name}), quantile_cont({name}, [0.05, 0.5, 0.95])
            FROM images WHERE error IS NULL"""
        mean, least, most, quantiles = run.sql(query).to_pylist()[0].values()
        if mean is None:  # all images were refused
            continue
        figures[name] = {"mean": mean, **dict(zip(("low", "median", "high"), quantiles, strict=True))}
        if not alike(least, most):
            histograms[name] = histogram(run, name, least, most)
    refused = """SELECT image_id, uri, key, error, error_detail FROM images
        WHERE error IS NOT NULL ORDER BY image_id LIMIT ?"""
    return Overview(
        Bins(edges.tolist(), counts.tolist()),
        figures,
        histograms,
        figures.get("fvu", {"median": 0.0})["median"] >= POOR,
        run.sql(refused, REFUSED_LISTED).to_pylist(),
        _faithfulness(run),
    )


def histogram(run: Results, name: str, least: float, most: float) -> Bins:
    """Of a column of `images`; of whole numbers in bins of whole width."""
    n = BINS
    if name == "l0":
        width = math.ceil((most - least + 1) / BINS)
        n = math.ceil((most - least + 1) / width)
        most = least + n * width
    query = f"""SELECT least(floor(({name} - $1) / ($2 - $1) * $3), $3 - 1)::INT AS bin, count(*) AS images
        FROM images WHERE error IS NULL GROUP BY bin"""
    counts = {row["bin"]: row["images"] for row in run.sql(query, least, most, n).to_pylist()}
    return Bins(np.linspace(least, most, n + 1).tolist(), [counts.get(place, 0) for place in range(n)])


def _faithfulness(run: Results) -> list[dict[str, Any]]:
    if not is_file(uri := join_uri(run.uri, "faithfulness.parquet")):
        return []
    measured = read_parquet(uri)
    figures = [field.name for field in measured.schema if pa.types.is_floating(field.type)]
    means = measured.group_by("method").aggregate([(name, "mean") for name in figures])
    named = means.select(["method", *(f"{name}_mean" for name in figures)])
    return named.rename_columns(["method", *figures]).to_pylist()

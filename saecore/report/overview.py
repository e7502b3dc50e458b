"""The figures of a run's first page, as plain values.

They say how often latents fire, how well images are reconstructed, and which images were refused.
DuckDB counts the histograms, so that no column of a large run is loaded.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saecore.query.histograms import Bins, alike
from saecore.query.results import Results
from saecore.runs.fit import POOR

BINS = 24

REFUSED_LISTED = 50
"""Refused images that are named."""


class Overview(NamedTuple):
    """The figures of a run's first page."""

    rates: Bins
    """Latents that fire, counted by log10 of their firing rate."""
    figures: dict[str, dict[str, float]]
    """l0, cosine, fvu of the images: mean, low (5 %), median, high (95 %)."""
    histograms: dict[str, Bins]
    """Of the figures that are not the same for all images."""
    poor_fit: bool
    """Whether half of the images or more are reconstructed poorly. A reader has to know that before anything else."""
    refused: list[dict[str, Any]]
    """The first refused images: image_id, uri, key, error, error_detail."""


def overview(run: Results, firing_rates: Sequence[float]) -> Overview:
    """The figures of a run whose latents fire at these rates, none of them 0. Reads three columns of all images."""
    rates = [math.log10(rate) for rate in firing_rates]
    # One decade at least: in a run of one image, every latent that fires has the rate 1.
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
    )


def histogram(run: Results, name: str, least: float, most: float) -> Bins:
    """Counts of a column of `images` between its least and its largest value; l0 is whole, so its bins have whole widths."""
    n = BINS
    if name == "l0":
        width = math.ceil((most - least + 1) / BINS)
        n = math.ceil((most - least + 1) / width)
        most = least + n * width
    query = f"""SELECT least(floor(({name} - $1) / ($2 - $1) * $3), $3 - 1)::INT AS bin, count(*) AS images
        FROM images WHERE error IS NULL GROUP BY bin"""
    counts = {row["bin"]: row["images"] for row in run.sql(query, least, most, n).to_pylist()}
    return Bins(np.linspace(least, most, n + 1).tolist(), [counts.get(place, 0) for place in range(n)])

"""Which latents fire more on one set of images than on another: effect size, test, and correction for testing thousands.

Of a latent that fires for a of n_a images of one set and b of n_b of the other:

    effect   Cohen's h = 2 asin sqrt(a / n_a) - 2 asin sqrt(b / n_b), in [-pi, pi]: 0.2 is called small, 0.8 large
             (Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988)
    p        of the 2 x 2 table, two-sided: Pearson's chi-squared without continuity correction where all four expected
             counts are at least 5, Fisher's exact test elsewhere
    q        p after Benjamini and Hochberg's correction over all latents that fire in either set

A small p says that a difference is no accident of the draw; in a large collection almost no difference is one. Read the effect.
Left out: how strongly a latent fires.
"""

import numpy as np
import pyarrow as pa

LEAST_EXPECTED = 5
"""Expected count of a cell below which the statistic does not follow the chi-squared distribution: Cochran's usual rule."""


def contrast(counts: pa.Table, n_a: int, n_b: int) -> pa.Table:
    """Columns latent, images_a, images_b -> the same with rate_a, rate_b, odds_ratio, effect, p and q, sorted by effect.

    odds_ratio: with half an image added to each of the four counts, so that no ratio is infinite (Haldane's correction).
    """
    from scipy import stats  # takes half a second, which other questions do not need

    a, b = (counts[name].to_numpy().astype(np.float64) for name in ("images_a", "images_b"))
    rate_a, rate_b = a / n_a, b / n_b
    fired, n = a + b, n_a + n_b
    with np.errstate(invalid="ignore"):  # 0 / 0: a latent that fires for all images, or for none
        chi_squared = n * (a * (n_b - b) - b * (n_a - a)) ** 2 / (fired * (n - fired) * n_a * n_b)
    p = stats.chi2.sf(np.nan_to_num(chi_squared), 1)
    small = np.minimum(fired, n - fired) * min(n_a, n_b) / n < LEAST_EXPECTED
    # Most latents are rare, and few different tables occur among them: test each table once.
    tables, place = np.unique(np.stack([a, b], 1)[small].astype(int), axis=0, return_inverse=True)
    exact = [
        stats.fisher_exact([[fires_a, n_a - fires_a], [fires_b, n_b - fires_b]]).pvalue for fires_a, fires_b in tables
    ]
    p[small] = np.array(exact)[place.ravel()]
    columns = {
        "rate_a": rate_a,
        "rate_b": rate_b,
        "odds_ratio": (a + 0.5) * (n_b - b + 0.5) / ((b + 0.5) * (n_a - a + 0.5)),
        "effect": 2 * np.arcsin(np.sqrt(rate_a)) - 2 * np.arcsin(np.sqrt(rate_b)),
        "p": p,
        "q": stats.false_discovery_control(p) if len(p) else p,
    }
    for name, column in columns.items():
        counts = counts.append_column(name, pa.array(column, pa.float64()))
    return counts.sort_by([("effect", "descending"), ("latent", "ascending")])

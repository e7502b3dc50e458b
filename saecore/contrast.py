"""Which latents fire more on one set of images than on another: effect size, test, and correction for testing thousands.

Of a latent that fires for a of n_a images of one set and b of n_b of the other:

    effect   Cohen's h = 2 asin sqrt(a / n_a) - 2 asin sqrt(b / n_b), in [-pi, pi]: 0.2 is called small, 0.8 large
             (Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988)
    p        of the 2 x 2 table, two-sided: Pearson's chi-squared without continuity correction where all four expected
             counts are at least 5, Fisher's exact test elsewhere
    q        p after Benjamini and Hochberg's correction over all latents that fire in either set

A small p says that a difference is no accident of the draw; in a large collection almost none is. Read the effect.
Left out: how strongly a latent fires.
"""

import numpy as np
import pyarrow as pa

LEAST_EXPECTED = 5
"""Of each cell, below which chi-squared's distribution is not that of the statistic: the usual rule, Cochran's."""


def contrast(counts: pa.Table, n_a: int, n_b: int) -> pa.Table:
    """Columns latent, images_a, images_b -> these with rate_a, rate_b, odds_ratio, effect, p and q, by effect.

    odds_ratio: with half an image added to each of the four counts, so that none is infinite (Haldane's correction).
    """
    from scipy import stats  # half a second, which other questions do without

    a, b = (counts[name].to_numpy().astype(np.float64) for name in ("images_a", "images_b"))
    rate_a, rate_b = a / n_a, b / n_b
    tables, place = np.unique(np.stack([a, b], 1), axis=0, return_inverse=True)  # rare latents share few
    p = np.array([_p(fired_a, fired_b, n_a, n_b) for fired_a, fired_b in tables])[place.ravel()]
    found = {
        "rate_a": rate_a,
        "rate_b": rate_b,
        "odds_ratio": (a + 0.5) * (n_b - b + 0.5) / ((b + 0.5) * (n_a - a + 0.5)),
        "effect": 2 * np.arcsin(np.sqrt(rate_a)) - 2 * np.arcsin(np.sqrt(rate_b)),
        "p": p,
        "q": stats.false_discovery_control(p) if len(p) else p,
    }
    for name, column in found.items():
        counts = counts.append_column(name, pa.array(column, pa.float64()))
    return counts.sort_by([("effect", "descending"), ("latent", "ascending")])


def _p(fired_a: float, fired_b: float, n_a: int, n_b: int) -> float:
    from scipy import stats

    table = np.array([[fired_a, n_a - fired_a], [fired_b, n_b - fired_b]])
    fired, n = fired_a + fired_b, n_a + n_b
    if fired == n:  # it fires everywhere: there is nothing to tell apart
        return 1.0
    if min(fired, n - fired) * min(n_a, n_b) / n < LEAST_EXPECTED:
        return float(stats.fisher_exact(table.astype(np.int64)).pvalue)
    return float(stats.chi2_contingency(table, correction=False).pvalue)

"""Does an SAE fit the embeddings that it is given? Counted while a run goes on, so that one that does not fit is told at once.

An image is poorly reconstructed where its fvu is at least 0.9: what the SAE makes of it explains less than a tenth of what sets
the image apart from the training mean. Where this holds of half of the images or more, their median is that high, and the SAE
was almost surely trained on something else: another model, another layer, embeddings that were normalised.

fvu is of all latents that fire by the SAE's own rule, however few of them are kept.

Left out: an SAE without a training mean (most foreign files) is measured from the origin, where the mean embedding alone
explains much: a poor fit may then stay below 0.9 and pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

POOR = 0.9
"""fvu from which an image counts as poorly reconstructed."""

ENOUGH = 256
"""Images after which a run may be stopped: the share of poor ones is then known to 3 percentage points (one standard error)."""

FEW = 16
"""Images below which nothing is concluded: a handful may be odd, and a run of one strange image is a run."""


class Fit(NamedTuple):
    """How many images were looked at, and how many of them are poorly reconstructed."""

    judged: int = 0
    poor: int = 0

    def plus(self, other: "Fit") -> "Fit":
        """Of both together."""
        return Fit(self.judged + other.judged, self.poor + other.poor)

    def is_poor(self, least: int = FEW) -> bool:
        """Whether the median fvu is at least `POOR`, of at least so many images."""
        return self.judged >= least and 2 * self.poor >= self.judged

    def words(self) -> str:
        """What was counted, for people."""
        return f"{self.poor:,} of {self.judged:,} images are reconstructed poorly (fvu at least {POOR:g})"


def judged(fvus: Iterable[float | None]) -> Fit:
    """Of the fvu of some images; refused images have none, and an embedding that is the training mean has NaN."""
    known = [fvu for fvu in fvus if fvu is not None and fvu == fvu]
    return Fit(len(known), sum(fvu >= POOR for fvu in known))

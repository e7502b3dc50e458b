"""Does an SAE fit the embeddings that it is given? Counted while a run goes on, so that a poor fit is told at once.

An image is poorly reconstructed if its fvu is at least 0.9: the reconstruction explains less than a tenth of what sets the
image apart from the training mean. If half of the images or more are poorly reconstructed, the SAE was almost surely trained on
something else: another model, another layer, embeddings that were normalised.

The fvu counts all latents that fire by the SAE's own rule, however few of them are kept.

Left out: an SAE without a training mean (most foreign files) is measured from the origin. The mean embedding by itself explains
much from there, so a poor fit may stay below 0.9 and pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

POOR = 0.9
"""fvu from which an image counts as poorly reconstructed."""

ENOUGH = 256
"""Images after which a run may be stopped: the share of poor ones is then known to 3 percentage points (one standard error)."""

FEW = 16
"""From fewer images nothing is concluded: a handful may be odd, and one strange image makes a run too."""


class Fit(NamedTuple):
    """How many images were looked at, and how many of them are poorly reconstructed."""

    judged: int = 0
    poor: int = 0

    def plus(self, other: "Fit") -> "Fit":
        """The counts of both together."""
        return Fit(self.judged + other.judged, self.poor + other.poor)

    def is_poor(self, least: int = FEW) -> bool:
        """Whether the median fvu of at least `least` images is at least `POOR`."""
        return self.judged >= least and 2 * self.poor >= self.judged

    def words(self) -> str:
        """The counts in a sentence."""
        return f"{self.poor:,} of {self.judged:,} images are reconstructed poorly (fvu at least {POOR:g})"


def judged(fvus: Iterable[float | None]) -> Fit:
    """Count the fvu of some images, but not None (a refused image) and NaN (an embedding that equals the training mean)."""
    known = [fvu for fvu in fvus if fvu is not None and fvu == fvu]
    return Fit(len(known), sum(fvu >= POOR for fvu in known))

"""How a head of removal is trained: what a command line says of it. No PyTorch."""

import dataclasses

HEAD_WIDTH = 32
"""Width of each attention head of the transformer."""

LARGEST = {"width": 2**14, "blocks": 64}
"""No head is larger, so that what a file claims allocates nothing that matters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head is trained."""

    steps: int = 4000
    """Steps of the optimiser. The rate falls to zero over them."""
    images_per_step: int = 64
    """Images of one step."""
    subsets: int = 16
    """Subsets of patches of each of these images, in pairs."""
    reuse: int = 5
    """Rounds over the images before other subsets are drawn: forwards without patches cost more than the head's steps."""
    rate: float = 1e-3
    """The largest rate of AdamW."""
    muon_rate: float = 0.015
    """The largest rate of Muon, which trains the matrices of the head's transformer."""
    ridge: float = 0.1
    """What is added to each variance before directions of the embedding are made equal, as a part of the mean variance."""
    width: int = 160
    """Width of the head's transformer."""
    blocks: int = 3
    """Its layers."""
    seed: int = 0
    """Of the weights, the order of the images and the subsets."""

    def check(self) -> None:
        """ValueError for impossible values."""
        for field in ("steps", "images_per_step", "subsets", "reuse", "width", "blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)}: must be at least 1")
        if self.subsets % 2:
            raise ValueError(f"subsets {self.subsets}: must be even, since each comes with the patches that it lacks")
        for field, most in LARGEST.items():
            if getattr(self, field) > most:
                raise ValueError(f"{field} {getattr(self, field)}: must be at most {most}")
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width {self.width}: must be a multiple of {HEAD_WIDTH}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed {self.seed}: must be from 0 to below 2 ** 31")
        for field in ("rate", "muon_rate", "ridge"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} {getattr(self, field):g}: must be above 0")

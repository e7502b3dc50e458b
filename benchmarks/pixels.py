"""Whether a model sees anything else if its images are resized fast (`saecore.images.preprocess`).

Pictures are JPEGs made of photographs (`benchmarks.material`), in equal parts of several sizes. Kept latents are compared as
sets: those of B/32 with random weights and a random TopK SAE, and those of the demo's models.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import maps
from benchmarks.machine import machine
from benchmarks.material import DEMO_K, Size, pictures
from jobs import commands
from saecore.images.decode import decode_image
from saecore.images.preprocess import Preprocess, Resize, can_be_fast
from saecore.pipeline.models import load_models
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower

BATCH = 32
"""Pictures at once."""


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Fast pixels beside exact ones: by how much they differ, and for how many images the same latents are kept."""

    images: int = 600
    """Images, in equal parts of each size."""
    sizes: tuple[str, ...] = ("500x375", "375x500", "1600x1200")
    """Their sizes."""
    k: int = 32
    """Latents kept on B/32."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, images=len(self.sizes), k=1)
        for size in self.sizes:
            Size.parse(size)
        if not can_be_fast():
            raise ValueError("cykooz.resizer is not installed, so nothing is resized fast here")

    def tell(self) -> None:
        """Measure and print."""
        rows = measure(self.images, [Size.parse(size) for size in self.sizes], self.k)
        if self.json:
            said = {"machine": machine(), "config": dataclasses.asdict(self)}
            print(json.dumps(said | {"rows": [row._asdict() for row in rows]}))
            return
        print(machine(), f"{self.images} images of {', '.join(self.sizes)}", "", sep="\n")
        print("| | pixels | differ by 1 | by more | at most | k | same kept latents |\n|---|---|---|---|---|---|---|")
        for row in rows:
            off = f"{row.by_one:.2%} | {row.by_more:.1e} | {row.at_most}"
            print(f"| {row.model} | {row.side} | {off} | {row.k} | {row.same:.2%} |")


class Row(NamedTuple):
    """One model."""

    model: str
    side: int
    """Pixels of its images along each edge."""
    by_one: float
    """The share of values that differ by one level of grey."""
    by_more: float
    """The share of those that differ by more."""
    at_most: int
    """The largest difference."""
    k: int
    same: float
    """The share of images for which the same latents are kept."""


def measure(images: int, sizes: Sequence[Size], k: int) -> list[Row]:
    """Rows of B/32 and of the demo."""
    taken = [data for size in sizes for data in pictures(size, images // len(sizes))]
    model, sae = maps.random_models(maps.SHAPES["B/32"], 6144, k, "cpu")
    tower = maps.tower_in("float32", model, maps.SHAPES["B/32"])
    return [compared("B/32", tower, sae, k, taken), compared("demo", *load_models("demo", "demo"), DEMO_K, taken)]


def compared(name: str, tower: ImageTower, sae: SAE, k: int, taken: Sequence[bytes]) -> Row:
    """What a model makes of the pictures in either way."""
    exact, fast = seen(taken, tower.preprocess, "exact"), seen(taken, tower.preprocess, "fast")
    difference = np.abs(exact.astype(np.int16) - fast)
    same = [one == other for one, other in zip(kept(tower, sae, exact, k), kept(tower, sae, fast, k), strict=True)]
    shares = float((difference == 1).mean()), float((difference > 1).mean())
    return Row(name, exact.shape[1], *shares, int(difference.max()), k, sum(same) / len(same))


def seen(taken: Sequence[bytes], preprocess: Preprocess, resize: Resize) -> np.ndarray:
    """The pixels of each picture, uint8 (n, height, width, 3)."""
    return np.stack([decode_image(data, preprocess, resize=resize).pixels for data in taken])


def kept(tower: ImageTower, sae: SAE, pixels: np.ndarray, k: int) -> list[frozenset[int]]:
    """The latents that are kept of each picture."""
    sets = []
    with torch.inference_mode():
        for start in range(0, len(pixels), BATCH):
            code = sae.encode_sparse(tower.embed(torch.from_numpy(pixels[start : start + BATCH])), at_least=k)
            sets += [frozenset(latents.tolist()) for latents in code.latents[:, :k]]
    return sets

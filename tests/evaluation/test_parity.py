"""Our curves beside those of torchcam and of Quantus: the same model, the same maps, the same patches taken out.

Both order pixels. Each map has one value for all pixels of a patch, and each step takes whole patches, so that their orders are
orders of patches too. Quantus is not among the packages for tests, since it brings a second OpenCV that writes over ours. Its
test runs after `pip install --no-deps quantus cachetools`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saecore.evaluation.faithfulness import Curves, curves, order_of
from saecore.removal import ways
from tests.helpers.towers import SHAPES, random_pixels, random_sae, random_tower

STEPS, PATCHES, SIDE, FILL = 4, 16, 8, 77
LATENTS = [3, 8, 40]


class Compared(NamedTuple):
    """Two images, three targets, maps of all six, and our curves."""

    model: nn.Module
    """Pictures (B, 3, height, width), float32 from 0 to 255 -> the targets' values (B, 3)."""
    pictures: Tensor
    maps: Tensor
    """(2, 3, height, width): equal within a patch."""
    ours: Curves


@pytest.fixture(scope="module")
def compared() -> Compared:
    _, tower = random_tower(**SHAPES[0])
    sae, pixels = random_sae(), random_pixels(tower, 2)
    relevance = torch.randn(2, len(LATENTS), PATCHES, generator=torch.Generator().manual_seed(4))

    class Model(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            return sae.pre_activations(tower.embed(pictures.permute(0, 2, 3, 1)))[:, LATENTS]

    def values(embeddings: Tensor) -> Tensor:
        return sae.pre_activations(embeddings.flatten(0, 1)).unflatten(0, embeddings.shape[:2])[..., LATENTS]

    remove = ways.filling(tower, pixels, torch.full_like(pixels, FILL), values)
    with torch.inference_mode():
        ours = curves(remove, order_of(relevance), steps=STEPS)
    of_patches = relevance.unflatten(-1, tower.grid)
    maps = of_patches.repeat_interleave(SIDE, -2).repeat_interleave(SIDE, -1)
    return Compared(Model().eval(), pixels.permute(0, 3, 1, 2).float().contiguous(), maps, ours)


class Extractor:
    """What torchcam's metric asks of a maker of maps: here it hands out the map that it was given."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model = model
        self.maps = maps

    def __call__(self, class_idx: Any = None, scores: Any = None, **options: Any) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        yield


def test_deletion_and_insertion_are_torchcams(compared: Compared) -> None:
    """Insertion adds the most important patches first: it is our LIF curve read from its end. So SRG is their difference."""
    metrics = pytest.importorskip(
        "torchcam.metrics", reason="no torchcam: pip install -e '.[test]', from Python 3.11 on"
    )
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watched(metrics.DeletionInsertionMetric):  # type: ignore[name-defined]
        def _compute_curves(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            seen.append(super()._compute_curves(*arguments))
            return seen[-1]

    ours = compared.ours
    for target in range(len(LATENTS)):
        extractor = Extractor(compared.model, compared.maps[:, target])
        metric = Watched(extractor, steps=STEPS, baseline=torch.tensor(float(FILL)))
        metric.update(compared.pictures, class_idx=target)
        gone, deletion, insertion = seen[-1]
        assert gone.tolist() == [0, 0.25, 0.5, 0.75, 1]
        torch.testing.assert_close(deletion, ours.mif[:, target], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(insertion, ours.lif[:, target].flip(-1), rtol=1e-4, atol=1e-4)
        told = metric.summary()
        assert told["deletion_auc"] == pytest.approx(
            float(torch.trapezoid(ours.mif[:, target], dx=1 / STEPS).mean()), abs=1e-4
        )
        srg = told["insertion_auc"] - told["deletion_auc"]
        assert srg == pytest.approx(float(ours.srg[:, target].mean()), abs=1e-4)
        assert abs(srg) > 0.01


@pytest.mark.filterwarnings("ignore")
def test_pixel_flipping_is_quantus(compared: Compared) -> None:
    """Its curve begins after the first step. It ranks the three channels of a pixel apart, and wants steps whose number of
    values divides that of the pixels: so three of its steps take what one of ours takes.
    """
    quantus = pytest.importorskip("quantus", reason="no quantus: pip install --no-deps quantus cachetools")
    metric = quantus.PixelFlipping(
        features_in_step=PATCHES // STEPS * SIDE**2,
        abs=False,
        normalise=False,
        perturb_baseline=float(FILL),
        disable_warnings=True,
    )
    for target in range(len(LATENTS)):
        for sign, expected in ((1, compared.ours.mif), (-1, compared.ours.lif)):
            found = metric(
                model=compared.model,
                x_batch=compared.pictures.numpy(),
                y_batch=np.full(2, target),
                a_batch=sign * compared.maps[:, target, None].numpy(),
                channel_first=True,
                softmax=False,
                device="cpu",
            )
            np.testing.assert_allclose(np.array(found)[:, 2::3], expected[:, target, 1:], rtol=1e-4, atol=1e-4)

"""The threshold of a BatchTopK SAE, by which an image's latents do not depend on the other images of its batch.

In training the k B largest pre-activations of a batch of B images fire. Afterwards all above one threshold fire:

    threshold = mean over batches of the smallest value that fires in the batch          arXiv:2412.06410, section 3.2

Left out: JumpReLU's thresholds, which training learns (`saecore.training.kernels`).

Shapes: B images, d embedding width.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saecore.sae.model import SAE

BATCH = 1024
"""Images of a batch."""


def calibrate(sae: SAE, x: Tensor, k: int) -> float:
    """Set a batchtopk SAE's threshold so that k latents fire on average over embeddings (B, d); returns the threshold."""
    if sae.threshold is None or sae.config.architecture != "batchtopk":
        raise ValueError(f"a {sae.config.architecture} SAE has no threshold to calibrate")
    if k < 1:
        raise ValueError("this BatchTopK SAE does not say its k, so its threshold cannot be calibrated")
    smallest = [_smallest_kept(sae, rows, k) for rows in _whole_batches(x)]
    sae.threshold.fill_(float(np.mean(smallest)))
    return float(sae.threshold)


def _whole_batches(x: Tensor) -> Iterator[Tensor]:
    """Batches of equal size, each with rows from everywhere. A small batch, or one of a single class, would weigh too much."""
    count = max(1, len(x) // BATCH)
    for first in range(count):
        yield x[first::count]


def _smallest_kept(sae: SAE, x: Tensor, k: int) -> float:
    """The smallest positive value among the k B largest."""
    with torch.inference_mode():
        p = sae.pre_activations(x)
        strength = (p.abs() if sae.config.by_magnitude else p).flatten()
        kept = strength.topk(k * len(x), sorted=False).values
        return float(kept[kept > 0].min()) if (kept > 0).any() else 0.0

"""Relevance maps as they are stored: 8 bits a patch and one scale per map. Only this module rounds or restores them.

    stored = round(relevance / scale)        scale = max |relevance| / 127        relevance ~ stored * scale

A stored value is at most half a scale away from what was computed, 0.4 % of the strongest patch. Sums and errors of
completeness are taken before this rounding. Maps are rounded on the device that computed them, so that a quarter of the bytes
leaves it; to restore them takes NumPy only, since questions and pages know no PyTorch.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 127
"""Steps from 0 to the strongest patch. -128 is never used."""


def encode(relevance: "Tensor") -> "tuple[Tensor, Tensor]":
    """Maps, float32 (..., P) -> int8 (..., P), and their scales, float32 (...). A map of zeros has scale 0."""
    scale = relevance.abs().amax(-1) / STEPS
    # Avoids a division by zero: where the scale is 0, all values are 0.
    divisor = scale.clamp(min=float(np.finfo(np.float32).tiny))[..., None]
    return (relevance / divisor).round().char(), scale


def decode(stored: bytes | np.ndarray, scale: float | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Stored maps in one buffer, and their scales -> float32 of `shape`, whose first axes are those of the scales."""
    scales = np.asarray(scale, np.float32)
    steps = np.frombuffer(stored, np.int8) if isinstance(stored, bytes) else stored
    maps = steps.reshape(shape).astype(np.float32)
    return maps * scales.reshape(scales.shape + (1,) * (maps.ndim - scales.ndim))

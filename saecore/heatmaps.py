"""Relevance maps as they are stored: 8 bits a patch and one scale per map. Only this module rounds or restores them.

    stored = round(relevance / scale)        scale = max |relevance| / 127        relevance ~ stored * scale

A stored value is at most half a scale away from what was computed, 0.4 % of the strongest patch. Sums and errors of
completeness are taken before this rounding. NumPy only, so that workers, questions and pages need no PyTorch.
"""

import numpy as np

STEPS = 127
"""Steps from 0 to the strongest patch. -128 is never used."""


def encode(relevance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps, float32 (..., P) -> int8 (..., P), and their scales, float32 (...). A map of zeros has scale 0."""
    scale = np.abs(relevance).max(-1) / np.float32(STEPS)
    # Avoids a division by zero: where the scale is 0, all values are 0.
    divisor = np.maximum(scale, np.finfo(np.float32).tiny)[..., None]
    return np.round(relevance / divisor).astype(np.int8), scale


def decode(stored: bytes | np.ndarray, scale: float | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Stored maps in one buffer, and their scales -> float32 of `shape`, whose first axes are those of the scales."""
    scales = np.asarray(scale, np.float32)
    steps = np.frombuffer(stored, np.int8) if isinstance(stored, bytes) else stored
    maps = steps.reshape(shape).astype(np.float32)
    return maps * scales.reshape(scales.shape + (1,) * (maps.ndim - scales.ndim))

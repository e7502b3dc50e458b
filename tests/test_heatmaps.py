"""A stored map is at most half a step off, its strongest patch is exact, and a map of zeros divides by nothing."""

import numpy as np
import torch

from saecore.heatmaps import STEPS, decode, encode


def test_a_map_comes_back_within_half_a_step_of_its_own() -> None:
    """Every map has its own scale, so maps of very different sizes lose nothing."""
    generator = np.random.default_rng(0)
    sizes = 10.0 ** generator.uniform(-30, 30, (3, 2, 5, 1))
    relevance = (generator.standard_normal((3, 2, 5, 49)) * sizes).astype(np.float32)
    stored, scale = (tensor.numpy() for tensor in encode(torch.from_numpy(relevance)))
    assert (stored.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (3, 2, 5))
    assert (np.abs(stored).max(-1) == STEPS).all()
    maps = decode(stored.tobytes(), scale, (3, 2, 5, 7, 7))
    error = np.abs(maps - relevance.reshape(maps.shape)).max((-2, -1))
    assert (error <= 0.5001 * scale).all()


def test_a_map_of_zeros_and_numbers_by_hand() -> None:
    stored, scale = encode(torch.tensor([[0.0, 0.0, 0.0], [-254.0, 3.0, 5.0]]))
    assert stored.tolist() == [[0, 0, 0], [-127, 2, 2]]  # 1.5 and 2.5 steps are rounded to the even number
    assert scale.tolist() == [0.0, 2.0]
    assert decode(bytes([129, 2, 2]), 2.0, (1, 3)).tolist() == [[-254.0, 4.0, 4.0]]

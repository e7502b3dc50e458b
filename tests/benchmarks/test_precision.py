"""benchmarks precision: what differs between two precisions is counted as it was planted."""

from typing import Any

import numpy as np

from benchmarks import rounding
from saecore.pipeline.inference import Inferred


def inferred(latents: list[list[int]], maps: list[list[int]], completeness: list[float]) -> Inferred:
    """Two images with k = 2 and maps of one patch; nothing reads the columns that are empty."""
    columns: dict[str, Any] = {
        "embedding": np.eye(2, dtype=np.float32),
        "latent": np.array(latents, np.int32),
        "map": np.array(maps, np.int8)[:, None, :, None],
        "scale": np.ones((2, 1, 2), np.float32),
        "completeness": np.array(completeness, np.float32),
    }
    return Inferred(**{name: columns.get(name, np.zeros((2, 0))) for name in Inferred._fields})


def test_what_was_planted_is_counted() -> None:
    """The first image keeps the same latents in another order, the second one of its two; its map is off by a half."""
    exact = inferred([[3, 5], [3, 5]], [[40, 80], [10, 20]], [1e-6, 3e-6])
    other = inferred([[5, 3], [5, 7]], [[80, 40], [30, 99]], [1e-3, 5e-3])
    found = rounding.compare(
        "planted", np.zeros((2, 1, 1, 3), np.uint8), {"float32": lambda _: exact, "bfloat16": lambda _: other}
    )
    assert (found.same_set, found.overlap, found.cosine, found.maps) == (0.5, 0.75, 1.0, (0.0, 0.5))
    np.testing.assert_allclose(found.completeness["float32"], (2e-6, 3e-6))
    np.testing.assert_allclose(found.completeness["bfloat16"], (3e-3, 5e-3))


def test_precisions_of_the_embedded_model_differ() -> None:
    found = rounding.of_demo(4)
    assert found.completeness["float32"][1] < 1e-5 < 1e-4 < found.completeness["bfloat16"][1] < 0.05
    assert 0.9995 < found.cosine < 1
    assert rounding.told([], [found]).count("\n") == 3

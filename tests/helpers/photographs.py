"""Real photographs: those that scikit-image and scikit-learn carry in their wheels."""

import numpy as np


def photographs() -> dict[str, np.ndarray]:
    """Name -> uint8 (height, width, 3)."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    pictures = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    return pictures | dict(zip(("china", "flower"), load_sample_images().images, strict=True))

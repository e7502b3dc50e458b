"""From a JPEG's bytes to the pixels that CLIP takes: this project's ways, and the plain way of Pillow to compare them with."""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from saecore.images.decode import decode_image
from saecore.images.preprocess import Preprocess, can_be_fast, default_resize
from saecore.pipeline.stages import Decode

EXACT, FAST, PILLOW = "decode and resize, exact", "decode and resize, fast", "the same in plain Pillow"

Pixels = Callable[[bytes], object]


def ways(preprocess: Preprocess) -> dict[str, Pixels]:
    """Every way that there is here, by name."""
    exact = functools.partial(decode_image, preprocess=preprocess)
    named: dict[str, Pixels] = {EXACT: exact}
    if can_be_fast():
        named[FAST] = functools.partial(exact, resize="fast")
    return named | {PILLOW: functools.partial(by_pillow, preprocess=preprocess)}


def name_of_default() -> str:
    """The name of the way that a new run takes here."""
    return FAST if can_be_fast() else EXACT


def step_of_default(preprocess: Preprocess, seconds: float = 0.0) -> Decode:
    """The job's step in that way, under a time limit for each image, or in this process if that is 0."""
    return Decode(preprocess, seconds=seconds, resize=default_resize())


def by_pillow(data: bytes, preprocess: Preprocess) -> np.ndarray:
    """As a short script does it: open, convert, resize the whole picture, cut out the centre."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert isinstance(preprocess.resize, int)
    scale = preprocess.resize / min(image.size)
    width, height = (max(preprocess.resize, int(edge * scale)) for edge in image.size)
    crop_height, crop_width = preprocess.size
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    resized = image.resize((width, height), Image.Resampling(preprocess.resample))
    return np.asarray(resized.crop((left, top, left + crop_width, top + crop_height)))

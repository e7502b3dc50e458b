"""Does a map stay when the picture changes a little? Changes that no viewer notices.

    shifted    the picture moves by a few pixels: far less than a patch, though every patch holds other pixels
    as_jpeg    the picture is written as JPEG, and read again

Whoever compares maps computes that of the changed picture for the targets of the original one. A shift moves a map by less than
a patch, which is not undone.

Shapes: B images; pixels are uint8 (B, height, width, 3).
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def shifted(pixels: Tensor, rows: int = 2, columns: int = 2) -> Tensor:
    """The pictures moved down by `rows` pixels and to the right by `columns`, or the other way where these are below zero.

    Pixels at the edge are repeated into the space that is left.
    """
    height, width = pixels.shape[1:3]
    down = (torch.arange(height, device=pixels.device) - rows).clamp(0, height - 1)
    across = (torch.arange(width, device=pixels.device) - columns).clamp(0, width - 1)
    return pixels[:, down[:, None], across]


def as_jpeg(pixels: Tensor, quality: int = 90) -> Tensor:
    """The pictures after JPEG of this quality, from 1 to 95, as Pillow writes it: colours at half the resolution."""
    made = []
    for picture in pixels.cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        made.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(made)).to(pixels.device)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {"shift": shifted, "jpeg": as_jpeg}
"""The changes that maps ought to withstand, as they are measured."""

"""Small changes of pictures."""

import io

import numpy as np
import torch
from PIL import Image

from saecore.evaluation.stability import CHANGES, as_jpeg, shifted
from tests.helpers.hostile import photograph


def picture() -> torch.Tensor:
    return torch.from_numpy(np.asarray(photograph()).copy())[None]


def test_a_shift_by_hand() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 4, 1).expand(-1, -1, -1, 3)
    assert shifted(pixels, 1, 2)[0, :, :, 0].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [4, 4, 4, 5]]
    assert shifted(pixels, -2, -1)[0, :, :, 2].tolist() == [[9, 10, 11, 11]] * 3
    assert torch.equal(shifted(pixels, 0, 0), pixels)
    assert torch.equal(CHANGES["shift"](picture())[:, 2:, 2:], picture()[:, :-2, :-2])


def test_jpeg_is_pillows_and_changes_little() -> None:
    pixels = torch.cat([picture(), picture().flip(1)])
    found = as_jpeg(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels[1].numpy()).save(file, "JPEG", quality=90)
    assert torch.equal(found[1], torch.from_numpy(np.array(Image.open(file))))
    assert found.dtype == torch.uint8
    away = [float((as_jpeg(pixels, quality).float() - pixels.float()).abs().mean()) for quality in (95, 90, 30)]
    assert 0 < away[0] < away[1] < away[2]
    assert away[1] < 8

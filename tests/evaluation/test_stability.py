"""Small changes of pictures, and maps whose steadiness is known."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from saecore.evaluation.stability import CHANGES, as_jpeg, shifted, steadiness
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


def test_a_map_of_what_is_seen_is_steady_and_one_of_noise_is_not() -> None:
    """One map is the light of each patch, which a shift by two pixels moves little; the other is the last bit of its corner."""
    pixels = picture()
    after = shifted(pixels)

    def maps(of: torch.Tensor) -> dict[str, torch.Tensor]:
        light = of.float().mean(-1).unfold(1, 16, 16).unfold(2, 16, 16)
        odd = (of[:, ::16, ::16, 1] * 37 % 64).float()
        flat = torch.zeros(1, 1, light.shape[1] * light.shape[2])
        return {"light": light.mean((-2, -1)).flatten(1)[:, None], "bits": odd.flatten(1)[:, None], "flat": flat}

    found = steadiness(maps(pixels), maps(after))
    assert {name: tuple(one.shape) for name, one in found.items()} == dict.fromkeys(("light", "bits", "flat"), (1, 1))
    assert found["light"].item() > 0.9
    assert found["bits"].item() < 0.5
    assert found["flat"].isnan().all()
    one, other = (maps(of)["bits"][0, 0].numpy() for of in (pixels, after))
    assert found["bits"].item() == pytest.approx(spearmanr(one, other).statistic, abs=1e-5)

"""What `steps`, `job` and `peers` work on: JPEGs made of photographs, and models of the true shapes as folders.

A picture is made of tiles of at most 500 x 500 pixels. Each tile is a random part of a random photograph, mirrored at random
and enlarged by at most about two. So every picture is another one, and a large picture has as much detail in each pixel as a
small one, as one that is enlarged as a whole would not have. At quality 85 they take 0.16 to 0.19 bytes a pixel.

Models have random weights, since cost does not depend on weights. They are written as transformers and this project write
theirs, so that jobs and other programs load them as they load any other. The text tower is a tiny one, and is there since some
programs load whole CLIPs only.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from saecore.hub import model_folder

TILE = 500
"""The longest edge of a tile, in pixels. The photographs are 300 to 640 pixels high."""

QUALITY = 85
"""Of the JPEGs."""

DEMO_K = 12
"""Latents that the embedded SAE lets fire."""

TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""A text tower that no benchmark runs."""


class Size(NamedTuple):
    """Of a picture, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """From a text as 500x375; ValueError for another."""
        width, _, height = text.partition("x")
        if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
            raise ValueError(f"{text}: must be a width and a height in pixels, as 500x375")
        size = cls(int(width), int(height))
        if not 16 <= min(size) <= max(size) <= 10_000:
            raise ValueError(f"{text}: each edge must be from 16 to 10000 pixels")
        return size


class Models(NamedTuple):
    """A CLIP and an SAE that fit each other."""

    clip: str
    """Its address, as `sae` is the SAE's."""
    sae: str
    k: int
    """Latents that are kept of each image."""

    def folder(self) -> str:
        """The folder of the CLIP, for programs that know no address `demo`."""
        return str(model_folder(self.clip).absolute())


def photographs() -> list[np.ndarray]:
    """Six photographs, uint8 (height, width, 3); ValueError where the packages that carry them are not installed."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed, and the JPEGs are made of photographs that scikit-image and scikit-learn "
            "carry: pip install scikit-image scikit-learn"
        ) from error
    return [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")] + [
        *load_sample_images().images
    ]


def pictures(size: Size, n: int, first: int = 0) -> Iterator[bytes]:
    """JPEGs with the numbers `first`, `first` + 1, ..; each number always gives the same picture."""
    taken = photographs()
    for number in range(first, first + n):
        sink = io.BytesIO()
        _picture(taken, size, number).save(sink, "JPEG", quality=QUALITY)
        yield sink.getvalue()


def _picture(taken: list[np.ndarray], size: Size, number: int) -> Image.Image:
    """Tiles of photographs, as the head of this file says."""
    random = np.random.default_rng((number, *size))
    columns, rows = -(-size.width // TILE), -(-size.height // TILE)
    made = Image.new("RGB", size)
    for column in range(columns):
        for row in range(rows):
            left, top = size.width * column // columns, size.height * row // rows
            right, bottom = size.width * (column + 1) // columns, size.height * (row + 1) // rows
            made.paste(_tile(taken, random, right - left, bottom - top), (left, top))
    return made


def _tile(taken: list[np.ndarray], random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random part of a random photograph, of this shape."""
    photograph = Image.fromarray(taken[random.integers(len(taken))])
    smaller = min(1.0, photograph.width / width, photograph.height / height) * random.uniform(0.7, 1.0)
    part = int(width * smaller), int(height * smaller)
    left, top = random.integers(photograph.width - part[0] + 1), random.integers(photograph.height - part[1] + 1)
    box = (int(left), int(top), int(left) + part[0], int(top) + part[1])
    tile = photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else tile


def write_models(folder: Path, shape: str, latents: int, k: int) -> Models:
    """A CLIP of one of `benchmarks.maps.SHAPES` and an SAE with random weights, in `folder`; of `demo`, the embedded ones."""
    if shape == "demo":
        return Models("demo", "demo", min(k, DEMO_K))
    import torch
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    from benchmarks import maps

    logging.disable_progress_bar()
    model, sae = maps.random_models(maps.SHAPES[shape], latents, k, "cpu")
    vision = model.config.to_dict()
    whole: Any = CLIPModel(
        CLIPConfig(text_config=TINY_TEXT, vision_config=vision, projection_dim=maps.SHAPES[shape].outputs)
    )
    whole.load_state_dict(model.state_dict(), strict=False)  # the text tower stays as it is
    models = Models(str(folder / "clip"), str(folder / "sae"), k)
    whole.save_pretrained(models.clip)
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(_processor(maps.SHAPES[shape].image_size)))
    assert sae.decoder is not None
    torch.nn.init.normal_(sae.decoder)  # one of zeros is refused
    sae.save(models.sae)
    return models


def _processor(side: int) -> dict[str, Any]:
    """What the image processor of a CLIP is told."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "do_convert_rgb": True,
    }

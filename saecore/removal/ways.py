"""Pictures without some of their patches, and what is left of the targets: the experiment by which maps are judged.

    drop    the patches' tokens are taken out of the sequence; the others keep their positions. Nothing is put in their place
    mean    their pixels become the mean colour that the image processor subtracts, which is zero for the tower
    blur    their pixels come from the blurred picture

Dropping is the primary way: it puts nothing into the picture that the tower could see, and a shorter sequence costs less than a
forward. Targets are computed anew, with all their normalisers (`saecore.relevance.targets.Targets.values`).

Where an SAE reads the tokens of a layer (`saecore.towers.tokens`), the targets also need to know which tokens are left.

Shapes: B images, R sets of patches for each image, m patches in each set, n targets, P patches.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower

Removal = Callable[[Tensor], Tensor]
"""The numbers of the patches that stay, int64 (B, R, m) -> the targets' values, float32 (B, R, n)."""

Values = Callable[..., Tensor]
"""Embeddings (B, R, E) -> the targets' values (B, R, n). Of a `TokenTower`: streams (B, R, M, D) of the tokens that are left,
and their numbers, int64 (B, R, M)."""

ROWS, ROWS_ON_CPU = 256, 16
"""Token sequences in one forward. They bound its memory, and do not change its results. On a CPU they should fit the caches:
occlusion cost 70 forwards on B/32 and 89 on B/16 with 256, 47 and 53 with 16."""

BLUR = 0.1
"""The deviation of the blur, as a part of the picture's side: objects are gone, and the light of the scene stays."""

WAYS = ("drop", "mean", "blur")


def removal(way: str, tower: ImageTower, pixels: Tensor, values: Values) -> Removal:
    """One of `WAYS`, for pixels uint8 (B, height, width, 3); ValueError for another word."""
    if way == "drop":
        return dropping(tower, pixels, values)
    if way == "mean":
        mean = (tower.mean / tower.rescale).round().clamp(0, 255).to(torch.uint8)
        return filling(tower, pixels, mean.expand_as(pixels), values)
    if way == "blur":
        return filling(tower, pixels, blurred(pixels), values)
    raise ValueError(f"way {way!r}: must be one of {', '.join(WAYS)}")


def dropping(tower: ImageTower, pixels: Tensor, values: Values) -> Removal:
    """Tokens are taken out. A tower without a token of its own needs one patch at least: ValueError if none stays."""
    first = tower.first_tokens(pixels)

    def left(kept: Tensor) -> Tensor:
        B, R, m = kept.shape
        if not m and not tower.n_own:
            raise ValueError("this model has no token but its patches, so one at least must stay")
        own = torch.arange(tower.n_own, device=kept.device).expand(B, R, -1)
        tokens = torch.cat([own, kept + tower.n_own], -1).flatten(0, 1)  # B R, M
        image = torch.arange(B, device=kept.device).repeat_interleave(R)
        made = _in_parts(tokens, lambda part, rows: tower.embed_tokens(first[image[rows, None], part]), (B, R))
        return values(made, tokens.view(B, R, -1)) if isinstance(tower, TokenTower) else values(made)

    return left


def filling(tower: ImageTower, pixels: Tensor, fill: Tensor, values: Values) -> Removal:
    """The pixels of patches are those of `fill`. Pixels that belong to no patch stay."""
    B, height, width, _ = pixels.shape
    of_pixel = _patch_of_pixel(tower, height, width).to(pixels.device)
    n_patches = tower.grid[0] * tower.grid[1]

    def left(kept: Tensor) -> Tensor:
        R = kept.shape[1]
        stays = torch.zeros(B, R, n_patches + 1, dtype=torch.bool, device=pixels.device)
        stays[..., n_patches] = True  # stands for pixels that are in no patch
        stays = stays.scatter(2, kept, True).flatten(0, 1)
        image = torch.arange(B, device=pixels.device).repeat_interleave(R)

        def embed(part: Tensor, rows: Tensor) -> Tensor:
            shown = part[:, of_pixel][..., None]
            return whole(torch.where(shown, pixels[image[rows]], fill[image[rows]]))

        made = _in_parts(stays, embed, (B, R))
        if not isinstance(tower, TokenTower):
            return values(made)
        return values(made, torch.arange(made.shape[2], device=made.device).expand(B, R, -1))

    def whole(shown: Tensor) -> Tensor:
        # A token tower's `embed` leaves out tokens that its site does not read.
        return tower.embed_tokens(tower.first_tokens(shown)) if isinstance(tower, TokenTower) else tower.embed(shown)

    return left


def blurred(pixels: Tensor) -> Tensor:
    """uint8 (B, height, width, 3), blurred by a Gaussian."""
    side = max(pixels.shape[1:3])
    made = [cv2.GaussianBlur(picture, (0, 0), BLUR * side) for picture in pixels.cpu().numpy()]
    return torch.from_numpy(np.stack(made)).to(pixels.device)


def _in_parts(rows: Tensor, embed: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int]) -> Tensor:
    """Embeddings (B, R, E) of B R rows, so many at once as suit the device."""
    at_once = ROWS_ON_CPU if rows.device.type == "cpu" else ROWS
    numbers = torch.arange(len(rows), device=rows.device)
    parts = [embed(part, own) for part, own in zip(rows.split(at_once), numbers.split(at_once), strict=True)]
    return torch.cat(parts).unflatten(0, shape)


def _patch_of_pixel(tower: ImageTower, height: int, width: int) -> Tensor:
    """int64 (height, width): the patch of each pixel, or P for those that are in none."""
    size = tower.vision.config.patch_size
    rows, columns = tower.grid
    row, column = torch.arange(height) // size, torch.arange(width) // size
    patch = row[:, None] * columns + column
    return patch.masked_fill((row[:, None] >= rows) | (column >= columns), rows * columns)

"""Scenes drawn at any size: the picture, and the true mask of every object.

Each object is drawn as a layer, at twice the size and averaged: its cover c of every pixel, from 0 to 1, and how much t of its
darker second tone a pixel has. From the lowest layer up, image <- image + c (paint - image).

Left out: what is in a scene (`saecore.demo.scenes`), and files (`saecore.demo.writing`).
"""

import io
import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from saecore.demo.outlines import outline, reach
from saecore.demo.scenes import Scene, Thing

DARKER = 0.55  # the second tone of a texture: the same hue, so that a texture never makes another colour


class Drawing(NamedTuple):
    """A scene, drawn."""

    image: NDArray[np.uint8]
    """[size, size, 3], RGB."""
    caption: str
    attributes: dict[str, Any]
    masks: NDArray[np.bool_]
    """[objects, size, size]: the pixels that show more of this object than of everything else."""


def _ground(scene: Scene, size: int) -> NDArray[np.float32]:
    """The background [size, size, 3]: a gradient, soft clouds that are the same at every size, and grain of one pixel."""
    rng = np.random.default_rng((scene.seed, scene.index, 1))
    line = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = 0.5 + line[None, :] * math.cos(scene.gradient) + line[:, None] * math.sin(scene.gradient)
    clouds = cv2.resize(rng.standard_normal((6, 6), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    noise = scene.grain * (clouds + 0.7 * rng.standard_normal((size, size), dtype=np.float32))
    one, two = (np.array(tone, np.float32) for tone in scene.tones)
    return one + (two - one) * ramp[:, :, None] + noise[:, :, None]


class _Layer(NamedTuple):
    """One object over the part of the image that it touches."""

    box: tuple[slice, slice]
    """Rows and columns of the image that the object touches."""
    cover: NDArray[np.float32]
    """The object's share of each pixel in the box."""
    tone: NDArray[np.float32]
    """How much of the second tone each pixel has."""


def _layer(thing: Thing, size: int) -> _Layer:
    """One object, drawn at twice the size and averaged."""
    span = reach(thing.shape) * thing.radius
    left, top = (max(0, math.floor((c - span) * size) - 1) for c in thing.centre)
    right, bottom = (min(size, math.ceil((c + span) * size) + 1) for c in thing.centre)
    width, height = right - left, bottom - top
    cos, sin = math.cos(thing.rotation), math.sin(thing.rotation)
    turn = np.array([(cos, sin), (-sin, cos)]) * thing.radius
    origin = np.array([left, top])
    # OpenCV puts a pixel's centre on the whole number; shift=4 means sixteenths.
    points = [
        np.round(((c @ turn + thing.centre) * size - origin) * 32 - 8).astype(np.int32) for c in outline(thing.shape)
    ]
    canvas = np.zeros((2 * height, 2 * width), np.uint8)
    cv2.fillPoly(canvas, points, 255, cv2.LINE_AA, 4)
    cover = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    if thing.texture == "solid":
        return _Layer((slice(top, bottom), slice(left, right)), cover, np.zeros_like(cover))
    x = ((np.arange(2 * width, dtype=np.float32) + 0.5) / 2 + left) / size - thing.centre[0]
    y = ((np.arange(2 * height, dtype=np.float32) + 0.5) / 2 + top) / size - thing.centre[1]
    u = (x[None, :] * cos + y[:, None] * sin) / thing.radius
    v = (y[:, None] * cos - x[None, :] * sin) / thing.radius
    if thing.texture == "striped":
        second = (u + v) * (0.7071 / 0.6) % 1 < 0.5
    elif thing.texture == "dotted":
        second = (u / 0.64 % 1 - 0.5) ** 2 + (v / 0.64 % 1 - 0.5) ** 2 < 0.31**2
    else:
        second = (u / 0.9 % 1 < 0.5) ^ (v / 0.9 % 1 < 0.5)
    tone = cv2.resize(second.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return _Layer((slice(top, bottom), slice(left, right)), cover, tone)


def render(scene: Scene, size: int) -> NDArray[np.uint8]:
    """The picture [size, size, 3], RGB."""
    image = _ground(scene, size)
    for thing in sorted(scene.things, key=lambda t: t.layer):
        box, cover, tone = _layer(thing, size)
        paint = (1 - (1 - DARKER) * tone)[:, :, None] * np.array(thing.rgb, np.float32)
        image[box] += cover[:, :, None] * (paint - image[box])
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def visible(scene: Scene, size: int) -> NDArray[np.bool_]:
    """The true masks [objects, size, size]: pixels of which this object shows at least half."""
    free = np.ones((size, size), np.float32)
    masks = np.zeros((len(scene.things), size, size), np.bool_)
    for i in sorted(range(len(scene.things)), key=lambda i: -scene.things[i].layer):
        box, cover, _ = _layer(scene.things[i], size)
        masks[i][box] = cover * free[box] >= 0.5
        free[box] *= 1 - cover
    return masks


def draw(scene: Scene, size: int) -> Drawing:
    """Picture and truth together."""
    return Drawing(render(scene, size), scene.caption, scene.attributes, visible(scene, size))


def jpeg(scene: Scene, size: int) -> bytes:
    """The picture as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(render(scene, size)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()

"""A drawn world whose truth is known: small scenes of coloured shapes, and their captions.

A scene is a vector description that follows from its seed and index only, so two integers are enough to describe it, draw it
at any size, mask its objects and write it again, whatever else is drawn before or after it.

    scene = scene_at(SEED_DEMO, 7)
    image, caption, attributes, masks = draw(scene, size=192)      # saecore.demo.drawing

Objects are listed largest first, in captions, attributes and masks alike. Within one scene no two objects share a colour
or a shape, and the first object's drawn area is the largest by a quarter or more, so that "the colour of the largest object"
has one answer.

Left out: perspective, shadows, text, and anything that needs more than 64 pixels to be seen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saecore.demo.outlines import SHAPES, reach

# Disjoint worlds: scene i of one seed has nothing to do with scene i of another.
SEED_CLIP, SEED_SAE, SEED_EVALUATION, SEED_DEMO = 101, 102, 103, 104

COLOURS = {
    "red": (218, 34, 40),
    "orange": (246, 134, 22),
    "yellow": (252, 222, 46),
    "green": (38, 158, 62),
    "cyan": (44, 206, 214),
    "blue": (38, 82, 222),
    "purple": (128, 48, 172),
    "pink": (252, 132, 196),
}
TEXTURES = ("solid", "striped", "dotted", "checkered")
# Radius of the disc of equal area, in image sides. The smallest is two patches of an 8 x 8 grid wide, and the ratio of areas
# between two neighbouring words is at least (0.165 / 0.135)^2 = 1.49.
SIZES = {"small": (0.120, 0.135), "medium": (0.165, 0.185), "large": (0.226, 0.255)}
BACKGROUNDS = {
    "night": (44, 48, 66),
    "slate": (92, 106, 122),
    "stone": (140, 138, 134),
    "sand": (204, 190, 162),
    "snow": (232, 234, 236),
    "moss": (112, 124, 100),
    "clay": (158, 126, 114),
    "dusk": (130, 118, 146),
}
MAX_TILT = math.radians(20)  # a square stays a square, and a cross never becomes an x
NEAREST = 0.93  # centres keep this share of the sum of radii, so that little is hidden
COUNTS = (0.40, 0.25, 0.20, 0.15)  # how often a scene has 1, 2, 3, 4 objects


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    colour: str
    texture: str
    size: str
    rgb: tuple[float, float, float]
    """Its first tone: the colour's value with a little jitter, 0 to 255."""
    centre: tuple[float, float]
    """x, y in image sides, from the upper left."""
    radius: float
    """Of the disc with the same area, in image sides."""
    rotation: float
    """Radians, clockwise."""
    layer: int
    """Drawing order: a higher layer covers a lower one."""


@dataclass(frozen=True)
class Scene:
    """What to draw; `seed` and `index` also fix the background's noise."""

    seed: int
    index: int
    things: tuple[Thing, ...]
    """Largest first."""
    background: str
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    """The background's two ends, 0 to 255."""
    gradient: float
    """Direction of the background's gradient, radians."""
    grain: float
    """Standard deviation of the background's noise, 0 to 255."""

    @property
    def caption(self) -> str:
        """Such as 'a large red striped star and a small blue solid ring on a sand background'."""
        phrases = [f"a {t.size} {t.colour} {t.texture} {t.shape}" for t in self.things]
        listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
        return f"{listed} on a {self.background} background"

    @property
    def attributes(self) -> dict[str, Any]:
        """The truth about the scene, ready for JSON."""
        return {
            "background": self.background,
            "objects": [
                {
                    "shape": t.shape,
                    "colour": t.colour,
                    "texture": t.texture,
                    "size": t.size,
                    "centre": [round(t.centre[0], 4), round(t.centre[1], 4)],
                    "radius": round(t.radius, 4),
                    "rotation": round(t.rotation, 4),
                    "layer": t.layer,
                }
                for t in self.things
            ],
        }


def scene_at(seed: int, index: int) -> Scene:
    """The scene that (seed, index) stands for."""
    rng = np.random.default_rng((seed, index))
    count = 1 + int(np.searchsorted(np.cumsum(COUNTS[:-1]), rng.random(), side="right"))
    sizes = list(SIZES)
    largest = int(rng.integers(3)) if count == 1 else int(rng.integers(1, 3))
    colours, shapes = rng.permutation(list(COLOURS)), rng.permutation(SHAPES)
    layers = rng.permutation(count)
    things: list[Thing] = []
    for i in range(count):
        size = sizes[largest if i == 0 else int(rng.integers(largest))]
        radius = float(rng.uniform(*SIZES[size]))
        shape, colour = str(shapes[i]), str(colours[i])
        rim = min(0.5, reach(shape) * radius)
        for _ in range(20):
            x, y = rng.uniform(rim, 1 - rim, 2).tolist()
            if all(math.dist((x, y), t.centre) >= NEAREST * (radius + t.radius) for t in things):
                break
        else:
            continue  # no room: the scene has an object fewer
        red, green, blue = (np.array(COLOURS[colour]) + rng.uniform(-10, 10, 3)).clip(0, 255).tolist()
        texture = TEXTURES[int(rng.integers(len(TEXTURES)))]
        rotation = float(rng.uniform(-MAX_TILT, MAX_TILT))
        things.append(Thing(shape, colour, texture, size, (red, green, blue), (x, y), radius, rotation, int(layers[i])))
    things.sort(key=lambda t: -t.radius)
    background = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    base = np.array(BACKGROUNDS[background]) + rng.uniform(-10, 10, 3)
    slope = rng.uniform(0.04, 0.16)
    one, two = ((base * (1 + sign * slope)).clip(0, 250).tolist() for sign in (-1, 1))
    gradient, grain = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(1.5, 6.0))
    return Scene(seed, index, tuple(things), background, (tuple(one), tuple(two)), gradient, grain)


def scenes_of(seed: int, count: int, start: int = 0) -> Iterator[Scene]:
    """The scenes of one seed from index `start` on."""
    return (scene_at(seed, index) for index in range(start, start + count))


def record(scene: Scene) -> dict[str, Any]:
    """What is written together with an image: enough to draw the scene again."""
    return {"caption": scene.caption, "seed": scene.seed, "index": scene.index, "attributes": scene.attributes}

"""A drawn world whose truth is known: small scenes of coloured shapes, their captions, and the true mask of every object.

A scene is a vector description, fixed by (seed, index) alone, so it can be described, drawn at any size, masked and written
again from two integers, whatever else is drawn before or after it.

    scene = scene_at(SEED_DEMO, 7)
    image, caption, attributes, masks = draw(scene, size=192)

Objects are listed largest first, in captions, attributes and masks alike. Within one scene no two objects share a colour
or a shape, and the first object's drawn area is clearly the largest (by a quarter or more), so that "the colour of the largest
object" has one answer. Leaves out: perspective, shadows, text, anything that needs more than 64 pixels to be seen.
"""

import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
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
DARKER = 0.55  # the second tone of a texture: the same hue, so that a texture never makes another colour
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


class Drawing(NamedTuple):
    image: NDArray[np.uint8]
    """[size, size, 3], RGB."""
    caption: str
    attributes: dict[str, Any]
    masks: NDArray[np.bool_]
    """[objects, size, size]: the pixels that show more of this object than of everything else."""


@cache
def outline(shape: str) -> tuple[NDArray[np.float64], ...]:
    """Closed contours [points, xy] with the unit disc's area, y downwards; a second one is a hole."""

    def arc(start: float, stop: float, radius: float = 1.0, x: float = 0.0, points: int = 48) -> NDArray[np.float64]:
        angle = np.linspace(start, stop, points)
        return np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def spokes(*lengths: float) -> NDArray[np.float64]:
        angle = np.arange(len(lengths)) * 2 * np.pi / len(lengths) - np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array(lengths)[:, None]

    contours: list[NDArray[np.float64]]
    match shape:
        case "circle":
            contours = [arc(0, 2 * np.pi)]
        case "square":
            contours = [np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])]
        case "triangle":
            contours = [spokes(1, 1, 1)]
        case "star":
            contours = [spokes(*(1, 0.46) * 5)]
        case "cross":
            a = 0.34
            quarter = [(-a, -1.0), (a, -1.0), (a, -a), (1.0, -a), (1.0, a), (a, a)]
            contours = [np.array(quarter + [(-x, -y) for x, y in quarter])]
        case "ring":
            contours = [arc(0, 2 * np.pi), arc(0, 2 * np.pi, 0.55)]
        case "heart":
            t = np.linspace(0, 2 * np.pi, 64)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            contours = [np.stack([16 * np.sin(t) ** 3, -y], axis=1)]
        case "crescent":
            # The unit disc less a disc of radius 0.85 at x = 0.5; the circles meet at x = (1 + 0.5^2 - 0.85^2) / (2 * 0.5).
            tip = 1 + 0.5**2 - 0.85**2
            outer, inner = math.acos(tip), math.atan2(math.sqrt(1 - tip**2), tip - 0.5)
            contours = [np.concatenate([arc(outer, 2 * np.pi - outer), arc(2 * np.pi - inner, inner, 0.85, 0.5)])]
        case _:
            raise ValueError(f"no such shape: {shape!r}")
    corners = np.concatenate(contours)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    areas = [abs(np.dot(c[:, 0], np.roll(c[:, 1], 1)) - np.dot(c[:, 1], np.roll(c[:, 0], 1))) / 2 for c in contours]
    scale = math.sqrt(math.pi / (areas[0] - sum(areas[1:])))
    return tuple((c - middle) * scale for c in contours)


@cache
def reach(shape: str) -> float:
    """The farthest point of an outline from its centre, in radii."""
    return float(max(np.hypot(c[:, 0], c[:, 1]).max() for c in outline(shape)))


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


def scenes(seed: int, count: int, start: int = 0) -> Iterator[Scene]:
    return (scene_at(seed, index) for index in range(start, start + count))


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
    return Drawing(render(scene, size), scene.caption, scene.attributes, visible(scene, size))


def jpeg(scene: Scene, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene, size)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def record(scene: Scene) -> dict[str, Any]:
    """What is written beside an image: enough to draw it again."""
    return {"caption": scene.caption, "seed": scene.seed, "index": scene.index, "attributes": scene.attributes}


def write_shards(folder: Path | str, scenes: int, shards: int, seed: int = SEED_DEMO, size: int = 192) -> list[Path]:
    """webdataset: `shard-000.tar` and on, of nearly equal length; `000000.jpg` and `000000.json` are scene 0 of `seed`.

    The same arguments give the same bytes: no time, owner or umask gets in.
    """
    if not 1 <= shards <= scenes:
        raise ValueError(f"{scenes} scenes cannot fill {shards} shards")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        paths.append(Path(folder) / f"shard-{shard:03d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * scenes // shards, (shard + 1) * scenes // shards):
                scene = scene_at(seed, index)
                for suffix, data in (("jpg", jpeg(scene, size)), ("json", json.dumps(record(scene)).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def write_folder(folder: Path | str, scenes: int, seed: int = SEED_DEMO, size: int = 192) -> Path:
    """`000000.jpg` and on, with `metadata.jsonl` (a record a line, `file_name` first, as Hugging Face's imagefolder has it)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for index in range(scenes):
            scene = scene_at(seed, index)
            (Path(folder) / f"{index:06d}.jpg").write_bytes(jpeg(scene, size))
            lines.write(json.dumps({"file_name": f"{index:06d}.jpg"} | record(scene)) + "\n")
    return Path(folder)


def write_parquet(path: Path | str, scenes: int, seed: int = SEED_DEMO, size: int = 192) -> Path:
    """One file with `image` (struct of bytes and path, as Hugging Face has it), caption, seed, index, attributes (JSON)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for index in range(scenes):
        scene = scene_at(seed, index)
        image = {"bytes": jpeg(scene, size), "path": f"{index:06d}.jpg"}
        rows.append({"image": image} | record(scene) | {"attributes": json.dumps(scene.attributes)})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    return Path(path)

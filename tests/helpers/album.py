"""A small real run to make pages of: drawn scenes by the embedded models, two methods, a text, names that would break bad HTML,
an image that is refused and one that is wider than high."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
from PIL import Image

from jobs import explain
from saecore.demo import drawing, scenes
from saecore.runs import latents

HOSTILE = "<script>alert(1)</script>.jpg"
WIDE = "wide & \"high\" 'n' low.png"
BROKEN = "broken.jpg"
TEXT = "a <b>red</b> square"
HOSTILE_NAME = "<img src=x onerror=alert(2)>"
OFTEN = 53
METHODS = ["contrib", "chefer"]
N_SCENES = 22
N_IMAGES = N_SCENES + 3
"""In order: the scenes, then these three."""


def write(folder: Path) -> Path:
    """The run, and `input.tar` next to it."""
    wide = io.BytesIO()
    picture = Image.fromarray(drawing.render(scenes.scene_at(7, 1), 200))
    picture.resize((320, 200)).save(wide, "PNG")
    members = {f"{index:06d}.jpg": drawing.jpeg(scenes.scene_at(7, index), 192) for index in range(N_SCENES)}
    members |= {HOSTILE: members["000003.jpg"], WIDE: wide.getvalue(), BROKEN: b"no image"}
    with tarfile.open(folder / "input.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    run = folder / "album"
    given = ["--images", str(folder / "input.tar"), "--clip", "demo", "--sae", "demo", "--out", str(run)]
    how = ["--method", ",".join(METHODS), "--targets", "kept", f"text:{TEXT}", "--chunk-size", "10", "--local"]
    assert explain.main([*given, *how]) == 0
    return run


def name(run: Path) -> None:
    """Names for all latents but the first: word 1, word 2 and on; of one that fires often, what would run a script."""
    numbers = range(1, 80)
    names = [HOSTILE_NAME if number == OFTEN else f"word {number}" for number in numbers]
    columns = {
        "latent": pa.array(numbers, pa.int32()),
        "name": names,
        "score": pa.array([0.5] * 79, pa.float32()),
        "margin": pa.array([0.25] * 79, pa.float32()),
        "valid": [number % 2 == 0 for number in numbers],
        "words": [[word, f"runner-up {number}"] for number, word in zip(numbers, names, strict=True)],
        "scores": pa.array([[0.5, 0.25]] * 79, pa.list_(pa.float32())),
    }
    latents.merge(str(run), pa.table(columns))

"""What bfloat16 costs and saves on a CPU: images a second, and which latents and maps it changes.

Speed, on a tower of B/32's shape with random weights, an SAE with 6,144 latents, and maps of 32 latents by `contrib`:

    script      the ordinary script: transformers' forward and the SAE, float32, batches of 64, embeddings and latents only
    with maps   `saecore.pipeline.inference.Inference`, all that a run computes of pixels, in either precision
    + images    the same with what comes before it: Pillow and transformers' processor, and for ours the decoder of a new run

One thread is timed by its CPU time, which does not count other programs' work, several threads by the clock. The median of
rounds in turn counts. Agreement, of the embedded model on drawn scenes and of B/32 on parts of photographs, image by image:

    same set         share of images whose kept latents are the same, in any order
    overlap          mean share of an image's kept latents that are kept in the other precision too
    completeness     the error of a run, see `saecore.relevance.maps.completeness_error`: median and worst image
    maps             of latents kept in both, as they are stored: largest difference by the map's largest value, median and
                     worst map; 8 bits by themselves make up to 0.8 %

Random weights are harder than a trained model: their embeddings differ little from image to image, and so do the values among
which the SAE chooses.

Left out: a trained CLIP of that size, since none can be had without the Hub; what a job does besides, as writing.
"""

import copy
import functools
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from benchmarks.maps import SHAPES, random_models, time_in_turn, tower_in
from benchmarks.material import photographs
from saecore.demo.drawing import render
from saecore.demo.scenes import SEED_EVALUATION, scenes_of
from saecore.images.decode import decode_image
from saecore.images.preprocess import default_resize
from saecore.pipeline.inference import Inference, Inferred
from saecore.pipeline.models import load_models

DTYPES = ("float32", "bfloat16")
SCRIPT_BATCH = 64
K, LATENTS = 32, 6144
FIRST_SCENE = 400_000
JPEGS, WIDTH, HEIGHT = 16, 500, 375
"""How many JPEGs stand for the images, and their pixels."""


class Speed(NamedTuple):
    """One row of the table of speed."""

    way: str
    batch: int
    per_second: float
    """Images a second, from pixels."""
    with_images: float
    """Images a second, from JPEGs."""
    times_script: float
    """Median over the rounds of the script's time by this one's, from pixels."""
    times_script_with_images: float
    """The same from JPEGs."""


class Agreement(NamedTuple):
    """One row of the table of agreement: bfloat16 against float32."""

    model: str
    images: int
    k: int
    same_set: float
    overlap: float
    cosine: float
    """The smallest cosine of an image's two embeddings."""
    completeness: dict[str, tuple[float, float]]
    """Median and worst, by precision."""
    maps: tuple[float, float]


def inference(model: Any, sae: Any, dtype: str) -> Inference:
    """All that a run computes of pixels, on a tower of B/32's shape with these weights."""
    tower = tower_in("float32", copy.deepcopy(model), SHAPES["B/32"])
    return Inference(tower, sae, K, ("contrib",), "cpu", precision=dtype)


# ---- Speed.


def speed(batches: Sequence[int], rounds: int, threads: int) -> list[Speed]:
    """Rows of the script, and of ours in either precision and in batches of these sizes."""
    logging.set_verbosity_error()  # where it is imported, the processor says that it would rather have torchvision
    from transformers.models.clip import CLIPImageProcessor

    model, sae = random_models(SHAPES["B/32"], LATENTS, K, "cpu")
    ours = {dtype: inference(model, sae, dtype) for dtype in DTYPES}
    pixels = np.random.default_rng(0).integers(256, size=(max(SCRIPT_BATCH, *batches), 224, 224, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels[:SCRIPT_BATCH])
    jpegs, processor = [_jpeg(part) for part in photograph_parts(JPEGS, HEIGHT, WIDTH)], CLIPImageProcessor()
    preprocess = ours["float32"].tower.preprocess

    def script() -> object:
        with torch.inference_mode():
            return sae.encode_sparse(model(ours["float32"].tower.normalise(images)).image_embeds)

    ways: dict[str, Callable[[], object]] = {
        "script": script,
        "its images": lambda: processor([Image.open(io.BytesIO(jpeg)) for jpeg in jpegs], return_tensors="pt"),
        "our images": lambda: [decode_image(jpeg, preprocess, resize=default_resize()) for jpeg in jpegs],
    }
    sizes = {"script": SCRIPT_BATCH, "its images": JPEGS, "our images": JPEGS}
    for dtype in DTYPES:
        for batch in batches:
            name = f"with maps, {dtype}, {batch}"
            sizes[name] = batch
            ways[name] = functools.partial(ours[dtype], pixels[:batch])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for way in ways.values():
            way()  # the first call makes oneDNN's kernels
        timed = time_in_turn(ways, rounds, time.process_time if threads == 1 else time.perf_counter)
    finally:
        torch.set_num_threads(before)
    each = {name: [seconds / sizes[name] for seconds in taken] for name, taken in timed.items()}
    return [
        _speed_row(name, sizes[name], each, "its images" if name == "script" else "our images")
        for name in ways
        if not name.endswith("images")
    ]


def _speed_row(name: str, batch: int, each: dict[str, list[float]], images: str) -> Speed:
    plain, whole = each[name], [a + b for a, b in zip(each[name], each[images], strict=True)]
    of_script = [a + b for a, b in zip(each["script"], each["its images"], strict=True)]
    return Speed(
        name.rpartition(", ")[0] or name,
        batch,
        1 / statistics.median(plain),
        1 / statistics.median(whole),
        statistics.median(a / b for a, b in zip(each["script"], plain, strict=True)),
        statistics.median(a / b for a, b in zip(of_script, whole, strict=True)),
    )


def photograph_parts(n: int, height: int, width: int) -> list[np.ndarray]:
    """Random parts of photographs, uint8 (height, width, 3); ValueError where the packages that carry them are missing."""
    taken = photographs()
    random, parts = np.random.default_rng(0), []
    for number in range(n):
        whole = Image.fromarray(taken[number % len(taken)])
        share = min(whole.width / width, whole.height / height) * random.uniform(0.5, 1.0)
        size = int(width * share), int(height * share)
        left, top = random.integers(whole.width - size[0] + 1), random.integers(whole.height - size[1] + 1)
        box = (int(left), int(top), int(left) + size[0], int(top) + size[1])
        parts.append(np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC, box=box)))
    return parts


def _jpeg(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=85)
    return sink.getvalue()


# ---- Agreement.


def of_demo(n: int) -> Agreement:
    """The embedded model on scenes that no training and no choice used."""
    scenes = np.stack([render(scene, 64) for scene in scenes_of(SEED_EVALUATION, n, FIRST_SCENE)])
    k = load_models("demo", "demo")[1].config.most_firing
    ours = {dtype: Inference(*load_models("demo", "demo"), k, ("contrib",), "cpu", precision=dtype) for dtype in DTYPES}
    return compare("demo", scenes, ours)


def of_shape(n: int) -> Agreement:
    """A tower of B/32's shape with random weights, on parts of photographs."""
    model, sae = random_models(SHAPES["B/32"], LATENTS, K, "cpu")
    parts = np.stack(photograph_parts(n, 224, 224))
    return compare("B/32, random weights", parts, {dtype: inference(model, sae, dtype) for dtype in DTYPES})


def compare(model: str, pixels: np.ndarray, ours: Mapping[str, Callable[[np.ndarray], Inferred]]) -> Agreement:
    """Both precisions of the same images, uint8 (n, height, width, 3)."""
    exact, rounded = (_all(ours[dtype], pixels) for dtype in DTYPES)
    shared, differences = [], []
    for image in range(len(pixels)):
        _, first, second = np.intersect1d(exact.latent[image], rounded.latent[image], return_indices=True)
        shared.append(len(first))
        one, other = _maps(exact, image)[first], _maps(rounded, image)[second]
        differences.append(np.abs(one - other).max(-1) / np.abs(one).max(-1).clip(1e-12))
    k = exact.latent.shape[1]
    both = exact.embedding, rounded.embedding
    cosines = (both[0] * both[1]).sum(-1) / np.prod([np.linalg.norm(rows, axis=-1) for rows in both], axis=0)
    of_maps = np.concatenate(differences)
    errors = {dtype: found.completeness for dtype, found in zip(DTYPES, (exact, rounded), strict=True)}
    return Agreement(
        model,
        len(pixels),
        k,
        float(np.mean([count == k for count in shared])),
        float(np.mean(shared) / k),
        float(cosines.min()),
        {dtype: (float(np.median(error)), float(error.max())) for dtype, error in errors.items()},
        (float(np.median(of_maps)), float(of_maps.max())),
    )


def _all(infer: Callable[[np.ndarray], Inferred], pixels: np.ndarray) -> Inferred:
    batches = [infer(pixels[start : start + 32]) for start in range(0, len(pixels), 32)]
    return Inferred(*(np.concatenate(columns) for columns in zip(*batches, strict=True)))


def _maps(found: Inferred, image: int) -> np.ndarray:
    """float (k, P): the image's maps of its kept latents."""
    maps: np.ndarray = found.map[image, 0].astype(np.float32) * found.scale[image, 0, :, None]
    return maps


# ---- In words.


def told(rows: Sequence[Speed], agreements: Sequence[Agreement]) -> str:
    """Both tables in Markdown."""
    lines = ["| | batch | images/s | x script | + images, images/s | x script |", "|---" * 6 + "|"] if rows else []
    for row in rows:
        lines.append(
            f"| {row.way} | {row.batch} | {row.per_second:.1f} | {row.times_script:.2f} | {row.with_images:.1f} | "
            f"{row.times_script_with_images:.2f} |"
        )
    head = ["", "| | images | k | same set | overlap | least cosine | completeness, float32 | bfloat16 | maps |"]
    lines += [*head, "|---" * 9 + "|"] if agreements else []
    for one in agreements:
        errors = " | ".join("{:.1e}, {:.1e}".format(*one.completeness[dtype]) for dtype in DTYPES)
        lines.append(
            f"| {one.model} | {one.images:,} | {one.k} | {one.same_set:.1%} | {one.overlap:.2%} | {one.cosine:.6f} | "
            f"{errors} | {one.maps[0]:.1%}, {one.maps[1]:.1%} |"
        )
    return "\n".join(lines)

"""Scenes as lessons for a CLIP: its words and tokenizer, captions from one word up, disturbed pixels, batches.

Each scene comes with two captions: one of all its objects, and one of the largest object only, by any of its facets. Prompts
such as "red", "a star" or "a photo of a striped circle" are therefore nothing new to the model.
"""

import dataclasses
import io
import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saecore.demo import drawing, outlines, scenes
from saecore.demo.scenes import Scene

PIXELS, GRID = 64, 8
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI CLIP's
FACETS: dict[str, tuple[str, ...]] = {
    "size": tuple(scenes.SIZES),
    "colour": tuple(scenes.COLOURS),
    "texture": scenes.TEXTURES,
    "shape": outlines.SHAPES,
    "background": tuple(scenes.BACKGROUNDS),
}
WORDS = tuple(word for facet in ("colour", "shape", "texture") for word in FACETS[facet])
"""What an object can be called whatever its size: the words whose presence in a scene is taught and measured."""
FIRST_RADIUS = 0.24  # of the first lessons' objects, in image sides: they fill four by four patches
OPENINGS = ("", "a ", "the ", *(f"{medium} of a " for medium in ("a photo", "a picture", "an image", "a drawing")))
NOUNS = ("object", "shape", "thing")
TOKEN_KEYS = ("input_ids", "attention_mask")
PROMPTS = ("a photo of a {}", "a picture of a {}", "a {}", "{}")
"""What zero-shot evaluation averages over; a word that is no shape is followed by 'object'."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word. The end token has the highest id: `transformers` pools CLIP's text there, by two different rules."""
    general = [*" ".join((*OPENINGS, *NOUNS)).split(), "an", "and", "on", "with", "in", "background", ","]
    words = list(dict.fromkeys(general + [word for facet in FACETS.values() for word in facet]))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unknown>", "<start>", *words, "<end>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(t, vocabulary[t]) for t in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unknown>",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=40,
    )


def caption_all(scene: Scene, rng: random.Random) -> str:
    """All objects, largest first. Half of the captions may omit the texture or the size of every object."""
    if rng.random() < 0.5:
        return scene.caption
    dropped = {facet for facet in ("size", "texture") if rng.random() < 0.5}
    kept = [facet for facet in ("size", "colour", "texture", "shape") if facet not in dropped]
    text = " and ".join(_phrase({facet: getattr(thing, facet) for facet in kept}) for thing in scene.things)
    return text + (f" on a {scene.background} background" if rng.random() < 0.5 else "")


def caption_largest(scene: Scene, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The largest object by some of its facets, from a single word up, and the facets that the caption tells."""
    told = [facet for facet in ("size", "colour", "texture", "shape") if rng.random() < 0.5]
    if not told or rng.random() < 0.3:
        told = [rng.choice(("colour", "shape", "colour", "shape", "texture", "size"))]
    facets = {facet: str(getattr(scene.things[0], facet)) for facet in told}
    if len(told) == 1 and rng.random() < 0.3:
        return facets[told[0]], facets
    text = _phrase(facets, rng.choice(OPENINGS), rng.choice(NOUNS))
    if rng.random() < 0.2:
        facets["background"] = scene.background
        text += f" on a {scene.background} background"
    return text, facets


def _phrase(facets: dict[str, str], opening: str = "a ", noun: str = "object") -> str:
    words = [facets[f] for f in ("size", "colour", "texture") if f in facets] + [facets.get("shape", noun)]
    return (opening + " ".join(words)).replace(" a orange", " an orange").strip()


def photo(scene: Scene, quality: int = 92) -> NDArray[np.uint8]:
    """The scene as the job sees it: a JPEG of 192 pixels a side, resized as CLIP's image processor resizes it."""
    return _shrink(drawing.render(scene, 192), quality)


def _shrink(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    # A copy: PyTorch warns of arrays that may not be written.
    return np.array(Image.open(buffer).convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> what the image tower takes [B, 3, H, W]."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Batch(NamedTuple):
    """What one step of training sees, B scenes; and F facets, W words, P patches."""

    pixels: Tensor
    """[B, 3, H, W], normalised."""
    largest_text: dict[str, Tensor]
    told_BF: Tensor
    """For each facet the class that the caption of the largest object tells; -1 where the caption does not tell it."""
    truth_BF: Tensor
    """For each facet the class of the largest object (and of the background)."""
    all_text: dict[str, Tensor]
    """Captions of all objects."""
    present_BW: Tensor
    """0 or 1 for each colour, shape and texture: is there an object like that?"""
    patches_BFP: Tensor
    """Colour and shape of the object that each patch shows most of, from 1; 0 where the background fills two thirds."""


def at_level(scene: Scene, level: float, rng: random.Random) -> Scene:
    """The scene as it is taught at a level from 0 (one solid, upright object of one size in the middle) to 1 (as it is)."""
    if rng.random() >= level:
        scene = dataclasses.replace(scene, things=scene.things[:1])
    if len(scene.things) > 1:
        return scene
    thing = scene.things[0]
    easier = dataclasses.replace(
        thing,
        texture=thing.texture if rng.random() < level else "solid",
        centre=(0.5 + level * (thing.centre[0] - 0.5), 0.5 + level * (thing.centre[1] - 0.5)),
        rotation=level * thing.rotation,
        radius=FIRST_RADIUS + level * (thing.radius - FIRST_RADIUS),
    )
    return dataclasses.replace(scene, things=(easier,))


def make_batch(tokenizer: PreTrainedTokenizerFast, start: int, size: int, level: float = 1.0) -> Batch:
    """Scenes `start` to `start + size` of the training seed, made as easy as the level says, and lightly disturbed."""
    pixels, largest, everything, told, truth, present, patches = [], [], [], [], [], [], []
    for scene in scenes.scenes_of(scenes.SEED_CLIP, size, start):
        rng = random.Random(scene.index)
        scene = at_level(scene, level, rng)
        roll = rng.random()
        if roll < 0.6:
            image = drawing.render(scene, PIXELS)
        else:
            image = _shrink(drawing.render(scene, 128 if roll < 0.9 else 192), rng.randint(70, 95))
        gain, lift = rng.uniform(0.9, 1.1), rng.uniform(-12, 12)
        pixels.append((image.astype(np.float32) * gain + lift).clip(0, 255).astype(np.uint8))
        text, facets = caption_largest(scene, rng)
        largest.append(text)
        everything.append(caption_all(scene, rng))
        told.append([words.index(facets[facet]) if facet in facets else -1 for facet, words in FACETS.items()])
        first = dataclasses.asdict(scene.things[0]) | {"background": scene.background}
        truth.append([words.index(first[facet]) for facet, words in FACETS.items()])
        seen = {getattr(t, f) for t in scene.things for f in ("colour", "shape", "texture")}
        present.append([float(word in seen) for word in WORDS])
        patches.append(patch_classes(scene))
    tokens = [tokenizer(texts, padding=True, return_tensors="pt") for texts in (largest, everything)]
    one, two = ({key: t[key] for key in TOKEN_KEYS} for t in tokens)
    facts = (torch.from_numpy(np.array(fact)) for fact in (told, truth, present, patches))
    told_BF, truth_BF, present_BW, patches_BFP = facts
    return Batch(normalise(np.stack(pixels)), one, told_BF, truth_BF, two, present_BW.float(), patches_BFP)


def patch_classes(scene: Scene) -> NDArray[np.int64]:
    """`Batch.patches_BFP` of one scene, [2, patches]."""
    shares = drawing.visible(scene, 4 * GRID).reshape(-1, GRID, 4, GRID, 4).mean(axis=(2, 4)).reshape(-1, GRID * GRID)
    most, shown = shares.argmax(axis=0), shares.max(axis=0) > 1 / 3
    classes = [[1 + FACETS[facet].index(getattr(t, facet)) for t in scene.things] for facet in ("colour", "shape")]
    return np.array(classes)[:, most] * shown

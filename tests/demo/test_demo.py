"""The drawn world is what it says it is, and the embedded models know it: figures on scenes they never saw."""

import dataclasses
import hashlib
import io
import json
import math
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from saecore.demo import drawing, figures, lessons, outlines, scenes, writing
from saecore.sae.checkpoints import load_folder

SIZE = 192
DEMO = Path(scenes.__file__).parent
CLIP, SAE = DEMO / "clip", DEMO / "sae"


def test_a_scene_is_fixed_by_seed_and_index_alone() -> None:
    assert list(scenes.scenes_of(5, 8)) == [scenes.scene_at(5, index) for index in range(8)]
    assert list(scenes.scenes_of(5, 3, start=40)) == [scenes.scene_at(5, index) for index in (40, 41, 42)]
    assert scenes.scene_at(5, 7).things != scenes.scene_at(6, 7).things != scenes.scene_at(6, 8).things
    first, second = (drawing.draw(scenes.scene_at(5, 7), SIZE) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.masks, second.masks)
    assert (first.caption, first.attributes) == (second.caption, second.attributes)
    seeds = {scenes.SEED_CLIP, scenes.SEED_SAE, scenes.SEED_EVALUATION, scenes.SEED_DEMO}
    assert len(seeds) == 4


def test_every_word_occurs_and_every_count() -> None:
    sample = list(scenes.scenes_of(3, 600))
    things = [thing for scene in sample for thing in scene.things]
    for facet, words in lessons.FACETS.items():
        if facet == "background":
            assert {scene.background for scene in sample} == set(words)
        else:
            shares = Counter(getattr(thing, facet) for thing in things)
            assert set(shares) == set(words)
            assert min(shares.values()) > 0.5 * len(things) / len(words)
    counts = Counter(len(scene.things) for scene in sample)
    assert sorted(counts) == [1, 2, 3, 4]
    assert min(counts.values()) > 30


@pytest.mark.parametrize("shape", outlines.SHAPES)
def test_every_outline_has_the_area_of_the_unit_disc(shape: str) -> None:
    canvas = np.zeros((800, 800), np.uint8)
    cv2.fillPoly(canvas, [np.round(contour * 200 + 400).astype(np.int32) for contour in outlines.outline(shape)], (1,))
    assert canvas.sum() / 200**2 == pytest.approx(math.pi, rel=0.02)
    assert 1 <= outlines.reach(shape) < 1.85


def test_masks_are_where_the_objects_are() -> None:
    """Taking an object away changes pixels of its mask, and no others but its antialiased rim and thin tips."""
    kernel = np.ones((3, 3), np.uint8)
    for scene in scenes.scenes_of(11, 40):
        drawn = drawing.draw(scene, SIZE)
        assert drawn.masks.shape == (len(scene.things), SIZE, SIZE)
        assert drawn.masks.sum(axis=0).max() == 1
        for i, mask in enumerate(drawn.masks):
            without = dataclasses.replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
            changed = np.abs(drawing.render(without, SIZE).astype(int) - drawn.image).max(axis=2) > 0
            rim = cv2.dilate(mask.view(np.uint8), kernel).view(bool)
            assert (changed & ~rim).sum() <= 0.01 * mask.sum()
            assert not (changed & ~cv2.dilate(mask.view(np.uint8), kernel, iterations=5).view(bool)).any()
            assert (changed & mask).sum() > 0.98 * mask.sum()


def test_pixels_have_the_colour_that_the_caption_says() -> None:
    """The nearest of the sixteen tones (eight colours, each with its darker second tone) is one of the object's own two."""
    names = list(scenes.COLOURS)
    tones = np.concatenate([np.array(list(scenes.COLOURS.values())) * shade for shade in (1, drawing.DARKER)])
    for scene in scenes.scenes_of(12, 60):
        drawn = drawing.draw(scene, SIZE)
        for thing, mask in zip(scene.things, drawn.masks, strict=True):
            inside = cv2.erode(mask.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
            pixels = drawn.image[inside].astype(float)
            nearest = np.square(pixels[:, None] - tones).sum(axis=2).argmin(axis=1) % len(names)
            own = nearest == names.index(thing.colour)
            assert own.mean() > (0.99 if thing.texture == "solid" else 0.75), thing
            assert f"{thing.size} {thing.colour} {thing.texture} {thing.shape}" in drawn.caption


def test_the_largest_is_clear_and_little_is_hidden() -> None:
    hidden = []
    for scene in scenes.scenes_of(13, 600):
        areas = drawing.visible(scene, 96).sum(axis=(1, 2))
        alone = [drawing.visible(dataclasses.replace(scene, things=(thing,)), 96).sum() for thing in scene.things]
        hidden += [1 - seen / full for seen, full in zip(areas, alone, strict=True)]
        assert all(areas[0] > 1.25 * other for other in areas[1:])
        assert len({t.colour for t in scene.things}) == len({t.shape for t in scene.things}) == len(scene.things)
        assert list(scene.things) == sorted(scene.things, key=lambda t: -t.radius)
        # Two patches of an 8 x 8 grid: wide enough for a map to hit.
        assert min(t.radius for t in scene.things) * 2 * 64 > 15
    assert 0.02 < np.mean(np.array(hidden) > 0.05) < 0.3  # overlapping sometimes
    assert np.quantile(hidden, 0.995) < 0.4
    assert max(hidden) < 0.55


def test_a_scene_is_the_same_at_every_size() -> None:
    for scene in scenes.scenes_of(14, 20):
        small = drawing.render(scene, 64).astype(float)
        large = cv2.resize(drawing.render(scene, 256), (64, 64), interpolation=cv2.INTER_AREA).astype(float)
        assert np.abs(small - large).mean() < 8
        shrunk = np.stack(
            [
                cv2.resize(m.astype(np.float32), (64, 64), interpolation=cv2.INTER_AREA)
                for m in drawing.visible(scene, 256)
            ]
        )
        # OpenCV's antialiased polygons are a quarter of a pixel fat at 64: 1 % of the image along a long outline.
        assert ((shrunk > 0.5) == drawing.visible(scene, 64)).mean() > 0.98


def test_shards_recover_their_scenes_and_repeat_to_the_byte(tmp_path: Path) -> None:
    paths = writing.write_shards(tmp_path / "one", scenes=11, shards=3, seed=77, size=96)
    assert [path.name for path in paths] == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    again = writing.write_shards(tmp_path / "two", scenes=11, shards=3, seed=77, size=96)
    digests = [[hashlib.sha256(path.read_bytes()).hexdigest() for path in run] for run in (paths, again)]
    assert digests[0] == digests[1]
    names = []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith(".jpg"):
                    image = np.asarray(Image.open(io.BytesIO(data)), dtype=float)
                    truth = drawing.render(scenes.scene_at(77, int(member.name[:6])), 96)
                    assert np.abs(image - truth).mean() < 6  # JPEG
                else:
                    told = json.loads(data)
                    scene = scenes.scene_at(told["seed"], told["index"])
                    assert told["index"] == int(member.name[:6])
                    assert (told["caption"], told["attributes"]) == (scene.caption, scene.attributes)
    assert names == [f"{index:06d}.{suffix}" for index in range(11) for suffix in ("jpg", "json")]


def test_folder_and_parquet_hold_the_same_images(tmp_path: Path) -> None:
    folder = writing.write_folder(tmp_path / "images", scenes=4, seed=78, size=96)
    table = pq.read_table(writing.write_parquet(tmp_path / "scenes.parquet", scenes=4, seed=78, size=96)).to_pylist()
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, (row, line) in enumerate(zip(table, lines, strict=True)):
        scene = scenes.scene_at(78, index)
        assert row["image"] == {"bytes": drawing.jpeg(scene, 96), "path": f"{index:06d}.jpg"}
        assert (folder / line["file_name"]).read_bytes() == row["image"]["bytes"]
        assert row["caption"] == line["caption"] == scene.caption
        assert json.loads(row["attributes"]) == line["attributes"] == scene.attributes
    with pytest.raises(ValueError, match="3 scenes cannot fill 4 shards"):
        writing.write_shards(tmp_path / "none", scenes=3, shards=4)


# The models


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(CLIP).eval()


@pytest.fixture(scope="module")
def sample() -> list[scenes.Scene]:
    return list(scenes.scenes_of(scenes.SEED_EVALUATION, 800, start=100_000))


@pytest.fixture(scope="module")
def embeddings(clip: CLIPModel, sample: list[scenes.Scene]) -> torch.Tensor:
    """Through the JPEG at 192 pixels and the image processor that is saved with the model."""
    processor = CLIPImageProcessorPil.from_pretrained(CLIP)
    images = [Image.open(io.BytesIO(drawing.jpeg(scene, SIZE))) for scene in sample]
    with torch.no_grad():
        return figures.image_embeddings(clip, processor(images=images, return_tensors="pt")["pixel_values"])


def test_training_sees_what_the_image_processor_makes(
    clip: CLIPModel, sample: list[scenes.Scene], embeddings: torch.Tensor
) -> None:
    pixels = lessons.normalise(np.stack([lessons.photo(scene) for scene in sample[:20]]))
    with torch.no_grad():
        torch.testing.assert_close(figures.image_embeddings(clip, pixels), embeddings[:20], atol=1e-4, rtol=1e-4)


def test_text_is_pooled_at_the_end_token_whatever_the_padding(clip: CLIPModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    assert tokenizer.eos_token_id == clip.config.text_config.eos_token_id == len(tokenizer) - 1
    words = [*outlines.SHAPES, *scenes.COLOURS, *scenes.TEXTURES, *scenes.SIZES, *scenes.BACKGROUNDS]
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words))["input_ids"]
    texts = ["Red", "a photo of a large striped heart, and a ring on a sand background"]
    both = tokenizer(texts, padding=True, return_tensors="pt")
    ends = (both["input_ids"] == tokenizer.eos_token_id).long().argmax(dim=1)
    with torch.no_grad():
        out = clip.text_model(**{key: both[key] for key in lessons.TOKEN_KEYS})
        torch.testing.assert_close(out.pooler_output, out.last_hidden_state[torch.arange(2), ends])
        alone = clip.text_model(
            **{k: v for k, v in tokenizer("red", return_tensors="pt").items() if k in lessons.TOKEN_KEYS}
        )
    torch.testing.assert_close(alone.pooler_output[0], out.pooler_output[0], atol=1e-5, rtol=1e-5)


def test_zero_shot_figures(clip: CLIPModel, sample: list[scenes.Scene], embeddings: torch.Tensor) -> None:
    measured = figures.zero_shot(clip, AutoTokenizer.from_pretrained(CLIP), embeddings, sample)
    print(measured)
    assert measured["single colour"] >= 0.99
    assert measured["single shape"] >= 0.95
    assert measured["mixed colour"] >= 0.85
    assert measured["mixed shape"] >= 0.85


def test_sae_figures(sample: list[scenes.Scene], embeddings: torch.Tensor) -> None:
    sae = load_folder(SAE)
    assert sae.config.k == 12
    measured = figures.sae_figures(sae, embeddings, sample)
    print(measured)
    assert measured["cosine"] >= 0.95
    assert measured["dead"] < 0.15
    assert 1 < measured["l0"] <= 12


def test_followed_is_the_area_under_the_curve() -> None:
    """By hand: latent 0 fires in exactly the scenes with red, latent 1 nowhere, latent 2 in half of the red ones."""
    sample = list(scenes.scenes_of(3, 40))
    red = torch.tensor([any(thing.colour == "red" for thing in scene.things) for scene in sample])
    half = red & (red.cumsum(dim=0) % 2 == 0)
    acts = torch.stack([red * torch.rand(40).add(0.1), torch.zeros(40), half.float()], dim=1)
    area = figures.followed(acts, sample)[:, lessons.WORDS.index("red")]
    expected = 0.5 + 0.5 * (half.sum() / red.sum()).item()
    assert area.tolist() == pytest.approx([1.0, 0.5, expected])


def test_weights_are_small() -> None:
    files = [path for folder in (CLIP, SAE) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}

"""Masks of real files beside what the model saw of the same pictures, and latents whose label is planted."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from saecore import storage
from saecore.evaluation import localisation
from saecore.evaluation.localisation import Followers, follow, halves
from saecore.evaluation.masks import FOREGROUND, Covered, Geometry, cases, covered, followers, open_masks
from saecore.images.decode import decode_image
from saecore.images.preprocess import Preprocess
from tests.helpers.hostile import encode

RNG = np.random.default_rng(11)


def picture(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Black, with a white rectangle (left, top, right, bottom)."""
    made = Image.new("L", (width, height))
    made.paste(255, box)
    return made


def png(mask: Image.Image, **options: object) -> bytes:
    return encode(mask, "PNG", **options)


def seen_by(data: bytes, preprocess: Preprocess) -> tuple[np.ndarray, Geometry]:
    """The pixels of the model, and what the table of images says of where they come from."""
    decoded = decode_image(data, preprocess)
    return decoded.pixels, Geometry(decoded.width, decoded.height, decoded.crop)


def centre_crop(resize: int, crop: int) -> Preprocess:
    return Preprocess.from_config({"size": resize, "crop_size": crop})


# ---- What a model saw of a mask.


def test_a_centre_crop_by_hand(tmp_path: Path) -> None:
    """Of 120 x 80 pixels the model sees the columns 20 to 100, at half their size: its pixel x lies over column 21 + 2 x."""
    (tmp_path / "a.png").write_bytes(png(picture(120, 80, (30, 0, 60, 40))))
    geometry = Geometry(120, 80, (20, 0, 100, 80))
    seen = open_masks(str(tmp_path), ["a.jpg"]).mask("a.jpg", FOREGROUND, geometry, (40, 40))
    expected = np.zeros((40, 40), bool)
    expected[:20, 5:20] = True
    assert seen is not None
    np.testing.assert_array_equal(seen, expected)
    found = covered(open_masks(str(tmp_path), ["a.jpg"]), ["a.jpg"], [geometry], (40, 40), (2, 2), 20)
    assert found.shares.tolist() == [[0.75, 0, 0, 0]]
    # Patches of 16 leave 8 pixels at the right and the lower edge that the tower does not see.
    found = covered(open_masks(str(tmp_path), ["a.jpg"]), ["a.jpg"], [geometry], (40, 40), (2, 2), 16)
    np.testing.assert_allclose(found.shares, [[11 / 16, 4 / 16, 11 / 16 / 4, 4 / 16 / 4]])


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("preprocess", [centre_crop(64, 64), centre_crop(64, 48), centre_crop(64, 80)], ids=str)
@pytest.mark.parametrize("of_crop", [False, True])
def test_it_is_where_the_model_sees_the_object(
    tmp_path: Path, orientation: int, preprocess: Preprocess, of_crop: bool
) -> None:
    """A white rectangle is the object: the model's own pixels say where. One crop reaches over the edges of the picture."""
    shown = picture(150, 100, (40, 20, 90, 100))
    turn = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = shown.transpose(turn[orientation]) if orientation > 1 else shown
    pixels, geometry = seen_by(encode(stored, "PNG", exif=exif), preprocess)
    assert (geometry.width, geometry.height) == (150, 100)
    mask = shown.crop(geometry.crop) if of_crop else shown
    folder = tmp_path / "of" / "photographs"
    folder.mkdir(parents=True)
    (folder / "x.dog.PNG").write_bytes(png(mask))
    masks = open_masks(str(tmp_path), ["other.jpg", "of/photographs/x.png"])
    assert masks.labels_of("of/photographs/x.png") == ["dog"]
    seen = masks.mask("of/photographs/x.png", "dog", geometry, preprocess.size)
    assert seen is not None
    white = pixels[..., 0] > 127
    assert 0.1 < white.mean() < 0.6
    assert (seen != white).mean() < 0.03, "they differ only at the rim"
    assert not (seen & (pixels[..., 0] < 20)).any()
    assert not (~seen & (pixels[..., 0] > 235)).any()


FORMS = {
    "black and white": picture(6, 4, (1, 1, 3, 3)).convert("1"),
    "grey": picture(6, 4, (1, 1, 3, 3)).point(lambda value: value // 255),
    "16 bits": Image.fromarray(np.asarray(picture(6, 4, (1, 1, 3, 3)), np.uint16)),
    "colours": Image.merge("RGB", [Image.new("L", (6, 4)), Image.new("L", (6, 4)), picture(6, 4, (1, 1, 3, 3))]),
    "transparent around": Image.merge("LA", [Image.new("L", (6, 4), 9), picture(6, 4, (1, 1, 3, 3))]),
    "opaque black around": Image.merge("RGBA", [picture(6, 4, (1, 1, 3, 3))] * 3 + [Image.new("L", (6, 4), 255)]),
}


def palette() -> Image.Image:
    """As Pascal VOC has them; the first colour is background although it is not black."""
    made = picture(6, 4, (1, 1, 3, 3)).point(lambda value: value // 128).convert("P")
    made.putpalette([250, 240, 230, 0, 0, 0])
    made.paste(1, (1, 1, 3, 3))
    return made


@pytest.mark.parametrize("form", [*FORMS, "palette"])
def test_what_is_not_zero_is_foreground(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(png(palette() if form == "palette" else FORMS[form]))
    seen = open_masks(str(tmp_path), ["a"]).mask("a", FOREGROUND, Geometry(6, 4, (0, 0, 6, 4)), (4, 6))
    expected = np.zeros((4, 6), bool)
    expected[1:3, 1:3] = True
    np.testing.assert_array_equal(seen, expected)


# ---- Where masks lie.


def small(column: int) -> bytes:
    return png(picture(8, 8, (column, 0, column + 1, 8)))


EIGHT = Geometry(8, 8, (0, 0, 8, 8))


def columns(mask: np.ndarray | None) -> list[int]:
    assert mask is not None
    return np.flatnonzero(mask.any(axis=0)).tolist()


def test_a_folder_names_images_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "masks"
    (folder / "b").mkdir(parents=True)
    names = [
        "a.png",
        "a.cat.png",
        "a.big dog.png",
        "b/0.1.png",
        "b/0.1.cat.png",
        "b/0.png",
        ".a.png",
        "a.cat.txt",
        "c.png",
    ]
    for column, name in enumerate(names[:8]):
        (folder / name).write_bytes(small(column))

    def check(address: str) -> None:
        masks = open_masks(address, ["a.jpg", "b/0.1.webp", "b/0", "d.jpg"])
        labels = {key: masks.labels_of(key) for key in ("a.jpg", "b/0.1.webp", "b/0", "d.jpg")}
        assert labels == {"a.jpg": ["", "big dog", "cat"], "b/0.1.webp": ["", "cat"], "b/0": [""], "d.jpg": []}
        assert columns(masks.mask("a.jpg", "big dog", EIGHT, (8, 8))) == [2]
        assert columns(masks.mask("b/0.1.webp", "", EIGHT, (8, 8))) == [3]
        assert masks.mask("a.jpg", "horse", EIGHT, (8, 8)) is None
        assert masks.mask("d.jpg", "", EIGHT, (8, 8)) is None
        assert open_masks(address, ["b/0"]).labels_of("b/0") == ["", "1"], "no image is called 0.1 here"

    check(str(folder))
    store = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri.removeprefix("s3://")))
    check("s3://masks")
    with pytest.raises(ValueError, match=r"s3://masks/a\.png: this mask has 8 x 8 pixels"):
        open_masks("s3://masks", ["a"]).mask("a", "", Geometry(9, 8, (0, 0, 9, 8)), (8, 8))


def parquet(path: Path, **named: list[object]) -> str:
    pq.write_table(pa.table(named), path)
    return str(path)


def test_a_parquet_file_holds_parts_of_masks(tmp_path: Path) -> None:
    address = parquet(
        tmp_path / "masks.parquet",
        key=["a.jpg", "a", "other", "a", "b"],
        label=["cat", "cat", "cat", None, "dog"],
        mask=[small(0), small(5), b"nobody reads this", small(2), small(3)],
    )
    masks = open_masks(address, ["a.png", "b.png"])
    assert masks.labels_of("a.png") == ["", "cat"]
    assert columns(masks.mask("a.png", "cat", EIGHT, (8, 8))) == [0, 5]
    assert columns(masks.mask("b.png", "dog", EIGHT, (8, 8))) == [3]
    numbers = parquet(tmp_path / "numbers.parquet", key=[7], label=[3], mask=[{"bytes": small(1), "path": None}])
    assert columns(open_masks(numbers, ["7"]).mask("7", "3", EIGHT, (8, 8))) == [1]


def test_mistakes_are_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    jpeg, cut = encode(picture(8, 8, (0, 0, 4, 4)), "JPEG"), png(palette())[:-30]
    for name, data in (("jpeg.png", jpeg), ("cut.png", cut), ("size.png", small(1)), ("empty.png", b"")):
        (folder / name).write_bytes(data)
    cropped = Geometry(12, 10, (1, 0, 11, 10))
    for name, said in {
        "jpeg": "this mask is no PNG; ",
        "empty": "this mask is no PNG; ",
        "cut": r"this mask cannot be read \(truncated: ",
        "size": "this mask has 8 x 8 pixels; expected 12 x 10 as the image, or 10 x 10 as the part of it that the model saw",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}/{name}.png: {said}[^\n]*$"):
            open_masks(str(folder), [name]).mask(name, "", cropped, (4, 4))
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    for path, said in {
        str(tmp_path / "nowhere"): "does not exist, so it holds no masks",
        str(tmp_path / "text.txt"): "is no folder of PNG files and no Parquet file",
        str(tmp_path / "broken.parquet"): "cannot be read as Parquet: ",
        str(folder): "holds no mask of any of these images; that of z.jpg has the name z.png, or z.LABEL.png",
        parquet(tmp_path / "one.parquet", key=["z"], masks=[small(1)]): "has no column mask; ",
        parquet(
            tmp_path / "two.parquet", key=["y"], mask=[small(1)]
        ): "holds no mask of any of these images; that of z.jpg has the key z, or z.jpg",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(path)} {said}[^\n]*$"):
            open_masks(path, ["z.jpg"])
    for number, (values, said) in enumerate(
        {
            (None, "b"): "row 0: key is None, expected a text or a whole number",
            ("z", "text"): "row 0: mask is 'text', expected the bytes of a PNG",
        }.items()
    ):
        path = parquet(tmp_path / f"{number}.parquet", key=[values[0]], mask=[values[1]])
        with pytest.raises(ValueError, match=f"{re.escape(path)}, {said}"):
            open_masks(path, ["z.jpg"])


def test_a_mask_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(sink, "PNG")
    (tmp_path / "a.png").write_bytes(sink.getvalue())
    with pytest.raises(
        ValueError, match=r"a\.png: this mask cannot be read \(too-large: Image size \(200000000 pixels\)"
    ):
        open_masks(str(tmp_path), ["a"]).mask("a", "", EIGHT, (8, 8))


# ---- Which latent follows a label.


def planted(images: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of 60 images, and the kept latents of each: 5 fires with the first label, 900 with the second but for some
    images, and others at random."""
    present = np.stack([RNG.random(images) < share for share in (0.5, 0.4, 0.01)], axis=1)
    present[:, 2] = False
    present[0, 2] = True
    latents, activations = np.zeros((images, 4), int), np.zeros((images, 4), np.float32)
    for image in range(images):
        fires = [5] * int(present[image, 0]) + [900] * int(present[image, 1] and image % 7 > 0)
        others = RNG.choice(np.arange(10, 40), 4 - len(fires), replace=False)
        latents[image] = [*fires, *others]
        activations[image] = RNG.random(4) + 0.1
        activations[image, 3] *= -1
    return present, latents, activations


def test_the_latent_that_follows_a_label_is_found() -> None:
    present, latents, activations = planted()
    dense = np.zeros((60, 1000))
    np.put_along_axis(dense, latents, activations.clip(min=0), axis=1)
    found = follow(present, latents, activations)
    assert found.latent.tolist() == [5, 900, -1], "one image is too few to say what follows the third label"
    assert found.auc[0] == roc_auc_score(present[:, 0], dense[:, 5]) > 0.99
    assert found.auc[1] == pytest.approx(roc_auc_score(present[:, 1], dense[:, 900]))
    assert np.isnan(found.auc[2])
    areas = localisation.separation(dense, present)
    assert areas[:, 0].max() == found.auc[0]
    nothing = follow(present, latents, np.zeros_like(activations))
    assert nothing.latent.tolist() == [-1, -1, -1]


def test_halves_are_halves_by_the_seed() -> None:
    assert halves(61).sum() == 30
    assert (halves(61) == halves(61)).all()
    assert (halves(61) != halves(61, seed=1)).any()


def test_latents_are_chosen_on_one_half_and_judged_on_the_other() -> None:
    """The foreground is judged by all kept latents, labels by their followers where they fire and show on half a patch."""
    present, latents, activations = planted()
    pairs = [(image, 1 + label) for image, label in np.argwhere(present[:, :2])] + [(0, 0), (1, 0)]
    image, label = np.array(pairs).T
    shares = np.zeros((len(pairs), 4), np.float32)
    shares[:, 2] = 0.5
    shares[0, 2] = 0.4
    known = np.ones(60, bool)
    known[7] = False
    found = Covered(["", "cat", "dog"], image, label, shares, known)
    np.testing.assert_array_equal(found.present()[:, 1:], present[:, :2])
    chosen_by = halves(60)
    following = followers(found, latents, activations, chosen_by)
    rows = chosen_by & known
    assert following.latent.tolist() == [-1, 5, 900]
    np.testing.assert_allclose(following.auc[1:], follow(present[rows], latents[rows], activations[rows]).auc[:2])
    judged = cases(found, following, latents, activations, ~chosen_by)
    expected = set()
    for number, (of, name) in enumerate(pairs):
        for rank in range(4):
            wanted = name == 0 or (not chosen_by[of] and latents[of, rank] == (0, 5, 900)[name])
            if wanted and activations[of, rank] > 0 and number > 0:
                expected.add((of, rank, number))
    assert {tuple(map(int, row)) for row in zip(*judged, strict=True)} == expected
    assert sum(name == 0 for _, name in pairs) * 3 == sum(label[number] == 0 for number in judged.pair)


def test_nothing_is_judged_where_nothing_is_covered() -> None:
    empty = Covered(["cat"], np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4), np.float32), np.zeros(3, bool))
    following = followers(empty, np.zeros((3, 2), int), np.ones((3, 2)), np.ones(3, bool))
    assert following == Followers(*following)
    assert following.latent.tolist() == [-1]
    assert len(cases(empty, following, np.zeros((3, 2), int), np.ones((3, 2)), np.ones(3, bool)).pair) == 0

import io
import json
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image

from saecore.images.decode import ImageError, decode_image, open_rgb
from saecore.images.preprocess import Preprocess, load_preprocess
from tests.helpers.hostile import encode, photograph, png

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = [
    *(SKIMAGE / name for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg")),
    *(SKIMAGE / name for name in ("ihc.png", "motorcycle_left.png", "retina.jpg")),
    SKLEARN / "china.jpg",
    SKLEARN / "flower.jpg",
]
CLIP_CONFIG = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}


def preprocess(size: int = 64) -> Preprocess:
    return Preprocess.from_config({"size": size, "crop_size": size})


def refusal(data: bytes, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode_image(data, preprocess(), **options)
    assert caught.value.detail
    return caught.value


def theirs(image: Image.Image, **config: Any) -> np.ndarray:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **config)
    return np.asarray(processor(image)["pixel_values"][0]).transpose(1, 2, 0)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_pixels_equal_those_of_transformers(path: Path) -> None:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    shapes = [image, image.crop((0, 0, width, height // 3)), image.crop((5, 0, 5 + width // 4, height))]
    sizes = ((224, 224), (336, 336), (64, 64), (73, 64), (64, 81))  # the last one is padded
    for shape, (resize, crop) in zip([*shapes, image, shapes[2]], sizes, strict=True):
        config = {"size": {"shortest_edge": resize}, "crop_size": {"height": crop, "width": crop}}
        ours = decode_image(encode(shape, "PNG", compress_level=1), Preprocess.from_config(config))
        assert ours.pixels.dtype == np.uint8
        np.testing.assert_array_equal(ours.pixels, theirs(shape, **config))


def test_rounding_equals_that_of_transformers_at_odd_sizes() -> None:
    for width, height in ((1, 1), (1, 70), (65, 64), (127, 64), (99, 98), (331, 77), (77, 331)):
        image = photograph(width, height)
        config = {"size": {"shortest_edge": 37}, "crop_size": {"height": 37, "width": 32}}
        ours = decode_image(encode(image, "PNG"), Preprocess.from_config(config))
        np.testing.assert_array_equal(ours.pixels, theirs(image, **config))


SIZES: list[tuple[dict[str, Any], int]] = [
    ({"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}, 3),
    ({"size": {"shortest_edge": 80}, "crop_size": {"height": 73, "width": 64}}, 1),
    ({"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 81}}, 2),  # padded
    ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 256, "width": 224}}, 3),
    ({"size": {"shortest_edge": 700}, "crop_size": {"height": 500, "width": 500}}, 3),  # most are enlarged
]


@pytest.mark.parametrize(("config", "resample"), SIZES)
def test_fast_pixels_are_those_of_pillow_but_for_rounding(config: dict[str, Any], resample: int) -> None:
    preprocess = Preprocess.from_config({**config, "resample": resample})
    off, n_values = np.zeros(2), 0
    for path in (SKIMAGE / "chelsea.png", SKIMAGE / "rocket.jpg", SKLEARN / "china.jpg"):
        image = Image.open(path).convert("RGB")
        width, height = image.size
        for shape in (image, image.crop((0, 0, width, height // 3)), image.crop((5, 0, 5 + width // 4, height))):
            data = encode(shape, "BMP")
            fast = decode_image(data, preprocess, resize="fast")
            assert fast[1:] == decode_image(data, preprocess)[1:]
            difference = np.abs(rows_first(shape, preprocess).astype(int) - fast.pixels)
            assert difference.max() <= 2
            off, n_values = off + np.array([(difference > 0).sum(), (difference > 1).sum()]), n_values + difference.size
    assert off[0] < 0.01 * n_values
    assert off[1] < 1e-5 * n_values


def rows_first(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Pillow's pixels, if it goes along the rows first whatever its version thinks of the order."""
    (height, width), (across, down) = preprocess.size, preprocess.resized(*image.size)
    left, top, resample = (across - width) // 2, (down - height) // 2, Image.Resampling(preprocess.resample)
    resized = image.resize((across, image.height), resample).resize((across, down), resample)
    return np.asarray(resized.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("path", PHOTOGRAPHS[:3], ids=lambda path: path.name)
def test_fast_pixels_are_those_of_pytorch(path: Path) -> None:
    """By which transformers' processors resize that are backed by torchvision."""
    image = Image.open(path).convert("RGB").crop((0, 0, 400, 290))
    size = {"height": 224, "width": 224}
    siglip = Preprocess.from_config({"image_processor_type": "SiglipImageProcessor", "size": size, "resample": 3})
    fast = decode_image(encode(image, "BMP"), siglip, resize="fast").pixels
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(planes, size=(224, 224), mode="bicubic", antialias=True)
    difference = np.abs(fast.astype(int) - theirs[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01  # none where PyTorch has AVX2


def test_fast_pixels_of_odd_sizes_are_those_of_pillow() -> None:
    for width, height in ((1, 1), (1, 70), (65, 64), (127, 64), (99, 98), (331, 77), (77, 331), (2, 4000)):
        data = encode(photograph(width, height), "PNG")
        config = {"size": {"shortest_edge": 37}, "crop_size": {"height": 37, "width": 32}}
        fast = decode_image(data, Preprocess.from_config(config), resize="fast")
        exact = rows_first(Image.open(io.BytesIO(data)), Preprocess.from_config(config))
        np.testing.assert_allclose(fast.pixels.astype(int), exact, atol=1)


def test_a_machine_that_cannot_be_fast_is_loud_and_refuses_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    with pytest.raises(ImportError):
        decode_image(encode(photograph(50, 40), "PNG"), preprocess(16), resize="fast")


@pytest.mark.parametrize(("width", "height", "resample"), [(37, 50, 3), (99, 98, 0), (99, 98, 4), (98, 99, 5)])
def test_fast_pixels_are_pillows_where_nothing_is_resized_or_the_filter_is_rare(
    width: int, height: int, resample: int
) -> None:
    rare = Preprocess.from_config({"size": 37, "crop_size": 37, "resample": resample})
    data = encode(photograph(width, height), "PNG")
    np.testing.assert_array_equal(decode_image(data, rare, resize="fast").pixels, decode_image(data, rare).pixels)


def test_siglips_processor_resizes_without_regard_to_shape() -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    config = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 256}, "resample": 3}
    image = photograph(200, 90)
    ours = decode_image(encode(image, "PNG"), Preprocess.from_config(config))
    other = SiglipImageProcessorPil(size=config["size"], resample=3, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(ours.pixels, np.asarray(other(image)["pixel_values"][0]).transpose(1, 2, 0))
    assert ours.crop == (0, 0, 200, 90)


def test_the_crop_is_where_the_pixels_come_from() -> None:
    decoded = decode_image(encode(photograph(400, 100), "PNG"), preprocess(50))
    assert decoded[1:] == (400, 100, "PNG", (150, 0, 250, 100))


def test_configs_old_and_new(tmp_path: Path) -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    new = {"image_processor": {**CLIP_CONFIG, "image_processor_type": "CLIPImageProcessorFast", "do_pad": None}}
    assert Preprocess.from_config(old) == Preprocess.from_config(new) == Preprocess.from_config({})
    assert Preprocess.from_config(old).size == (224, 224)
    plain = Preprocess.from_config({"do_normalize": False, "do_rescale": False})
    assert (plain.mean, plain.std, plain.rescale_factor) == ((0.0,) * 3, (1.0,) * 3, 1.0)
    (tmp_path / "processor_config.json").write_text(json.dumps(new))
    assert load_preprocess(str(tmp_path)) == Preprocess.from_config(old)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    saved = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 60, "width": 56})
    saved.save_pretrained(tmp_path / "saved")
    loaded = load_preprocess(str(tmp_path / "saved"))
    assert (loaded.resize, loaded.crop, loaded.mean) == (64, (60, 56), tuple(saved.image_mean))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "LlavaImageProcessor"}, "LlavaImageProcessor"),
        ({"size": {"longest_edge": 224}}, "longest_edge"),
        ({"crop_size": {"shortest_edge": 224}}, "crop_size"),
        ({"do_resize": False}, "resize"),
        ({"do_center_crop": False}, "no fixed size"),
        ({"resample": 17}, "17"),
        ({"size": 0}, "size of an image processor is 0"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess.from_config(config)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    # Red, green, blue, white corners of the picture as a viewer shows it; stored turned, as Pillow itself undoes it.
    image = Image.new("RGB", (48, 32))
    for box, colour in zip(((0, 0), (24, 0), (0, 16), (24, 16)), ("red", "lime", "blue", "white"), strict=True):
        image.paste(colour, (*box, box[0] + 24, box[1] + 16))
    kind = Image.Transpose
    flips = {2: kind.FLIP_LEFT_RIGHT, 4: kind.FLIP_TOP_BOTTOM, 5: kind.TRANSPOSE, 7: kind.TRANSVERSE}
    undo = {**flips, 3: kind.ROTATE_180, 6: kind.ROTATE_90, 8: kind.ROTATE_270}
    exif = Image.Exif()
    exif[0x112] = orientation
    if form in ("GIF", "BMP"):
        stored, options = image, {}  # these hold no EXIF
    else:
        stored, options = image.transpose(undo[orientation]) if orientation > 1 else image, {"exif": exif}
    decoded = decode_image(encode(stored, form, **options), preprocess(32))
    shown = open_rgb(encode(stored, form, **options)).image
    assert (decoded.width, decoded.height, decoded.format) == (48, 32, form)
    corners = np.asarray(shown, int)[[8, 8, 24, 24], [8, 40, 8, 40]]
    assert np.abs(corners - [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]).max() < 12


def only_colour(data: bytes) -> list[int]:
    pixels = decode_image(data, preprocess(16)).pixels.reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return pixels[0].tolist()


@pytest.mark.parametrize(
    ("image", "form", "options", "expected"),
    [
        (Image.new("L", (20, 20), 77), "PNG", {}, [77, 77, 77]),
        (Image.new("1", (20, 20), 1), "PNG", {}, [255, 255, 255]),
        (Image.new("RGB", (20, 20), (9, 8, 7)).quantize(4), "PNG", {}, [9, 8, 7]),
        (Image.new("LA", (20, 20), (0, 0)), "PNG", {}, [255, 255, 255]),
        (Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "PNG", {}, [204, 204, 204]),
        (Image.new("RGBA", (20, 20), (0, 0, 0, 51)), "WEBP", {"lossless": True}, [204, 204, 204]),
        (Image.new("RGB", (20, 20), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, [255, 255, 255]),
        (Image.new("L", (20, 20), 5), "PNG", {"transparency": 5}, [255, 255, 255]),
        (Image.new("P", (20, 20), 0), "GIF", {"transparency": 0}, [255, 255, 255]),
        (Image.new("P", (20, 20), 0), "PNG", {"transparency": 0}, [255, 255, 255]),
        (Image.new("I;16", (20, 20), 32_896), "PNG", {}, [128, 128, 128]),
        (Image.new("I;16", (20, 20), 65_535), "TIFF", {}, [255, 255, 255]),
        (Image.new("I;16", (20, 20), 100), "TIFF", {}, [0, 0, 0]),
        (Image.new("I", (20, 20), 257 * 40), "TIFF", {}, [40, 40, 40]),
        (Image.new("RGBA", (20, 20), (10, 20, 30, 255)), "TIFF", {}, [10, 20, 30]),
    ],
)
def test_pixel_modes(image: Image.Image, form: str, options: dict[str, Any], expected: list[int]) -> None:
    assert only_colour(encode(image, form, **options)) == expected


def test_16_bit_png_of_every_kind() -> None:
    assert only_colour(png(20, 20, 16, 0, struct.pack(">H", 257 * 9) * 20)) == [9, 9, 9]
    assert only_colour(png(20, 20, 16, 2, struct.pack(">HHH", 257, 514, 65_535) * 20)) == [1, 2, 255]
    assert only_colour(png(20, 20, 16, 4, struct.pack(">HH", 0, 0) * 20)) == [255, 255, 255]
    assert only_colour(png(20, 20, 16, 6, struct.pack(">HHHH", 0, 0, 65_535, 65_535) * 20)) == [0, 0, 255]
    clear = (b"tRNS", struct.pack(">H", 257 * 9))
    assert only_colour(png(20, 20, 16, 0, struct.pack(">H", 257 * 9) * 20, clear)) == [255, 255, 255]


def test_cmyk_jpegs_are_not_inverted() -> None:
    image = photograph()
    data = encode(image.convert("CMYK"), "JPEG", quality=95)  # Pillow writes Adobe's inverted form
    assert b"Adobe" in data
    assert np.abs(np.subtract(np.asarray(open_rgb(data).image, int), np.asarray(image, int))).mean() < 6


def test_animations_give_their_first_frame_and_cameras_double_jpegs_their_first_picture() -> None:
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    for form in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        data = encode(
            first, form, save_all=True, append_images=[second], **({"lossless": True} if form == "WEBP" else {})
        )
        decoded = decode_image(data, preprocess(16))
        assert decoded.format == form.replace("MPO", "JPEG")
        assert np.abs(decoded.pixels.astype(int) - (255, 0, 0)).max() < 3


def test_every_reason() -> None:
    image = photograph()
    assert refusal(b"").reason == "empty"
    for data in (b"<html>not found</html>", b"\0" * 900, b"%PDF-1.4", encode(image, "ICO"), encode(image, "PPM")):
        assert refusal(data).reason == "not-an-image"
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(image, form)
        assert refusal(data[: len(data) // 2]).reason == "truncated", form
        assert refusal(data[:12]).reason in ("truncated", "corrupt"), form
    damaged = bytearray(encode(image, "PNG"))
    damaged[60] ^= 255
    assert refusal(bytes(damaged)).reason in ("corrupt", "truncated")
    assert refusal(encode(Image.new("F", (20, 20)), "TIFF")).reason == "unsupported"
    assert refusal(encode(Image.new("I", (20, 20), 70_000), "TIFF")).reason == "unsupported"
    assert refusal(encode(Image.new("LAB", (20, 20)), "TIFF")).reason == "unsupported"


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(encode(photograph(100, 100), "PNG"), max_pixels=9_999).reason == "too-large"
    # 30,000 x 30,000 pixels in the header, none behind it.
    assert refusal(png(30_000, 30_000, 8, 2, b"")).reason == "too-large"
    assert refusal(png(10_000, 10_000, 8, 0, b""), max_pixels=10**7).reason == "too-large"
    strip = refusal(encode(Image.new("L", (1, 4_000)), "PNG"), max_pixels=1_000_000)
    assert strip.reason == "too-large"
    assert "64 x 256000" in strip.detail
    data = encode(photograph(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 80 - 1)  # from here to twice as many Pillow only warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, preprocess()).width == 96


def test_a_palette_png_without_its_palette_is_a_reason() -> None:
    """71 bytes that end in an AssertionError of Pillow, raised when the colours are asked for and not before."""
    found = refusal(png(20, 20, 8, 3, bytes(20)))
    assert (found.reason, found.detail) == ("corrupt", "AssertionError")


@pytest.mark.parametrize("step", ["open", "load", "getexif", "convert", "resize", "crop"])
def test_whatever_is_raised_on_the_way_is_a_reason_but_for_memory(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged EXIF alone is no reason: the picture is whole. Memory that runs out is not the image's fault."""
    data = encode(photograph().convert("RGBA"), "PNG")

    def raising(error: BaseException) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise error

        return call

    owner = Image if step == "open" else Image.Image
    for error in (AssertionError("not so"), RecursionError("too deep"), SystemError("tile")):
        monkeypatch.setattr(owner, step, raising(error))
        if step == "getexif":
            assert decode_image(data, preprocess()).width == 96
        else:
            assert refusal(data).detail == f"{type(error).__name__}: {error}"
    for beyond in (MemoryError(), KeyboardInterrupt()):
        monkeypatch.setattr(owner, step, raising(beyond))
        with pytest.raises(type(beyond)):
            decode_image(data, preprocess())

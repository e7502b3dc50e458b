"""Decode bytes to the uint8 pixels that a CLIP model's own image processor makes, or say why not.

Pixels are those of transformers' Pillow-backed CLIP processor to the last bit, unless they are to be resized fast
(`saecore.images.preprocess`). What that processor does not define is decided here: EXIF rotation is applied, as viewers do;
alpha is composed on white; 16-bit grey is scaled to 8 bits (Pillow would saturate it); an animation gives its first frame.

Reasons, short and stable; the detail has the rest:

    empty           no bytes at all
    not-an-image    its first bytes are those of no JPEG, PNG, WebP, GIF, BMP or TIFF
    truncated       the end is missing
    corrupt         it begins as one of them and cannot be decoded; the detail is what the decoder raised
    unsupported     pixels without a defined way to 8-bit RGB (floating point, 32-bit integers, CIE Lab)
    too-large       more pixels than allowed, as stored or as resized; refused before anything is decoded
    too-complex     more metadata, segments, scans or strips than any picture has: minutes of work (`saecore.images.effort`)

Only MemoryError is raised as it is: it is a fault of the machine, not of the image. Large images take turns, so that several
at once do not need more memory than there is (`saecore.images.turns`).

Left out: normalisation (the tower does it on its device), and faster decoders. Of a JPEG that takes Pillow 0.70 ms, the fastest
(libjpeg-turbo by itself) takes 0.64 ms: Pillow's own is the same library.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from saecore.images import effort, turns
from saecore.images.effort import MAX_PIXELS
from saecore.images.preprocess import Preprocess, Resize, see

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are decoded: no other plug-in of Pillow sees the bytes."""

STRIP_PIXELS = 1 << 20
"""Pixels that are composed on white, or scaled to 8 bits, at once: a whole image would be held in four copies."""

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class ImageError(Exception):
    """An image is refused: `reason` is one of the table above, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Opened(NamedTuple):
    """A decoded image as a viewer shows it."""

    image: Image.Image
    """RGB, rotated."""
    format: str
    """One of `FORMATS`."""


class Decoded(NamedTuple):
    """What CLIP sees of an image."""

    pixels: np.ndarray
    """uint8 (height, width, 3)."""
    width: int
    """Width of the decoded image, in pixels."""
    height: int
    format: str
    crop: tuple[int, int, int, int]
    """(left, top, right, bottom) of the area that CLIP sees, in pixels of the decoded image, see `preprocess.Seen`."""


def open_rgb(
    data: bytes, max_pixels: int = MAX_PIXELS, begin: Callable[[str, int], object] = lambda form, pixels: None
) -> Opened:
    """Decode to RGB; whatever the bytes are, only ImageError and MemoryError are raised.

    `begin` is called once the header is read and before a pixel is decoded, with the format and the number of pixels.
    """
    return Opened(*_open(data, _rgb, max_pixels, begin))


def open_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask as a picture whose pixels are foreground unless they are zero, bool (height, width); raises as `open_rgb` does.

    Zero is the first colour of a palette, black, or transparent.
    """
    return _open(data, _foreground, max_pixels, lambda form, pixels: None)[0]


def _open(
    data: bytes, convert: Callable[[Image.Image], T], max_pixels: int, begin: Callable[[str, int], object]
) -> tuple[T, str]:
    """What `convert` makes of the decoded image, which is rotated and in a mode of its own, and the image's format."""
    if not data:
        raise ImageError("empty", "0 bytes")
    with _refusing(data), warnings.catch_warnings():
        # Pillow warns of damaged metadata, and of sizes, which are judged here. One thread at a time: the list of ignored
        # warnings belongs to the process.
        warnings.simplefilter("ignore")
        effort.check(data)
        file = effort.Reader(data)
        image = Image.open(file, formats=FORMATS)
        file.is_opening = False
        _check_size(image.width, image.height, max_pixels)
        # A JPEG that is followed by further pictures, as many cameras write it, is MPO to Pillow.
        form = "JPEG" if image.format == "MPO" else str(image.format)
        begin(form, image.width * image.height)
        image.load()
        return convert(_upright(image)), form


@contextmanager
def _refusing(data: bytes) -> Iterator[None]:
    """Whatever is raised inside is the reason why this image is refused.

    Pillow raises whatever its plug-ins meet, AssertionError included, so no list of exceptions would be complete.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except effort.EffortError as error:
        raise ImageError("too-complex", str(error)) from error
    except Image.DecompressionBombError as error:
        raise ImageError("too-large", str(error)) from error
    except Exception as error:
        raise _refusal(data, error) from error


def _refusal(data: bytes, error: Exception) -> ImageError:
    if isinstance(error, UnidentifiedImageError):
        if not data.startswith(_SIGNATURES):
            return ImageError("not-an-image", f"{len(data)} bytes starting with {data[:8]!r}")
        text = f"the header is damaged or cut, {len(data)} bytes in all"
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    # libwebp does not say that a file is cut; the second word of the file is its size.
    short = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")
    cut = short or isinstance(error, EOFError) or "truncated" in text.lower() or "unexpected end" in text.lower()
    return ImageError("truncated" if cut else "corrupt", text)


def decode_image(
    data: bytes, preprocess: Preprocess, max_pixels: int = MAX_PIXELS, resize: Resize = "exact"
) -> Decoded:
    """Decode, resize and crop; raises as `open_rgb` does. Large images take turns with other processes (`turns`)."""
    with ExitStack() as held:
        image, form = open_rgb(data, max_pixels, lambda form, pixels: held.enter_context(turns.turn(form, pixels)))
        _check_size(*preprocess.resized(*image.size), max_pixels)  # 1 x 4,000 pixels become 224 x 896,000
        # What the fast way raises is no fault of the image, as where its package is missing on one machine of a cluster.
        with _refusing(data) if resize == "exact" else nullcontext():
            seen = see(image, preprocess, resize)
        return Decoded(seen.pixels, image.width, image.height, form, seen.crop)


def blank() -> bytes:
    """A PNG of one white pixel."""
    sink = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(sink, "PNG")
    return sink.getvalue()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError("too-large", f"{width} x {height} pixels, {max_pixels} are allowed")


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except (effort.EffortError, MemoryError):
        raise
    except Exception:
        return image  # the metadata is damaged and the picture is not: it is taken without rotation, as viewers do
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info  # holds the transparent colour
    return turned


# EXIF orientation -> the operation that undoes it.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode that Pillow decodes, in RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in ("F", "LAB"):
        raise ImageError("unsupported", f"{image.mode} pixels")
    return _in_strips(image, _on_white) if image.has_transparency_data else image.convert("RGB")


def _foreground(image: Image.Image) -> np.ndarray:
    """Which pixels of an image are not zero, bool (height, width); alpha is no colour, and hides the pixels where it is 0."""
    values = np.atleast_3d(np.asarray(image)) != 0
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        values = values[..., :-1] & values[..., -1:]
    return np.asarray(values.any(axis=-1))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` of the whole image, strip by strip. It must treat each pixel on its own."""
    made = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        made.paste(convert(strip), (0, top))
    return made


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Rows of an image, few at a time, and where they begin."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height))), top


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of 32 that hold no more. Pillow would saturate; 65,535 is 255 x 257."""
    extrema = [(values.min(), values.max()) for values in (np.asarray(strip) for strip, _ in _strips(image))]
    least, most = min(low for low, _ in extrema), max(high for _, high in extrema)
    if least < 0 or most > 65_535:
        raise ImageError("unsupported", f"{image.mode} pixels from {least} to {most}")
    clear = image.info.get("transparency")

    def scaled(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip)
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if not isinstance(clear, int):
            return grey.convert("RGB")
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        return _on_white(grey)

    return _in_strips(image, scaled)


def _on_white(image: Image.Image) -> Image.Image:
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture).convert("RGB")

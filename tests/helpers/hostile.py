"""Files that a collection from the web may hold, each with what must become of it, and random mutations of real files.

    corpus()                            name -> (bytes, the reasons that may stand in its row; None is a decoded image)
    python -m tests.helpers.hostile N   decodes N mutations in a process of its own, and prints what came of them as JSON

Left out: damaged shards (`tests/images/test_chunks.py`) and metadata without end (`tests/images/test_effort.py`).
"""

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import skimage
from PIL import Image

from saecore.images.decode import ImageError, decode_image
from saecore.images.preprocess import Preprocess

FINE = frozenset({None})
NO_IMAGE = frozenset({"not-an-image"})
DAMAGED = frozenset({"truncated", "corrupt"})
TOO_LARGE = frozenset({"too-large"})
UNSUPPORTED = frozenset({"unsupported"})

Expected = frozenset[str | None]

DATA = Path(skimage.__file__).parent / "data"
SLOWEST = 5.0
"""Seconds that no file may take."""


@cache
def photograph(width: int = 96, height: int = 80) -> Image.Image:
    """A real one, small."""
    with Image.open(DATA / "astronaut.png") as image:
        return image.convert("RGB").resize((width, height))


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """As Pillow writes it."""
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of equal rows, of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + row) * height)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def turned(orientation: int) -> bytes:
    """A JPEG whose EXIF says how it is to be turned; 1 to 8 are defined."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(photograph(), "JPEG", exif=exif)


def cut(data: bytes, tenths: int) -> bytes:
    """The first tenths of a file."""
    return data[: len(data) * tenths // 10]


def gif_header(width: int, height: int) -> bytes:
    """A GIF of this size whose picture is missing."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + b",\0\0\0\0"
        + struct.pack("<HHBB", width, height, 0, 8)
    )


def tiff(width: int, height: int, **more: int) -> bytes:
    """A TIFF of this size with one strip of eight bytes; `more` names further tags by number, as `tag_320=5`."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 278: height, 279: 8}
    tags |= {int(name.removeprefix("tag_")): value for name, value in more.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def circular_tiff() -> bytes:
    """A TIFF whose next directory is its first one."""
    return tiff(2, 4)[:-4] + struct.pack("<I", 16)


def vp8l(width: int, height: int) -> bytes:
    """The header of a lossless WebP."""
    size = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + size + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def mpo() -> bytes:
    """As cameras write it: two JPEGs in one file."""
    return encode(photograph(), "MPO", save_all=True, append_images=[photograph().rotate(90)])


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe segment says that its colours are YCCK."""
    data = encode(photograph().convert("CMYK"), "JPEG")
    place = data.index(b"Adobe")
    return data[: place + 11] + b"\x02" + data[place + 12 :]


@cache
def corpus() -> dict[str, tuple[bytes, Expected]]:
    """Name -> the file, and what may become of it."""
    image, still = photograph(), encode(photograph(), "JPEG")
    picture, clear = encode(image, "PNG"), image.convert("RGBA")
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    icon = encode(image, "JPEG2000")
    files: dict[str, tuple[bytes, Expected]] = {}
    for tenth in range(1, 10):
        files[f"jpeg-cut-{tenth}.jpg"] = cut(still, tenth), DAMAGED
        files[f"png-cut-{tenth}.png"] = cut(picture, tenth), DAMAGED
    for orientation in (*range(10), 65_535):
        files[f"orientation-{orientation}.jpg"] = turned(orientation), FINE
    return files | {
        "nothing.jpg": (b"", frozenset({"empty"})),
        "one-byte.jpg": (b"\xff", NO_IMAGE),
        "signature-only.png": (picture[:8], DAMAGED),
        "zeros.jpg": (bytes(5000), NO_IMAGE),
        "png-called.jpg": (picture, FINE),
        "gif-called.png": (encode(image, "GIF"), FINE),
        "webp-called.jpg": (encode(image, "WEBP"), FINE),
        "tiff-called.jpg": (encode(image, "TIFF"), FINE),
        "bomb.png": (png(30_000, 30_000, 8, 2, b""), TOO_LARGE),
        "bomb.gif": (gif_header(65_535, 65_535), TOO_LARGE),
        "bomb.tiff": (tiff(60_000, 60_000), TOO_LARGE),
        "bomb.webp": (vp8l(16_383, 16_383), TOO_LARGE),
        "bomb.bmp": (
            b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
            TOO_LARGE,
        ),
        "one-pixel.png": (encode(Image.new("RGB", (1, 1)), "PNG"), FINE),
        "thread.png": (encode(Image.new("L", (1, 20_000)), "PNG"), TOO_LARGE),
        "wire.png": (encode(Image.new("L", (20_000, 1)), "PNG"), TOO_LARGE),
        "no-width.png": (png(0, 10, 8, 0, b""), DAMAGED),
        "text-bomb.png": (
            png(20, 20, 8, 0, bytes(20), (b"zTXt", b"key\0\0" + zlib.compress(bytes(80 << 20)))),
            DAMAGED | FINE,
        ),
        "profile-bomb.png": (
            png(20, 20, 8, 0, bytes(20), (b"iCCP", b"name\0\0" + zlib.compress(bytes(80 << 20)))),
            DAMAGED | FINE,
        ),
        "pixels-bomb.png": (
            png(20, 20, 8, 0, bytes(20)).replace(
                chunk(b"IDAT", zlib.compress(bytes(21 * 20))), chunk(b"IDAT", zlib.compress(bytes(80 << 20)))
            ),
            DAMAGED | FINE,
        ),
        "much-exif.jpg": (encode(image, "JPEG", exif=b"Exif\0\0" + bytes(65_000)), FINE),
        "exif-of-noise.jpg": (encode(image, "JPEG", exif=b"Exif\0\0MM\0*" + bytes(range(250))), FINE),
        "cmyk.jpg": (encode(image.convert("CMYK"), "JPEG"), FINE),
        "ycck.jpg": (ycck(), FINE),
        "grey.jpg": (encode(image.convert("L"), "JPEG"), FINE),
        "progressive.jpg": (encode(image, "JPEG", progressive=True), FINE),
        "tail.jpg": (still + b"<?php system('id'); ?>" * 100, FINE),
        "twice.jpg": (still + still, FINE),
        "two-pictures.jpg": (mpo(), FINE),
        "head.jpg": (b"\n" + still, NO_IMAGE),
        "grey-16.png": (encode(Image.new("I;16", (45, 40), 500), "PNG"), FINE),
        "grey-16.tiff": (encode(Image.new("I;16", (45, 40), 500), "TIFF"), FINE),
        "colour-16.png": (png(20, 20, 16, 2, struct.pack(">HHH", 257, 514, 65_535) * 20), FINE),
        "float.tiff": (encode(Image.new("F", (20, 20)), "TIFF"), UNSUPPORTED),
        "integers.tiff": (encode(Image.new("I", (20, 20), 70_000), "TIFF"), UNSUPPORTED),
        "lab.tiff": (encode(Image.new("LAB", (20, 20)), "TIFF"), UNSUPPORTED),
        "group-4.tiff": (encode(image.convert("1"), "TIFF", compression="group4"), FINE),
        "circular.tiff": (circular_tiff(), FINE),
        "strip-of-nowhere.tiff": (tiff(64, 64, tag_273=1 << 31), DAMAGED),
        "palette.png": (encode(image.convert("P"), "PNG"), FINE),
        "palette-clear.png": (encode(image.convert("P"), "PNG", transparency=3), FINE),
        "palette-missing.png": (png(20, 20, 8, 3, bytes(20)), DAMAGED),
        "black-and-white.png": (encode(image.convert("1"), "PNG"), FINE),
        "clear.png": (encode(clear, "PNG"), FINE),
        "clear-grey.png": (encode(image.convert("LA"), "PNG"), FINE),
        "clear.webp": (encode(clear, "WEBP", lossless=True), FINE),
        "moving.gif": (encode(image, "GIF", **frames), FINE),
        "moving.webp": (encode(image, "WEBP", **frames), FINE),
        "moving.png": (encode(image, "PNG", **frames), FINE),
        "checksum.png": (picture[:60] + bytes([picture[60] ^ 255]) + picture[61:], DAMAGED),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", NO_IMAGE),
        "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>', NO_IMAGE),
        "refused-by-the-store.png": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", NO_IMAGE),
        "answer.jpg": (b'{"error": "rate limit"}', NO_IMAGE),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", NO_IMAGE),
        "document.jpg": (b"%PDF-1.7\n", NO_IMAGE),
        "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n(id) run\n", NO_IMAGE),
        "archive.png": (b"PK\3\4" + bytes(100), NO_IMAGE),
        "elf.png": (b"\x7fELF" + bytes(100), NO_IMAGE),
        "film.jpg": (b"\0\0\0\x18ftypmp42" + bytes(100), NO_IMAGE),
        "apple.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), NO_IMAGE),
        "avif.jpg": (encode(image, "AVIF"), NO_IMAGE),
        "jpeg-2000.jpg": (icon, NO_IMAGE),
        "icon.png": (encode(image, "ICO"), NO_IMAGE),
        "plain.bmp": (encode(image, "PPM"), NO_IMAGE),
        "targa.bmp": (encode(image, "TGA"), NO_IMAGE),
        "photoshop.tiff": (b"8BPS\0\1" + bytes(100), NO_IMAGE),
        "sound.webp": (b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28), DAMAGED),
        "upside-down.bmp": (upside_down(encode(image, "BMP")), FINE),
        "packed.bmp": (encode(image.convert("P"), "BMP"), FINE),
    }


def upside_down(data: bytes) -> bytes:
    """A BMP whose height is negative: its rows come from the top."""
    (height,) = struct.unpack_from("<i", data, 22)
    return data[:22] + struct.pack("<i", -height) + data[26:]


NAMES = [
    "../../outside.jpg",
    "/absolute.jpg",
    "..\\windows.jpg",
    "C:\\drive.jpg",
    "two\nlines.jpg",
    "tab\there.jpg",
    "bell\x07\x1b[31m.jpg",
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(2)>.jpg',
    "'; DROP TABLE images; --.jpg",
    "\U0001f600 smile.jpg",
    "\u202egpj.exe.jpg",
    "e\u0301 and \u00e9.jpg",
    "--out.jpg",
    "$(id) `id`.jpg",
    "%2e%2e%2fencoded.jpg",
    "long" * 60 + ".jpg",
    "same.jpg",
    "same.jpg",
]
"""What images may be called in a tar or a Parquet file."""


# ---- Mutations.


def seeds() -> list[bytes]:
    """Small real files, and small files of kinds that there are no real ones of."""
    image, exif = photograph(48, 40), Image.Exif()
    exif[0x112] = 6
    names = (
        "multipage_rgb.tif",
        "microaneurysms.png",
        "no_time_for_that_tiny.gif",
        "chessboard_RGB.png",
        "phantom.png",
    )
    return [
        *((DATA / name).read_bytes() for name in names),
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "PNG", exif=exif),
        encode(image.convert("P"), "PNG", transparency=3),
        png(20, 20, 8, 3, bytes(20), (b"PLTE", bytes(30))),
        png(20, 20, 8, 3, bytes(20), (b"PLTE", bytes(30)), (b"tRNS", bytes(5))),
        encode(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        encode(Image.new("I;16", (45, 40), 500), "PNG"),
        encode(image.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        encode(image, "WEBP"),
        encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        encode(image, "BMP"),
        encode(image.convert("P"), "BMP"),
        encode(image, "TIFF"),
        encode(image.convert("1"), "TIFF", compression="group4"),
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(image, "TIFF", compression="jpeg"),
    ]


def mended(data: bytes) -> bytes:
    """A PNG with the checksum of every chunk put right: decoders go by content and not by checksum then."""
    whole, at = bytearray(data), 8
    while at + 12 <= len(whole):
        end = at + 8 + int.from_bytes(whole[at : at + 4], "big")
        if end + 4 <= len(whole):
            whole[end : end + 4] = struct.pack(">I", zlib.crc32(whole[at + 4 : end]))
        at = end + 4
    return bytes(whole)


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """Cut files, flipped bits, pieces that are doubled or moved; half of the PNGs with their checksums mended."""
    generator, whole = random.Random(seed), seeds()
    for _ in range(count):
        data = bytearray(generator.choice(whole))
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        if len(data) > 8 and generator.random() < 0.1:
            start, end = sorted(generator.randrange(len(data)) for _ in range(2))
            piece, place = data[start:end], generator.randrange(len(data))
            data[place:place] = piece
        reach = len(data) if generator.random() < 0.5 else min(len(data), 100)
        for _ in range(generator.choice([0, 1, 2, 5, 20]) if reach else 0):
            data[generator.randrange(reach)] ^= 1 << generator.randrange(8)
        yield mended(bytes(data)) if data[:4] == b"\x89PNG" and generator.random() < 0.5 else bytes(data)


def decode_all(count: int, seed: int) -> dict[str, Any]:
    """What comes of so many mutations; raises whatever is no `ImageError`."""
    preprocess = Preprocess.from_config({"size": 16, "crop_size": 16})
    outcomes, slowest = Counter[str](), 0.0
    decode_image(encode(photograph(), "PNG"), preprocess, resize="fast")  # what is loaded once is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in mutations(count, seed):
        started = time.perf_counter()
        try:
            assert decode_image(data, preprocess, max_pixels=1_000_000, resize="fast").pixels.shape == (16, 16, 3)
            outcomes["decoded"] += 1
        except ImageError as error:
            outcomes[error.reason if error.detail else "no detail"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"outcomes": outcomes, "slowest": slowest, "megabytes": more / 1024}


if __name__ == "__main__":
    print(json.dumps(decode_all(int(sys.argv[1]), 7)))

"""What no picture has is refused in a moment; what pictures have, and much of it, is decoded."""

import struct
from collections.abc import Callable

import pytest
from PIL import Image

from saecore.images import effort
from saecore.images.decode import open_rgb
from tests.helpers.hostile import chunk, encode, photograph
from tests.images.test_decode import refusal


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def put(data: bytes, place: int, content: bytes, size: int) -> bytes:
    """`data` with `size` bytes of a repeated content at a place."""
    return data[:place] + content * (size // len(content)) + data[place:]


def tiff_of_strips(count: int) -> bytes:
    """A TIFF of one column, every row of it the same one-byte strip."""
    tags = {256: (3, 1, 1), 257: (4, 1, count), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 278: (4, 1, 1)}
    tags |= {273: (4, count, 8), 279: (4, count, 8 + 4 * count)}
    entries = b"".join(struct.pack("<HHII", tag, *values) for tag, values in sorted(tags.items()))
    strips = struct.pack("<I", 8) * count + struct.pack("<I", 1) * count
    return b"II*\0" + struct.pack("<I", 8 + 8 * count) + strips + struct.pack("<H", len(tags)) + entries + bytes(4)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = encode(Image.new("L", (64, 64), 77), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: put(encode(photograph(), "JPEG"), 2, segment(0xE1, b"Exif\0\0" + bytes(65_000)), 40_000_000),
        lambda: put(encode(photograph(), "JPEG"), 2, segment(0xFE, b""), 4_000_000),
        lambda: put(encode(photograph(), "JPEG"), 2, b"\xff", 4_000_000),
        lambda: put(encode(photograph(), "JPEG"), 20, segment(0xDD, b"\0\0"), 4_000_000),
        lambda: put(encode(photograph(), "PNG"), 33, chunk(b"prVt", b""), 4_000_000),
        lambda: put(encode(photograph(), "PNG"), 33, chunk(b"tEXt", b"key\0value"), 4_000_000),
        lambda: put(encode(photograph(), "PNG"), -12, chunk(b"iTXt", b"key\0\0\0\0\0value"), 4_000_000),
        lambda: put(encode(photograph(), "GIF"), 781, b"!\xfe\x01x\0", 4_000_000),
        lambda: scans(effort.MAX_SCANS),
        lambda: tiff_of_strips(effort.MAX_STRIPS + 1),
    ],
    ids=["exif", "comments", "fill", "DRI", "chunks", "tEXt", "iTXt", "gif", "scans", "strips"],
)
def test_metadata_without_end_is_refused(make: Callable[[], bytes]) -> None:
    assert refusal(make()).reason == "too-complex"


def test_much_metadata_is_not_too_much() -> None:
    jpeg, exif = encode(photograph(), "JPEG"), Image.Exif()
    exif[0x112] = 6
    turned = encode(photograph(), "JPEG", exif=exif)
    assert open_rgb(put(turned, -2, segment(0xE2, bytes(65_000)), 20_000_000)).image.size == (80, 96)
    assert open_rgb(put(jpeg, 2, segment(0xE2, bytes(65_000)), 20_000_000)).image.size == (96, 80)
    assert open_rgb(put(jpeg, len(jpeg), b"\xff\xda", 1_000_000)).image.size == (96, 80)  # a film behind the photograph
    assert open_rgb(put(encode(photograph(), "PNG"), 33, chunk(b"prVt", bytes(50)), 500_000)).image.size == (96, 80)
    assert open_rgb(scans(100)).image.size == (64, 64)
    assert open_rgb(tiff_of_strips(5_000)).image.size == (1, 5_000)

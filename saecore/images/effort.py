"""Bound the work that an image file may ask of its decoder, so that no file of a few megabytes takes minutes.

Pillow goes through metadata piece by piece, in Python; a decoder goes through all pixels once for every scan of a JPEG. Both
are bounded here, far above what pictures have. Measured with Pillow 13 without these bounds:

    52 MB of Exif segments in a JPEG, which Pillow joins one by one     7 s, and rising faster than their size
    empty segments of a JPEG, or chunks of a PNG                        0.2 s a megabyte
    a TIFF of strips of one byte                                        0.2 s a megabyte, and 37 times its size in memory
    a progressive JPEG of 16 million pixels                             0.006 s a scan, and a scan takes 31 bytes

WebP and BMP need no bound. `saecore.images.decode` compares the number of pixels with MAX_PIXELS.
"""

import io
import re
import struct

MAX_PIXELS = 178_000_000
"""Pixels of an image, as stored or as resized: Pillow refuses more than 178,956,970 whatever it is told."""

MAX_READS = 1 << 18
"""Reads of a file that Pillow may make; for large files one for each 256 bytes. A PNG takes about 5 for 8 KiB of pixels."""

MAX_JPEG_HEADER = 24 << 20
"""Bytes of a JPEG before its first scan: profiles, previews, editing histories."""

MAX_SCANS = 256
"""Scans of a JPEG; encoders write about ten."""

MAX_SEGMENTS = 1 << 18
"""Segments of a JPEG that are visited to count its scans."""

MAX_STRIPS = 1 << 16
"""Strips or tiles of a TIFF; for large files one for each 1,024 bytes."""

# Markers of segments: a length follows, and so many bytes up to the next marker. Within a scan decoders stop at other markers.
_SEGMENTS = frozenset({*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE}) - {0xC8}
_SOS = 0xDA
# D0 to D7 stand between the pixels of a scan. Searching for a pattern that begins with one byte is ten times faster than \xff+.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")

_STRIP_TAGS = (273, 324)
"""StripOffsets, TileOffsets."""


class EffortError(Exception):
    """A file that asks for more than any picture needs."""


class Reader(io.BytesIO):
    """A file in memory that raises EffortError when it is read too often, or too far while `is_opening`."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.is_opening = data.startswith(b"\xff\xd8")
        """Whether the header of a JPEG is being read; other formats do not need this bound."""
        self._reads_left = max(MAX_READS, len(data) >> 8)

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file."""
        self._reads_left -= 1
        if self._reads_left < 0:
            raise EffortError("made of more pieces than any picture: metadata without end")
        if self.is_opening and self.tell() > MAX_JPEG_HEADER:
            raise EffortError(f"more than {MAX_JPEG_HEADER} bytes before the first pixel")
        return super().read(size)


def check(data: bytes) -> None:
    """EffortError for a JPEG of too many scans or a TIFF of too many strips; cheap, and silent about any other file."""
    if data.startswith(b"\xff\xd8"):
        _check_scans(data)
    elif data.startswith((b"II", b"MM")):
        _check_strips(data)


def _check_scans(data: bytes) -> None:
    at = scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or (scans and marker[1][0] not in _SEGMENTS):
            return  # the end of the file, or a marker at which decoders stop
        at = marker.end()
        if marker[1][0] in _SEGMENTS:
            at += int.from_bytes(data[at : at + 2], "big")
            scans += marker[1][0] == _SOS
        if scans > MAX_SCANS:
            raise EffortError(f"a JPEG of more than {MAX_SCANS} scans")
    raise EffortError(f"a JPEG of more than {MAX_SEGMENTS} segments")


def _check_strips(data: bytes) -> None:
    order, is_big = "<" if data[:1] == b"I" else ">", data[2:4] in (b"+\0", b"\0+")
    head, count, entry = ("Q", "Q", "HHQ") if is_big else ("I", "H", "HHI")
    step = 20 if is_big else 12
    try:
        (at,) = struct.unpack_from(order + head, data, 8 if is_big else 4)
        (n_tags,) = struct.unpack_from(order + count, data, at)
        at += struct.calcsize(order + count)
        for place in range(at, min(at + n_tags * step, len(data)), step):
            tag, _, n_values = struct.unpack_from(order + entry, data, place)
            if tag in _STRIP_TAGS and n_values > max(MAX_STRIPS, len(data) >> 10):
                raise EffortError(f"a TIFF of {n_values} strips or tiles")
    except struct.error:
        return  # the file is cut or damaged, and the decoder says so

"""Tar shards, plain or compressed by gzip: count their images, and read some of them.

Which members are images is decided by `saecore.images.listing`. A scan reads headers and seeks over the images; a compressed
tar it has to read through. To read a chunk is one seek, which in a compressed tar decompresses all that lies before.

Both stop at damage. The scan says what it is; an image that the end of the file cuts off is `truncated`.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa

from saecore.images.items import MAX_IMAGE_BYTES, READ_AHEAD, Item, Scan, read_item
from saecore.images.listing import EXTENSIONS, extension, is_hidden

HEADER_AHEAD = 4096
"""Bytes that are fetched at once from a local tar by whoever reads its headers and few of its images, or none."""

TRAILER_BYTES = 64 << 10
"""Bytes after the end of an archive in which a second one would begin: tar pads its end to 10 KiB."""

# What is raised for bytes that are no tar or no gzip, found by flipping bits. Other OSErrors come from the storage.
_BROKEN = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, OverflowError)


def read_ahead(is_local: bool, whole: bool) -> int:
    """How many bytes to fetch at once: few where most images of a local tar are passed over, many everywhere else."""
    return HEADER_AHEAD if is_local and not whole else READ_AHEAD


def scan(file: pa.NativeFile, ahead: int, chunk_size: int) -> Scan:
    """The images of a tar, where chunks of `chunk_size` of them begin, and the damage that ends it, if any."""
    images, offsets = 0, []
    try:
        stream = _uncompressed(file, ahead)
        tar = _open(stream)
        for member in _images(tar):
            if images % chunk_size == 0:
                offsets.append(member.offset)
            images += 1
        damage = _damage_at_end(stream, tar.offset)
    except _BROKEN as error:
        damage = f"{type(error).__name__}: {error}"
    return Scan(images, offsets, None, damage)


def read(file: pa.NativeFile, ahead: int, offset: int, start: int, wanted: Sequence[int]) -> Iterator[tuple[int, Item]]:
    """The wanted images of a tar whose image number `start` begins at byte `offset`."""
    remaining = iter(wanted)
    goal = next(remaining, None)
    try:
        stream = _uncompressed(file, ahead)
        stream.seek(offset)
        tar = _open(stream)
        for index, member in enumerate(_images(tar), start):
            if index == goal:
                yield index, _item(tar, member)
                goal = next(remaining, None)
            if goal is None:
                return
    except _BROKEN:
        return


def _item(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Item:
    content = tar.extractfile(member)
    assert content is not None, "regular files have content"
    try:
        return read_item(member.name, member.size, content.read)
    except _BROKEN as error:
        return Item(member.name, None, "truncated", f"{type(error).__name__}: {error}")


def _images(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that are images. tarfile would keep a list of all members; it is emptied on the way."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and extension(member.name) in EXTENSIONS and not is_hidden(member.name):
            yield member


def _damage_at_end(stream: IO[bytes], offset: int) -> str | None:
    """What is wrong where tarfile stopped.

    tarfile stops silently at a header that it cannot read, at the end of the file, and at the zeros that end an archive. Only
    after the zeros is nothing missing.
    """
    stream.seek(offset)
    trailer = stream.read(TRAILER_BYTES)
    if not trailer:
        return f"the file ends without an end of the archive at byte {offset}"
    if trailer[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"unreadable tar header at byte {offset}"
    return f"another archive or other data after the end at byte {offset}" if trailer.strip(b"\0") else None


def _open(stream: IO[bytes]) -> tarfile.TarFile:
    # Names need not be UTF-8, Arrow's strings must be.
    return tarfile.TarFile(fileobj=stream, mode="r", encoding="utf-8", errors="backslashreplace")


class _Stream(io.BufferedReader):
    """A damaged header can request terabytes in one read: reads above MAX_IMAGE_BYTES are refused."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_IMAGE_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _uncompressed(file: pa.NativeFile, ahead: int) -> IO[bytes]:
    stream = _Stream(file, ahead)
    # By content: servers unpack `.tar.gz` on the way, and people call a compressed tar `.tar`.
    is_gzip = stream.peek(2)[:2] == b"\x1f\x8b"
    return _Stream(gzip.GzipFile(fileobj=stream), READ_AHEAD) if is_gzip else stream

"""One image as it lies in a shard, and what a scan tells of a whole shard: what readers of tar, Parquet and folders return.

    scan    file -> Scan                              before the plan is made
    read    file, wanted -> (index, Item), ...        afterwards, of the images that are asked for

`index` is the place of an image in its shard, from 0, and `wanted` holds such places in rising order. A reader returns items in
that order and stops where it cannot go on; `saecore.images.chunks` says of the remaining ones that they are lost.
"""

from collections.abc import Callable
from typing import NamedTuple

MAX_IMAGE_BYTES = 1 << 30
"""Encoded bytes above which an image is not read: far more than any picture with the pixels that are allowed."""

READ_AHEAD = 1 << 20
"""Bytes that are fetched at once: few enough to waste little, and enough that an object store is not asked for every member."""


class Item(NamedTuple):
    """One image: its name, and its bytes or the reason why there are none."""

    key: str
    data: bytes | None
    error: str | None = None
    detail: str | None = None


class Scan(NamedTuple):
    """What one pass over a shard tells, without the images."""

    images: int
    offsets: list[int]
    """Tar: where the first member of each chunk begins, in uncompressed bytes."""
    column: str | None
    """Parquet: the column of encoded images."""
    damage: str | None
    """Why the shard's contents after its last image are not known, or None."""


def read_item(key: str, size: int, read: Callable[[int], bytes]) -> Item:
    """The image of `size` encoded bytes that `read` returns, unless it is too large."""
    if size > MAX_IMAGE_BYTES:
        return Item(key, None, "too-large", f"{size} bytes, {MAX_IMAGE_BYTES} are read")
    return Item(key, read(size))

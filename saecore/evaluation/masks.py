"""Masks that a user has of a run's images: read, cut to what the model saw, and paired with latents.

    a folder     `KEY.png`, or `KEY.LABEL.png` for each of several labels; KEY is the image's key without its ending
    a Parquet    columns `key`, `mask` (the bytes of a PNG) and, where there are several for an image, `label`

Each pixel that is not zero is foreground (`saecore.images.decode.open_mask`). A mask has the size of the image as viewers show
it, or of the crop that the model saw. Several rows of one image and label are parts of one mask. Images of the same key share
masks. `a.b.png` is the mask of an image `a.b` if there is one, or else of what is called b in image `a`.

A latent has no label. So for each label the latent is chosen that follows it best, by the area under the ROC curve of its
activation against the presence of the label, over one half of the images; places are judged on the other half, where the latent
fires and the image shows the label. A mask without a label is the foreground: every kept latent with a positive pre-activation
is judged against it, on all images, which asks only whether maps lie on what the picture is of.

An image without any labelled mask tells nothing about labels. An image with some shows no other label than these.

Left out: scores (`saecore.evaluation.localisation`); masks in other formats, such as run lengths and polygons.

Shapes: B images, K kept latents of each, L labels, P patches, m pairs of an image and a label that it shows.
"""

import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from saecore.evaluation.localisation import ON, Followers, follow, per_patch
from saecore.images.decode import ImageError, open_mask
from saecore.images.items import MAX_IMAGE_BYTES, READ_AHEAD
from saecore.images.listing import EXTENSIONS, extension, is_hidden
from saecore.images.parquet import ROWS_AT_ONCE, WatchedFile
from saecore.storage import Place, join_uri, split_settings
from saecore.untrusted import about, shown

FOREGROUND = ""
"""The label of masks without one."""


class Geometry(NamedTuple):
    """Where the model looked: the columns of the table `images`, in pixels of the image as viewers show it."""

    width: int
    height: int
    crop: tuple[int, int, int, int]
    """(left, top, right, bottom), which may reach over the edges of the image."""


class Source(NamedTuple):
    """A mask that can be read."""

    name: str
    """The file, and the row of a Parquet file, for sentences about it."""
    read: Callable[[], bytes]


class Masks:
    """The masks of some images. They are read when they are asked for."""

    def __init__(self, found: dict[str, dict[str, list[Source]]]) -> None:
        self._found = found

    def labels_of(self, key: str) -> list[str]:
        """The labels of an image's masks in the order of the alphabet; `FOREGROUND` if it has one without a label."""
        return sorted(self._found.get(stem(key), {}))

    def mask(self, key: str, label: str, geometry: Geometry, size: tuple[int, int]) -> np.ndarray | None:
        """What the model saw of a mask, bool (height, width) of `size`; None if there is none.

        Each pixel is the nearest of the mask; outside of the image nothing is foreground. ValueError, which names the file, if
        it cannot be read or is of another size than the image and the crop.
        """
        sources = self._found.get(stem(key), {}).get(label, [])
        parts = [_seen(source, geometry, size) for source in sources]
        return np.any(parts, axis=0) if parts else None


def stem(key: str) -> str:
    """The key of an image without the ending of an image file."""
    root, ending = posixpath.splitext(key)
    return root if ending.lower() in EXTENSIONS else key


def _seen(source: Source, geometry: Geometry, size: tuple[int, int]) -> np.ndarray:
    with about(source.name):
        data = source.read()
        if not data.startswith(b"\x89PNG"):
            raise ValueError("this mask is no PNG; other formats change pixels, or do not tell which are zero")
        try:
            stored = open_mask(data)
        except ImageError as error:
            raise ValueError(f"this mask cannot be read ({error})") from error
        left, top, right, bottom = geometry.crop
        height, width = stored.shape
        if (width, height) != (geometry.width, geometry.height):
            if (width, height) != (right - left, bottom - top):
                raise ValueError(
                    f"this mask has {width} x {height} pixels; expected {geometry.width} x {geometry.height} as the image, "
                    f"or {right - left} x {bottom - top} as the part of it that the model saw"
                )
            left, top, right, bottom = 0, 0, width, height
    rows, columns = _nearest(top, bottom, size[0]), _nearest(left, right, size[1])
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    cut: np.ndarray = stored[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
    return cut & inside


def _nearest(first: int, past: int, count: int) -> np.ndarray:
    """The pixels from `first` up to `past` in which the middles of `count` equal parts lie, int64 (count,)."""
    return first + (2 * np.arange(count) + 1) * (past - first) // (2 * count)


# ---- Where masks are.


def open_masks(address: str, keys: Iterable[str]) -> Masks:
    """The masks of the images with these keys, in a folder or a Parquet file on any file system.

    Masks of a folder are read when they are asked for, those of a Parquet file at once. ValueError if there is no such place,
    if it is of another kind or damaged, or if it has no mask of any of these images.
    """
    place, stems = Place(address), {stem(key): key for key in keys}
    info = place.info()
    if info.is_file and extension(split_settings(address)[0]) == ".parquet":
        named, called = _rows(address, place, stems.keys()), "the key {0}, or {1}"
    elif info.type == pyarrow.fs.FileType.Directory:
        named, called = _files(address, place, stems.keys()), "the name {0}.png, or {0}.LABEL.png"
    else:
        is_there = "is no folder of PNG files and no Parquet file" if info.is_file else "does not exist"
        raise ValueError(f"{address} {is_there}, so it holds no masks")
    found: dict[str, dict[str, list[Source]]] = {}
    for name, label, source in named:
        found.setdefault(name, {}).setdefault(label, []).append(source)
    if not found:
        first, key = next(iter(stems.items()), ("KEY", "KEY.jpg"))
        has = called.format(first, key)
        raise ValueError(f"{address} holds no mask of any of these images; that of {key} has {has}")
    return Masks(found)


def _files(address: str, place: Place, stems: Collection[str]) -> Iterator[tuple[str, str, Source]]:
    """(stem, label, source) of every PNG in a folder's tree that belongs to one of the images."""
    for info in place.entries(below=True):
        name = posixpath.relpath(info.path, place.path)
        if not info.is_file or is_hidden(name) or extension(name) != ".png":
            continue
        bare = name[: -len(".png")]
        root, _, label = bare.rpartition(".")
        if bare in stems:
            root, label = bare, FOREGROUND
        if root in stems:
            yield root, label, Source(join_uri(address, name), partial(_file, place, info))


def _file(place: Place, info: pyarrow.fs.FileInfo) -> bytes:
    _check_length(info.size)
    with place.open(info.path) as file:
        data: bytes = file.read()
    return data


def _rows(address: str, place: Place, stems: Collection[str]) -> Iterator[tuple[str, str, Source]]:
    """The same of a Parquet file."""
    row, held = 0, 0
    with place.open() as opened:
        file = WatchedFile(opened)
        try:
            parquet = pq.ParquetFile(file, buffer_size=READ_AHEAD, pre_buffer=False)
            names = parquet.schema_arrow.names
            if missing := [name for name in ("key", "mask") if name not in names]:
                raise ValueError(f"{address} has no column {missing[0]}; masks have key, mask and, if they like, label")
            columns = [name for name in ("key", "label", "mask") if name in names]
            # See `saecore.storage.table_of`.
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
                for values in batch.to_pylist():
                    name = f"{address}, row {row}"
                    with about(name):
                        key, label, data = stem(_text(values["key"], "key")), values.get("label"), values["mask"]
                        if key in stems:
                            data = data.get("bytes") if isinstance(data, dict) else data  # a picture of Hugging Face
                            if not isinstance(data, bytes):
                                raise ValueError(f"mask is {shown(data)}, expected the bytes of a PNG")
                            held += len(data)
                            _check_length(held)
                            named = FOREGROUND if label is None else _text(label, "label")
                            yield key, named, Source(name, partial(bytes, data))
                    row += 1
        except (OSError, pa.ArrowException) as error:
            if file.failed:
                raise
            raise ValueError(f"{address} cannot be read as Parquet: {' '.join(str(error).split())}") from error


def _text(value: Any, what: str) -> str:
    """A text, or a number as text, as the keys of images are (`saecore.images.parquet`)."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{what} is {shown(value)}, expected a text or a whole number")
    return str(value)


def _check_length(length: int) -> None:
    if length > MAX_IMAGE_BYTES:
        raise ValueError(f"masks of {length:,} bytes are not read; {MAX_IMAGE_BYTES:,} are allowed")


# ---- Pairs of an image and a label.


class Covered(NamedTuple):
    """What some images show of labels: m pairs of an image and a label, one a row."""

    labels: list[str]
    image: np.ndarray
    """int64 (m,): the number of the image."""
    label: np.ndarray
    """int64 (m,): the number of the label."""
    shares: np.ndarray
    """float32 (m, P): the share of each patch that is foreground; in each row some patch has one above 0."""
    known: np.ndarray
    """bool (B,): whether the image has any mask with a label, so that it tells about all labels."""

    def present(self) -> np.ndarray:
        """Whether an image shows a label, bool (B, L)."""
        there = np.zeros((len(self.known), len(self.labels)), bool)
        there[self.image, self.label] = True
        return there


def covered(
    masks: Masks,
    keys: Sequence[str],
    geometries: Sequence[Geometry],
    size: tuple[int, int],
    grid: tuple[int, int],
    patch: int,
) -> Covered:
    """The masks of B images on the patches of a tower that sees pictures of `size` (height, width).

    grid: the rows and columns of patches, each of `patch` x `patch` pixels; pixels at the edges that fill no patch do not
    count. A mask of which the model saw nothing is left out. ValueError as in `Masks.mask`.
    """
    of_images = [masks.labels_of(key) for key in keys]
    labels = sorted(set().union(*of_images))
    known = np.array([any(label != FOREGROUND for label in names) for names in of_images], bool)
    pairs, shares = list[tuple[int, int]](), list[np.ndarray]()
    for image, (key, geometry) in enumerate(zip(keys, geometries, strict=True)):
        for label in of_images[image]:
            mask = masks.mask(key, label, geometry, size)
            assert mask is not None
            share = per_patch(mask[None, : grid[0] * patch, : grid[1] * patch], grid)[0]
            if share.any():
                pairs.append((image, labels.index(label)))
                shares.append(share.astype(np.float32))
    images, numbers = np.array(pairs, np.int64).reshape(-1, 2).T
    return Covered(labels, images, numbers, np.array(shares, np.float32).reshape(-1, grid[0] * grid[1]), known)


def followers(found: Covered, latents: np.ndarray, activations: np.ndarray, chosen_by: np.ndarray) -> Followers:
    """The latents that follow the labels best on the images that `chosen_by`, bool (B,), marks; none follows `FOREGROUND`.

    latents (B, K) and activations (B, K) as `saecore.evaluation.localisation.follow` takes them.
    """
    rows = np.flatnonzero(chosen_by & found.known)
    present = found.present()[rows] & np.array([label != FOREGROUND for label in found.labels], bool)
    return follow(present, latents[rows], activations[rows])


class Cases(NamedTuple):
    """Kept latents whose object is known: the map of latent `rank` of image `image` is judged by `Covered.shares[pair]`."""

    image: np.ndarray
    rank: np.ndarray
    pair: np.ndarray


def cases(
    found: Covered, following: Followers, latents: np.ndarray, pre_activations: np.ndarray, measured: np.ndarray
) -> Cases:
    """Which kept latents (B, K) are judged against which pairs: those with a positive pre-activation (B, K), and a pair with a
    patch on the object (`localisation.ON`).

    Against a label: the latent that follows it, on the images that `measured`, bool (B,), marks. Against the foreground: all,
    on all images.
    """
    of_label = np.array([label != FOREGROUND for label in found.labels], bool)[found.label][:, None]
    follows = np.equal(latents[found.image], following.latent[found.label][:, None])
    is_judged = np.where(of_label, follows & measured[found.image][:, None], True)
    is_shown = (found.shares >= ON).any(axis=-1, keepdims=True)
    pair, rank = np.nonzero(is_judged & is_shown & (pre_activations[found.image] > 0))
    return Cases(found.image[pair], rank, pair)

"""Embeddings as MSAE's training reads them: a raw float32 memory map whose file name says its shape.

    {name}_{clip}_{split}_{image|text}_{N}_{d}.npy      with "/" of the CLIP's id as "~"

It has no npy header, whatever its name says: `np.load` fails on it. `np.memmap(path, np.float32, "r").reshape(N, d)` reads
it. Readers take the shape from the last two fields alone, so that the others may hold underscores. A trap of MSAE's own
reader: a path with "repr" anywhere in it is taken for SAE activations.

Left out: object stores, where nothing can be mapped into memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from saecore.runs.files import scan_table
from saecore.storage import atomic_file, writing


def file_name(name: str, clip: str, split: str, kind: str, shape: tuple[int, int]) -> str:
    """`kind` is `image` or `text`. A CLIP that is a folder goes by the folder's name."""
    model = Path(clip).resolve().name if Path(clip).exists() else clip.replace("/", "~")
    return "_".join([name, model, split, kind, *map(str, shape)]) + ".npy"


def image_rows(uri: str) -> Iterator[np.ndarray]:
    """The embeddings of a complete run, some rows at a time: images that were not refused, in the order of image_id."""
    for batch in scan_table(uri, "images", ["embedding"]):
        rows = batch["embedding"].drop_null()
        if len(rows):
            yield rows.flatten().to_numpy().reshape(len(rows), -1)


def write(target: Path, rows: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """Rows, in pieces, to a file of `shape` that appears whole or not at all."""
    written = 0
    with atomic_file(target) as file:
        for piece in rows:
            with writing(str(target)):
                file.write(np.ascontiguousarray(piece, "<f4").data)
            written += piece.size
        if written != shape[0] * shape[1]:
            raise RuntimeError(f"{target.name}: {written} numbers came for {shape[0]} rows of {shape[1]}")

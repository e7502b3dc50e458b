"""Embeddings as MSAE's training reads them: a raw float32 memory map whose file name says its shape.

    {name}_{clip}_{split}_{image|text}_{N}_{d}.npy      with "/" of the CLIP's id as "~"

The file has no npy header, whatever its name says, so `np.load` fails and `np.memmap(path, np.float32, "r").reshape(N, d)`
reads it. Readers take the shape from the last two fields only, so that other fields may hold underscores. MSAE's own reader
has a trap: it takes a path with "repr" anywhere in it for SAE activations.

Left out: object stores, where nothing can be mapped into memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from saecore.runs.files import scan_table
from saecore.storage import atomic_file, writing


def file_name(name: str, clip: str, split: str, kind: str, shape: tuple[int, int]) -> str:
    """The name of the file; `kind` is `image` or `text`. A CLIP that is a folder has the folder's name here."""
    model = Path(clip).resolve().name if Path(clip).exists() else clip.replace("/", "~")
    return "_".join([name, model, split, kind, *map(str, shape)]) + ".npy"


def image_rows(uri: str) -> Iterator[np.ndarray]:
    """The embeddings of a complete run in pieces: those of images that were not refused, in the order of image_id."""
    for batch in scan_table(uri, "images", ["embedding"]):
        rows = batch["embedding"].drop_null()
        if len(rows):
            yield rows.flatten().to_numpy().reshape(len(rows), -1)


def write(target: Path, rows: Iterable[np.ndarray], shape: tuple[int, int]) -> None:
    """Write rows, which come in pieces, to a file of `shape`, which appears whole or not at all."""
    written = 0
    with atomic_file(target) as file:
        for piece in rows:
            with writing(str(target)):
                file.write(np.ascontiguousarray(piece, "<f4").data)
            written += piece.size
        if written != shape[0] * shape[1]:
            raise RuntimeError(f"{target.name}: {written} numbers came for {shape[0]} rows of {shape[1]}")

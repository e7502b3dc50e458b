"""Scenes as files, in each form that jobs read: webdataset tars, a folder with a metadata file, Parquet; and their masks.

The same arguments give the same bytes. Left out: any size or quality other than one JPEG for each scene.
"""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from saecore.demo.drawing import jpeg, visible
from saecore.demo.scenes import SEED_DEMO, record, scene_at


def write_shards(folder: Path | str, scenes: int, shards: int, seed: int = SEED_DEMO, size: int = 192) -> list[Path]:
    """webdataset: `shard-000.tar` and on, of nearly equal length; `000000.jpg` and `000000.json` are scene 0 of `seed`.

    The same arguments give the same bytes: no time, owner or umask gets in.
    """
    if not 1 <= shards <= scenes:
        raise ValueError(f"{scenes} scenes cannot fill {shards} shards")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        paths.append(Path(folder) / f"shard-{shard:03d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard * scenes // shards, (shard + 1) * scenes // shards):
                scene = scene_at(seed, index)
                for suffix, data in (("jpg", jpeg(scene, size)), ("json", json.dumps(record(scene)).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def write_folder(folder: Path | str, scenes: int, seed: int = SEED_DEMO, size: int = 192) -> Path:
    """`000000.jpg` and on, with `metadata.jsonl` (a record a line, `file_name` first, as Hugging Face's imagefolder has it)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "metadata.jsonl", "w", encoding="utf-8") as lines:
        for index in range(scenes):
            scene = scene_at(seed, index)
            (Path(folder) / f"{index:06d}.jpg").write_bytes(jpeg(scene, size))
            lines.write(json.dumps({"file_name": f"{index:06d}.jpg"} | record(scene)) + "\n")
    return Path(folder)


def write_parquet(path: Path | str, scenes: int, seed: int = SEED_DEMO, size: int = 192) -> Path:
    """One file with `image` (struct of bytes and path, as Hugging Face has it), caption, seed, index, attributes (JSON)."""
    rows = []
    for index in range(scenes):
        scene = scene_at(seed, index)
        image = {"bytes": jpeg(scene, size), "path": f"{index:06d}.jpg"}
        rows.append({"image": image} | record(scene) | {"attributes": json.dumps(scene.attributes)})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    return Path(path)


def write_masks(path: Path | str, scenes: int, seed: int = SEED_DEMO, size: int = 192) -> Path:
    """One Parquet file with the true masks of all objects: key, label (a colour or a shape), and mask (a PNG). Several objects
    of one scene that have a label share its mask."""
    rows = []
    for index in range(scenes):
        scene = scene_at(seed, index)
        seen = visible(scene, size)
        for label in sorted({word for thing in scene.things for word in (thing.colour, thing.shape)}):
            named = [label in (thing.colour, thing.shape) for thing in scene.things]
            png = io.BytesIO()
            Image.fromarray(np.any(seen[named], 0)).save(png, "PNG")
            rows.append({"key": f"{index:06d}.jpg", "label": label, "mask": png.getvalue()})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return Path(path)

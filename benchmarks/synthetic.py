"""A run of any size without images or models, with the files and sizes of a real run: to measure on, and to test with.

Every image keeps k distinct latents, latent i with a weight of 1 / (i + 20): at k = 32 and n = 6,144 the most frequent fires
for about a quarter of all images, and the last 2 % never fire. Activations are gamma-distributed; a map is one bump in noise.
A chunk depends only on its number, so a longer run begins with the chunks of a shorter one.

Left out: meaning. Latents are independent of each other and of the pictures, which do not exist.
"""

import numpy as np
import pyarrow as pa

from saecore import schema
from saecore.numbering import id_of
from saecore.runs.files import parquet_bytes
from saecore.runs.run import Run, open_run
from saecore.storage import join_uri, write_atomic

SHARD_CHUNKS = 20
DEAD = 0.02
MANDELBROT = 20
"""Offset of the ranks in the law of frequencies. Without it the first latents would fire for every image."""


def write_run(
    uri: str, images: int, latents: int = 6144, k: int = 32, grid: tuple[int, int] = (7, 7), chunk_size: int = 512
) -> Run:
    """Write a complete run at `uri`. A shorter run there, with the same settings and whole chunks, grows."""
    parts = {"schema": schema.VERSION, "synthetic": [latents, k, *grid, chunk_size], "method": "contrib"}
    made_by = {"command": "benchmarks.synthetic", "config": parts, "grid": list(grid), "n_latents": latents}
    plan = make_plan(images, chunk_size)
    run = open_run(uri, parts, made_by, lambda: plan)
    if run.plan().num_rows != plan.num_rows:
        write_atomic(join_uri(uri, "plan.parquet"), parquet_bytes(plan, 65_536))
    tags = {"methods": "contrib", "grid_height": str(grid[0]), "grid_width": str(grid[1])}
    for chunk in run.pending().to_pylist():
        run.write_chunk(chunk["chunk_id"], explained(chunk, latents, k, grid), {}, tags)
    run.finish(images, 0.0)
    return run


def make_plan(images: int, chunk_size: int) -> pa.Table:
    """A plan of shards of `SHARD_CHUNKS` chunks each."""
    size = SHARD_CHUNKS * chunk_size
    rows = [
        {
            "chunk_id": number,
            "shard_id": first // size,
            "uri": f"/synthetic/shard-{first // size:05d}.tar",
            "kind": "tar",
            "start": first % size,
            "end": min(first + chunk_size, images) - first + first % size,
            "bytes": 0,
            "mtime_ns": 0,
        }
        for number, first in enumerate(range(0, images, chunk_size))
    ]
    return pa.Table.from_pylist(rows, schema=schema.PLAN)


def explained(chunk: dict, latents: int, k: int, grid: tuple[int, int]) -> pa.Table:
    """EXPLAINED rows of one chunk, always the same."""
    random = np.random.default_rng(chunk["chunk_id"])
    n, n_patches = chunk["end"] - chunk["start"], grid[0] * grid[1]
    alive = latents - int(latents * DEAD)
    # The k first arrivals of Poisson processes: k distinct latents, drawn one after the other by weight.
    arrival = random.standard_exponential((n, alive), np.float32) * (np.arange(alive, dtype=np.float32) + MANDELBROT)
    latent = np.argpartition(arrival, k, axis=1)[:, :k].astype(np.int32)
    activation = -np.sort(-random.standard_gamma(2.0, (n, k), np.float32), axis=1)
    index = np.arange(chunk["start"], chunk["end"])
    structs = {
        "activations": {
            "rank": np.tile(np.arange(k, dtype=np.int16), n),
            "latent": latent.ravel(),
            "activation": activation.ravel(),
            "pre_activation": activation.ravel(),
        },
        "maps": {
            "latent": latent.ravel(),
            "target": pa.nulls(n * k, pa.string()),
            "method": pa.array(["contrib"] * n * k),
            "map": _maps(random, n * k, grid),
            "scale": activation.ravel() / 127,
            "pre_activation": activation.ravel(),
            "remainder": activation.ravel() * random.random(n * k, np.float32),
            "sink_share": np.zeros(n * k, np.float32),
        },
    }
    columns = {
        "image_id": id_of(chunk["shard_id"], index),
        "uri": [chunk["uri"]] * n,
        "key": [f"{number:09d}.jpg" for number in index],
        "width": np.full(n, 640, np.int32),
        "height": np.full(n, 480, np.int32),
        "format": ["JPEG"] * n,
        "crop_left": np.full(n, 80, np.int32),
        "crop_top": np.zeros(n, np.int32),
        "crop_right": np.full(n, 560, np.int32),
        "crop_bottom": np.full(n, 480, np.int32),
        "l0": np.full(n, k, np.int32),
        "cosine": random.random(n, np.float32),
        "fvu": random.random(n, np.float32),
        "sinks": [[]] * n,
        "completeness": np.zeros(n, np.float32),
    }
    wanted = schema.explained_schema(n_patches)
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * k)
    for name, fields in structs.items():
        kind = wanted.field(name).type
        arrays = [pa.array(fields[field.name], field.type) for field in kind.value_type]
        columns[name] = pa.ListArray.from_arrays(
            offsets, pa.StructArray.from_arrays(arrays, fields=list(kind.value_type)), type=kind
        )
    return pa.Table.from_arrays(
        [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(n, field.type)
            for field in wanted
        ],
        schema=wanted,
    )


def _maps(random: np.random.Generator, n: int, grid: tuple[int, int]) -> pa.Array:
    """n maps of int8, each at full scale: a bump at a random place, and noise."""
    height, width = grid
    y, x = (random.random((n, 1), np.float32) * side for side in grid)
    near_y = np.exp(-((np.arange(height) - y) ** 2) / 2)
    near_x = np.exp(-((np.arange(width) - x) ** 2) / 2)
    values = near_y[:, :, None] * near_x[:, None, :]
    values += 0.1 * random.standard_normal(values.shape, np.float32)
    values *= 127 / np.abs(values).max((1, 2), keepdims=True)
    data = pa.py_buffer(values.round().astype(np.int8).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(height * width), n, [None, data])

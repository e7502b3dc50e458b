"""A run of five images whose every answer can be worked out by hand, written by the run's own code."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from saecore import schema, storage
from saecore.runs.files import parquet_bytes
from saecore.runs.run import open_run

N_LATENTS = 6
GRID = (1, 3)

# key, width, and the kept (latent, activation) of each image of each chunk, strongest first; no latents: refused.
#   latent 0 fires for a, b, c, e; 1 for a, b; 2 for c; 3 for d, e; 4 is kept once and never fires; 5 is never kept
IMAGES: list[list[tuple[str, int, list[tuple[int, float]]]]] = [
    [("a.jpg", 10, [(0, 4.0), (1, 3.0)]), ("b.jpg", 20, [(1, 5.0), (0, 2.0)]), ("bad.jpg", 0, [])],
    [("c.jpg", 30, [(0, 4.0), (2, 1.0)]), ("d.jpg", 40, [(3, 7.0), (4, 0.0)])],
    [("e.jpg", 50, [(3, 6.0), (0, 1.0)])],
]
PLACES = [(0, 0), (1, 0), (1, 2)]
"""Shard and first index of each chunk."""
IDS = {"a.jpg": 0, "b.jpg": 1, "bad.jpg": 2, "c.jpg": 1 << 32, "d.jpg": (1 << 32) + 1, "e.jpg": (1 << 32) + 2}
METHODS = ("contrib", "chefer")


def plan(chunks: int = 3) -> pa.Table:
    """The first chunks, as schema.PLAN."""
    fixed = {"kind": "tar", "bytes": 0, "mtime_ns": 0}
    rows = [
        {
            "chunk_id": number,
            "shard_id": shard,
            "uri": f"/shard-{shard}.tar",
            "start": start,
            "end": start + len(images),
        }
        for number, ((shard, start), images) in enumerate(zip(PLACES, IMAGES, strict=True))
    ]
    return pa.Table.from_pylist([{**row, **fixed} for row in rows[:chunks]], schema=schema.PLAN)


def write(place: Path | str, chunks: int = 3, methods: tuple[str, ...] = METHODS) -> str:
    """The first chunks as a complete run; given again with more, it grows. Without methods it has no maps."""
    uri, table = str(place), plan(chunks)
    made_by = {"command": "python -m planted", "grid": list(GRID), "n_latents": N_LATENTS}
    run = open_run(uri, {"schema": schema.VERSION, "methods": list(methods)}, made_by, lambda: table)
    storage.write_atomic(storage.join_uri(uri, "plan.parquet"), parquet_bytes(table, 10))
    tags = {"methods": ",".join(methods), "grid_height": "1", "grid_width": "3"}
    for chunk in run.pending()["chunk_id"].to_pylist():
        payload = explained(chunk, methods)
        run.write_chunk(chunk, payload if methods else payload.drop_columns("maps"), {}, tags)
    run.finish(0, 0.0)
    return uri


def explained(chunk: int, methods: tuple[str, ...]) -> pa.Table:
    """EXPLAINED rows. A map of latent l by method m: l + 1, -1 and 1 + m, in steps of half a unit; a text's has l = 8.

    The text's value is a hundredth of the image's width.
    """
    wanted = schema.explained_schema(3)
    rows: list[dict[str, Any]] = []
    shard, start = PLACES[chunk]
    for index, (key, width, kept) in enumerate(IMAGES[chunk], start):
        shown = {
            "activations": [
                {"rank": rank, "latent": latent, "activation": value, "pre_activation": value or -0.5}
                for rank, (latent, value) in enumerate(kept)
            ],
            "maps": [
                {
                    "latent": latent,
                    "target": target,
                    "method": method,
                    "map": bytes([first, 255, 1 + number]),
                    "scale": 0.5,
                }
                | {"pre_activation": 1.0 if target is None else width / 100, "remainder": 0.25, "sink_share": 0.0}
                for number, method in enumerate(methods)
                for latent, target, first in [*((n, None, n + 1) for n, _ in reversed(kept)), (None, "text: x", 9)]
            ],
            "l0": len(kept),
            "completeness": 0.0,
            "sinks": [2],
            "cosine": 0.5 + index / 10,
            "fvu": 0.25,
            "format": "JPEG",
            **{f"crop_{side}": pixels for side, pixels in (("left", 0), ("top", 0), ("right", 8), ("bottom", 4))},
        }
        refused = {"error": "truncated", "error_detail": "at byte 7"}
        known = {"image_id": shard << 32 | index, "uri": f"/shard-{shard}.tar", "key": key, "width": width, "height": 8}
        rows.append({**dict.fromkeys(wanted.names), **known, **(shown if kept else refused)})
    return pa.Table.from_pylist(rows, schema=wanted)

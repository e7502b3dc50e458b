"""What each step of the job costs an image, alone and together: read, decode, resize, hand over, transfer, tower, .. write.

Each is measured by the CPU time of one thread, which does not count other programs' work: the median of rounds in turn. The
first round does not count. From bytes to pixels it depends on the size of the JPEG, and from there on the model's shape:

    read            the tar is read, and its images become an Arrow table
    decode          bytes to RGB: `open_rgb`
    decode and ..   bytes to pixels, each way that there is (`benchmarks.decoders`)
    resize          what the way that a new run takes costs more than `decode`
    hand over       bytes to the decoder's process and pixels back, by a decoder that does nothing; CPU time of both processes
    transfer        the table of pixels is packed for Ray, unpacked, and copied to where the tower reads
    tower           pixels to the embedding and the trace, in the batch that is told
    SAE             the embedding to latents and back
    maps            all targets by `contrib`, rounded to 8 bits
    write           the files of a chunk of 512 images and its commit, made by `benchmarks.synthetic`
    tables          the stage of the job with a model that remembers what it has computed: arrays to Arrow tables
    stage           the stage of the job: tower, SAE, maps and tables, and how well the SAE reconstructs
    together        JPEGs of the first size through the steps of the job in one process, decoder's process included

Left out: what Ray takes, which `benchmarks.job` sees; object stores. Needs Linux, whose /proc tells the decoder's CPU time.
"""

import copy
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from benchmarks import decoders, synthetic
from benchmarks.load import descendants, write_tar
from benchmarks.material import Models, Size, pictures
from benchmarks.tables import figures
from benchmarks.training import time_in_turn
from saecore import heatmaps, schema
from saecore.images.chunks import plan_chunks, read_chunk
from saecore.images.decode import Decoded, open_rgb
from saecore.images.listing import list_shards
from saecore.images.preprocess import Preprocess, load_preprocess
from saecore.methods import DEFAULT_OPTIONS
from saecore.pipeline.config import ExplainConfig
from saecore.pipeline.decoder import Limited
from saecore.pipeline.inference import Inference, Inferred
from saecore.pipeline.isolation import Suspects
from saecore.pipeline.stages import Explain
from saecore.pipeline.steps import Replica, decode_chunk
from saecore.relevance.explain import explain_forward, trace_needs
from saecore.relevance.targets import Targets, no_word_targets
from saecore.runs.run import Run, open_run
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower

METHODS = ("contrib",)

HANDED = 500
"""Images that are handed over in a round: one takes 0.1 to 0.2 ms."""

SENT = 20
"""Times that a chunk is packed and unpacked in a round."""

CHUNK = 512
"""Images of the chunk that is written."""

BATCHES = {"B/32": 32, "B/16": 8, "L/14": 4, "demo": 64}
"""Images at once by the shape of the tower, so that a round takes seconds."""

DECODER_SECONDS = 60.0
"""The time limit of an image, as jobs have it."""


class Row(NamedTuple):
    """The cost of a step."""

    step: str
    seconds: float
    """CPU seconds of an image."""

    @property
    def per_second(self) -> float:
        """Images in a second of one core."""
        return 1 / max(self.seconds, 1e-9)


def both_processes() -> float:
    """CPU seconds of this process and of all below it that live."""
    return time.process_time() + sum(map(_scheduled, descendants(os.getpid()) - {os.getpid()}))


def _scheduled(pid: int) -> float:
    """CPU seconds of the first thread of a process, to the nanosecond; the decoder has no other."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def rows_of(
    steps: Mapping[str, tuple[Callable[[], object], int]], rounds: int, clock: Callable[[], float]
) -> list[Row]:
    """Rows of steps, of which each is a call and how many images it works on."""
    seconds = time_in_turn({name: call for name, (call, _) in steps.items()}, rounds, clock)
    return [Row(name, statistics.median(seconds[name]) / n) for name, (_, n) in steps.items()]


# ---- From bytes to pixels.


def nothing(data: bytes, shape: tuple[int, int, int]) -> Decoded:
    """A decoder that does nothing; a module's own, since it travels to the decoder's process."""
    return Decoded(np.zeros(shape, np.uint8), shape[1], shape[0], "JPEG", (0, 0, shape[1], shape[0]))


def decoding(folder: Path, size: Size, n: int, preprocess: Preprocess, rounds: int) -> list[Row]:
    """The steps of `n` JPEGs of one size, from the tar to the tower."""
    tar = folder / f"{size.width}x{size.height}.tar"
    write_tar(tar, pictures(size, n), "jpg")
    chunk = plan_chunks(list_shards([str(tar)]), n).to_pylist()[0]
    raw = pa.concat_tables(read_chunk(chunk))
    data = raw["data"].to_pylist()
    named = {"read": lambda: pa.concat_tables(read_chunk(chunk)), "decode": lambda: _each(open_rgb, data)}
    named |= {name: functools.partial(_each, way, data) for name, way in decoders.ways(preprocess).items()}
    rows = rows_of({name: (call, n) for name, call in named.items()}, rounds, time.process_time)
    chosen, decoded = decoders.name_of_default(), decoders.step_of_default(preprocess)(raw)
    of_step = {row.step: row.seconds for row in rows}
    rows.insert(2, Row("resize", of_step[chosen] - of_step["decode"]))
    empty = Limited(functools.partial(nothing, shape=(*preprocess.size, 3)), DECODER_SECONDS)
    handed = [*itertools.islice(itertools.cycle(data), min(HANDED, 20 * n))]
    rows += rows_of({"hand over": (lambda: _each(empty, handed), len(handed))}, rounds, both_processes)
    again = {"transfer": (lambda: [transfer(decoded) for _ in range(SENT)], n * SENT)}
    return rows + rows_of(again, rounds, time.process_time)


def _each(way: Callable[[bytes], object], data: Sequence[bytes]) -> None:
    for one in data:
        way(one)


def transfer(decoded: pa.Table) -> torch.Tensor:
    """A decoded chunk as it goes from one process to another, and its pixels as the tower takes them."""
    arrived = schema.unpack(pa.chunked_array([schema.pack(decoded)]))
    _, _, pixels = arrived["pixels"].combine_chunks().buffers()
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).copy())


# ---- From pixels to files.


def modelling(folder: Path, shape: str, models: Models, size: Size, rounds: int) -> list[Row]:
    """The steps from pixels to files for one shape, and all together."""
    n = BATCHES[shape]
    write_tar(folder / "images.tar", pictures(size, n), "jpg")
    plan = plan_chunks(list_shards([str(folder / "images.tar")]), n)
    config = ExplainConfig(clip=models.clip, sae=models.sae, k=models.k, batch_size=n, methods=METHODS, threads=1)
    preprocess = load_preprocess(models.clip)
    decoded = decoders.step_of_default(preprocess)(pa.concat_tables(read_chunk(plan.to_pylist()[0])))
    before = torch.get_num_threads()
    try:
        stage = Explain(config)
        with torch.inference_mode():
            pixels = transfer(decoded).unflatten(0, (n, *preprocess.size, 3))
            steps = in_the_stage(stage.infer.tower, stage.infer.sae, pixels, models.k)
            steps |= {"tables": functools.partial(remembering(stage, decoded), decoded)}
            steps |= {"stage": functools.partial(stage, decoded)}
            rows = rows_of({name: (call, n) for name, call in steps.items()}, rounds, time.process_time)
        run = new_run(f"{folder}/run", plan)
        seen = stage.infer.tower.grid
        payload = synthetic.explained(synthetic.make_plan(CHUNK, CHUNK).to_pylist()[0], 6144, models.k, seen)
        written = functools.partial(run.write_chunk, 0, payload, {}, {})
        rows += rows_of({"write": (written, CHUNK)}, rounds, time.process_time)
        chunk = whole_chunk(plan, stage, run, preprocess)
        rows += rows_of({"together": (chunk, n)}, rounds, both_processes)
    finally:
        torch.set_num_threads(before)
    return rows


def in_the_stage(tower: ImageTower, sae: SAE, pixels: torch.Tensor, k: int) -> dict[str, Callable[[], object]]:
    """Calls of what the stage computes of a batch, each from what the one before it has made; for inference mode."""
    needs = trace_needs(METHODS, DEFAULT_OPTIONS, len(tower.path()))
    embedding, trace = tower(pixels, **needs)

    def encode() -> torch.Tensor:
        code = sae.encode_sparse(embedding, at_least=k)
        sae.decode_sparse(code.latents, code.activations, embedding)
        return code.latents[:, :k]

    targets = Targets(sae, encode(), no_word_targets(sae))

    def explain() -> None:
        made = explain_forward(METHODS, tower, pixels, embedding, trace, targets, DEFAULT_OPTIONS)
        heatmaps.encode(torch.stack([one.relevance for one in made.values()], 1))

    return {"tower": lambda: tower(pixels, **needs), "SAE": encode, "maps": explain}


class Remembered:
    """Answers with what a model made of its first pixels."""

    def __init__(self, infer: Inference, pixels: np.ndarray) -> None:
        self.tower, self.axis, self.made = infer.tower, infer.axis, infer(pixels)

    def in_batches(self, pixels: np.ndarray, batch_size: int) -> list[Inferred]:
        """As of the model."""
        return [self.made]


def remembering(stage: Explain, decoded: pa.Table) -> Explain:
    """The same stage, whose model computes nothing again."""
    shape = (len(decoded), *stage.infer.tower.preprocess.size, 3)
    other: Any = copy.copy(stage)
    assert isinstance(stage.infer, Inference)
    other.infer = Remembered(stage.infer, transfer(decoded).reshape(shape).numpy())
    return other


def new_run(uri: str, plan: pa.Table) -> Run:
    """A run into which chunks can be written."""
    made_by = {"command": "benchmarks.steps", "config": {}, "grid": [1, 1], "n_latents": 1}
    return open_run(uri, {"schema": schema.VERSION}, made_by, lambda: plan)


def whole_chunk(plan: pa.Table, stage: Explain, run: Run, preprocess: Preprocess) -> Callable[[], object]:
    """A call that takes the one chunk of a plan through the job's steps, each time under a new number."""
    replica = Replica(lambda: stage, Suspects(), run, {})
    decode, numbers = decoders.step_of_default(preprocess, DECODER_SECONDS), itertools.count(1)

    def call() -> None:
        place = plan.schema.get_field_index("chunk_id")
        numbered = plan.set_column(place, plan.schema.field(place), pa.array([next(numbers)], pa.int64()))
        replica(decode_chunk(numbered, decode, Suspects()))

    return call


# ---- What is told.


def told(rows: Mapping[str, Sequence[Row]]) -> list[tuple[str, ...]]:
    """A table for `benchmarks.tables.aligned`: steps by columns of JPEG sizes or of shapes, ms and images/s of one core."""
    names = [row.step for row in next(iter(rows.values()))]
    table: list[tuple[str, ...]] = [("CPU ms an image (images/s of one core)", *rows)]
    for place, name in enumerate(names):
        cells = (column[place] for column in rows.values())
        table.append((name, *(f"{figures(cell.seconds * 1e3)} ({figures(cell.per_second)})" for cell in cells)))
    return table


def as_json(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The same for machines: by column and step."""
    return {
        column: {row.step: {"cpu_seconds": row.seconds, "images_per_second": row.per_second} for row in of_column}
        for column, of_column in rows.items()
    }

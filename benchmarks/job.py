"""How well the job uses the machine: what decoding and the models need alone, over the cores and the time that the job took.

    efficiency = images x (CPU seconds of an image that decoding and model need) / (cores x seconds)

`relmap explain` runs as a user starts it, and is watched from outside. The steady state is from the first committed chunk to
the last one; the images of the first chunk do not count. The way to the first chunk is told apart, in parts:

    starting     the interpreter, and what the command imports before it reads its arguments
    models       PyTorch is imported, both models are loaded and checked, the images are listed
    Ray          Ray starts                                              (on Ray)
    actors       replicas start, import and load the models               (in one process the models are loaded once more)
    first chunk  what the first committed chunk took to read, decode, explain and write

They follow from the log of chunks, from `session_seconds` of run.json and the time at which that was written, and from the
moment at which Ray's first process is seen. `actors` is what is left, waiting included. What is needed is measured in this
process: decoding in the same process, and the stage of the job (tower, SAE, maps, tables), by the CPU time of one thread.

On Ray, chunks that were decoded while the replica still loaded its models make the steady state look better, by as many
chunks as wait at once; more chunks make that smaller. CPU time of other programs is told, and the efficiency of what they left:
on a busy machine that one says more, though cores that are shared are also slower. Needs Linux.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from benchmarks import busy
from benchmarks.load import write_tar
from benchmarks.material import Models, Size, pictures
from saecore.images.chunks import plan_chunks, read_chunk
from saecore.images.listing import list_shards
from saecore.images.preprocess import load_preprocess
from saecore.pipeline.config import ExplainConfig
from saecore.pipeline.stages import Decode, Explain
from saecore.storage import read_json

SHARDS = 4
"""Tars that hold the images."""

NEED_IMAGES = {"B/32": 64, "B/16": 32, "L/14": 8, "demo": 256}
"""Images by which the need is measured, at most. The stage takes them in batches of 64, as the job does."""

WAYS = {"local": "--local", "Ray": "--ray"}
"""The flag of each way."""

RAY_BEGINS = "gcs_server"
"""In the command line of the first process that Ray starts."""


class Plan(NamedTuple):
    """What is run."""

    shape: str
    """One of `benchmarks.maps.SHAPES`."""
    size: Size
    images: int
    chunk_size: int


class Need(NamedTuple):
    """CPU seconds of one image when alone."""

    decode: float
    model: float


def write_shards(folder: Path, size: Size, images: int) -> Path:
    """Tars of JPEGs in a new folder."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        first, end = shard * images // SHARDS, (shard + 1) * images // SHARDS
        write_tar(folder / f"shard-{shard}.tar", pictures(size, end - first, first), "jpg")
    return folder


def measure(folder: Path, plan: Plan, models: Models, ways: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Each way once in every round; the need is measured before each of them."""
    images = write_shards(folder / "images", plan.size, plan.images)
    need = Needs(images, plan, models)
    for number in range(rounds):
        for way in ways:
            one = run(folder / f"{way}-{number}", images, plan, models, WAYS[way], need.measure())
            yield {"way": way, "round": number, **one}


class Needs:
    """Measures what an image needs: models and images are loaded once."""

    def __init__(self, images: Path, plan: Plan, models: Models) -> None:
        chunk = plan_chunks(list_shards([str(images)]), NEED_IMAGES[plan.shape]).slice(0, 1).to_pylist()[0]
        self.raw = pa.concat_tables(read_chunk(chunk))
        self.decode = Decode(load_preprocess(models.clip))
        self.explain = Explain(ExplainConfig(clip=models.clip, sae=models.sae, k=models.k))
        self.explain(self.decode(self.raw.slice(0, 1)))  # the first call allocates

    def measure(self) -> Need:
        """By the CPU time of one thread."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            started = time.process_time()
            decoded = self.decode(self.raw)
            middle = time.process_time()
            self.explain(decoded)
            ended = time.process_time()
        finally:
            torch.set_num_threads(threads)
        return Need((middle - started) / len(self.raw), (ended - middle) / len(self.raw))


def run(folder: Path, images: Path, plan: Plan, models: Models, flag: str, need: Need) -> dict[str, Any]:
    """One run of the command, and what follows from it. RuntimeError if it fails."""
    folder.mkdir()
    log, out, said = folder / "chunks.jsonl", folder / "run", folder / "said"
    command = [
        sys.executable,
        "-m",
        "jobs.explain",
        "--images",
        str(images),
        "--clip",
        models.clip,
        "--sae",
        models.sae,
    ]
    command += ["--k", str(models.k), "--chunk-size", str(plan.chunk_size), "--allow-poor-fit", "--log-json", str(log)]
    watched = busy.watch([*command, "--out", str(out), flag], said, [RAY_BEGINS])
    if watched.code:
        raise RuntimeError(f"the run ended with exit code {watched.code}: {said.read_text()[-2000:]}")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    session, written = read_json(str(out / "run.json"))["session_seconds"], (out / "run.json").stat().st_mtime
    return judged(watched, events, session, written, need)


def judged(
    watched: busy.Watched, events: Sequence[dict[str, Any]], session: dict[str, float], written: float, need: Need
) -> dict[str, Any]:
    """The figures of a run: from its chunks, from `session_seconds` of run.json, and from when that was written."""
    moments = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    first, last = moments[0], moments[-1]
    images = sum(event["images"] for event in events)
    steady = images - events[0]["images"]
    own, others = watched.used(first, last)
    own_whole, others_whole = watched.used(watched.began, watched.ended)
    cores, each = busy.cores(), need.decode + need.model
    return {
        "images": images,
        "chunks": len(events),
        "need": need._asdict(),
        "seconds": watched.seconds,
        "start_seconds": first - watched.began,
        "steady_seconds": last - first,
        "steady_images": steady,
        "end_seconds": watched.ended - last,
        "steady": _share(steady, last - first, each, own, others, cores),
        "whole": _share(images, watched.seconds, each, own_whole, others_whole, cores),
        "start": start_parts(watched, first, events[0]["seconds"], session, written),
    }


def _share(images: int, seconds: float, each: float, own: float, others: float, cores: int) -> dict[str, float]:
    """Speed; efficiency, of the cores and of what other programs left of them; shares that the job and other programs took."""
    available = max(cores * seconds, 1e-9)
    return {
        "images_per_second": images / max(seconds, 1e-9),
        "efficiency": images * each / available,
        "efficiency_of_rest": images * each / max(available - others, 1e-9),
        "own": own / available,
        "others": others / available,
    }


def start_parts(
    watched: busy.Watched, first: float, chunk: dict[str, float], session: dict[str, float], written: float
) -> dict[str, float]:
    """Seconds of the parts of the way to the first chunk, as the head of this file names them. They add up to it."""
    began = written - sum(session[part] for part in ("start", "images", "close"))
    flows = began + session["start"]
    ray = watched.seen.get(RAY_BEGINS, flows)
    own = sum(chunk.values())
    parts = {"starting": began - watched.began, "models": ray - began, "Ray": flows - ray}
    return parts | {"actors": first - flows - own, "first chunk": own}


# ---- What is told.


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure over runs of one way."""
    return {name: _median([run[name] for run in runs]) for name in runs[0] if name not in ("way", "round")}


def _median(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _median([value[name] for value in values]) for name in values[0]}
    return statistics.median(values)


def told(runs: Sequence[dict[str, Any]]) -> list[list[tuple[str, ...]]]:
    """Two tables for `benchmarks.tables.aligned`: speed and efficiency, and the start."""
    of_way = {way: medians([run for run in runs if run["way"] == way]) for way in dict.fromkeys(r["way"] for r in runs)}
    names = {
        "efficiency": "efficiency",
        "efficiency_of_rest": "of what others left",
        "own": "job's CPU",
        "others": "others' CPU",
    }
    speeds: list[tuple[str, ...]] = [
        ("", "images/s, steady", *names.values(), "images/s, whole", "efficiency, whole", "of what others left")
    ]
    for way, run in of_way.items():
        steady, whole = run["steady"], run["whole"]
        shares = [f"{steady[name]:.2f}" for name in names]
        ends = [f"{whole[name]:.2f}" for name in ("efficiency", "efficiency_of_rest")]
        speed = [f"{form['images_per_second']:.1f}" for form in (steady, whole)]
        speeds.append((way, speed[0], *shares, speed[1], *ends))
    parts = [*next(iter(of_way.values()))["start"]]
    starts: list[tuple[str, ...]] = [("seconds", *parts, "first commit after", "after the last commit")]
    for way, run in of_way.items():
        values = [*(run["start"][part] for part in parts), run["start_seconds"], run["end_seconds"]]
        starts.append((way, *(f"{value:.1f}" for value in values)))
    return [speeds, starts]


def needs_told(runs: Sequence[dict[str, Any]]) -> str:
    """A line with the need of an image."""
    need = _median([run["need"] for run in runs])
    return f"an image needs {need['decode'] * 1e3:,.1f} ms of CPU to decode and {need['model'] * 1e3:,.1f} ms in the models"

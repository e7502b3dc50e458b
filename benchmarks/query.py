"""How fast a run answers, how large it is, and what its index takes: on a synthetic run of a real one's sizes.

Each step that may take much memory runs in a process of its own, whose peak is then the step's. Questions are asked of warm
files. On a machine with other work, CPU seconds say more than seconds.
"""

import dataclasses
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.compute as pc

from benchmarks import synthetic
from saecore.query import by_latent, indexing, results, statistics
from saecore.runs.files import EXPLAINED, read_manifest
from saecore.runs.record import read_complete

TOP = 100

AIMS = (
    (f"top {TOP} of a latent with maps", "with an index", 50.0),
    (f"top {TOP} of a latent with maps", "without an index", 2000.0),
)
"""Aims for a million images of 32 latents each: a question, the state of the index, and the median in milliseconds."""

MEMORY_AIM = 4e9
"""Peak bytes of an index of ten million rows and more."""

FAR = 100_000_000
"""Number of images whose cost is computed from the measured rates."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the synthetic run."""

    images: int
    """Whole chunks of images, so that the run can grow."""
    latents: int
    k: int
    side: int
    """Patches of a map, along each side."""


def measure(uri: str, sizes: Sizes, memory: float, threads: int, rounds: int) -> dict[str, Any]:
    """All figures, measured on a run that is written at `uri` and stays there. memory: GB for DuckDB."""
    budget = indexing.Budget(memory, threads)
    figures: dict[str, Any] = {"rows": sizes.images * sizes.k, "steps": {}, "milliseconds": {}}
    steps, asked = figures["steps"], figures["milliseconds"]
    steps["write the run"] = alone(write, uri, sizes, sizes.images)
    asked["without an index"] = answers(uri, sizes, rounds)
    steps["index"] = alone(index, uri, budget)
    steps["count"] = alone(count, uri)
    figures["bytes"] = sizes_on_disk(uri)
    asked["with an index"] = answers(uri, sizes, rounds)
    alone(write, uri, sizes, sizes.images + sizes.images // 10)
    steps["index a tenth more"] = alone(index, uri, budget)
    asked["in two segments"] = answers(uri, sizes, rounds)
    return figures


def alone(step: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Seconds, CPU seconds and peak bytes of a step in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(_timed, (step, arguments))


def _timed(step: Callable[..., None], arguments: tuple[Any, ...]) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    step(*arguments)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_rss(),
    }


def peak_rss() -> int:
    """The most bytes that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage has the peak of the process that this one was forked from
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- The steps.


def write(uri: str, sizes: Sizes, images: int) -> None:
    """Write the run, or add to it."""
    synthetic.write_run(uri, images, sizes.latents, sizes.k, (sizes.side, sizes.side))


def index(uri: str, budget: indexing.Budget) -> None:
    """Write by_latent/ and top_images/, or add what is new."""
    record = read_complete(uri)
    before = by_latent.read_index(uri, record.fingerprint)
    update = indexing.update_of(read_manifest(uri), before, TOP, 1)
    made = [
        indexing.build_segment(uri, record.fingerprint, record.n_latents, TOP, group, budget) for group in update.groups
    ]
    by_latent.write_index(uri, by_latent.Index(record.fingerprint, TOP, [*update.kept, *made]))


def count(uri: str) -> None:
    """Write latents.parquet."""
    statistics.write(results.open(uri))


# ---- The figures.


def sizes_on_disk(uri: str) -> dict[str, int]:
    """Bytes of every table."""
    manifest = read_manifest(uri)
    sizes = {table: pc.sum(manifest["bytes"].filter(pc.equal(manifest["table"], table))).as_py() for table in EXPLAINED}
    index = by_latent.read_index(uri, read_complete(uri).fingerprint)
    assert index is not None
    sizes[by_latent.ROWS] = sum(file.bytes for segment in index.segments for file in segment.rows)
    sizes[by_latent.TOP] = sum(file.bytes for segment in index.segments for file in segment.top)
    return sizes


def answers(uri: str, sizes: Sizes, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds that questions take: median and longest of several rounds.

    Each round asks about another image, and about another latent, from the most frequent to the rarest.
    """
    alive = sizes.latents - int(sizes.latents * synthetic.DEAD)
    latents = np.geomspace(1, alive, rounds).astype(int) - 1
    images = np.linspace(0, sizes.images - 1, rounds).astype(int)
    run = results.open(uri)
    image_ids = [
        row["image_id"] for row in run.sql("SELECT image_id FROM images ORDER BY ALL").take(images).to_pylist()
    ]

    def with_maps(opened: results.Results, turn: int) -> None:
        top = opened.top_images(int(latents[turn]), TOP, maps=True)
        assert results.decode(top, opened.grid).any()

    questions: dict[str, Callable[[int], object]] = {
        f"top {TOP} of a latent with maps": lambda turn: with_maps(run, turn),
        "the same, opening the run first": lambda turn: with_maps(results.open(uri), turn),
        "maps of an image": lambda turn: run.maps(image_ids[turn]),
        "latents of an image": lambda turn: run.latents_of(image_ids[turn]),
        "histogram of a latent": lambda turn: run.histogram(int(latents[turn])),
        "co-firing of a latent": lambda turn: run.co_firing(int(latents[turn])),
        "compare 1 % with the others": lambda turn: run.compare(f"image_id % 100 = {turn}"),
        "SQL: mean of every latent": lambda turn: run.sql("SELECT latent, avg(activation) FROM by_latent GROUP BY ALL"),
    }
    return {name: typical(ask, rounds) for name, ask in questions.items()}


def typical(ask: Callable[[int], object], rounds: int) -> tuple[float, float]:
    """Median and longest, in milliseconds; each question is asked once before it is timed, so that its files are warm."""
    taken = []
    for turn in range(rounds):
        ask(turn)
        started = time.perf_counter()
        ask(turn)
        taken.append(1000 * (time.perf_counter() - started))
    return median(taken), max(taken)


def told(figures: dict[str, Any], sizes: Sizes) -> str:
    """The figures as a person reads them."""
    lines = [
        f"{sizes.images:,} images, {figures['rows']:,} rows of {sizes.latents:,} latents, maps of {sizes.side} x {sizes.side}",
        "",
    ]
    lines.append(f"{'':26}{'seconds':>9}{'CPU':>9}{'peak memory':>14}")
    for name, step in figures["steps"].items():
        lines.append(f"{name:26}{step['seconds']:>9.1f}{step['cpu_seconds']:>9.1f}{step['peak_bytes'] / 1e9:>11.2f} GB")
    raw = {"activations": 8 * sizes.k, "maps": 4 * sizes.k * sizes.side**2}
    lines += ["", f"{'bytes per image':26}{'on disk':>9}{'as float32':>14}"]
    each = {name: size / sizes.images for name, size in figures["bytes"].items()}
    run = sum(each[name] for name in EXPLAINED)
    for name, size in [*each.items(), ("a run without maps", run - each["maps"]), ("a run with maps", run)]:
        lines.append(f"{name:26}{size:>9,.0f}{raw.get(name, ''):>14}")
    states = list(figures["milliseconds"])
    lines += ["", f"{'median (longest), ms':34}" + "".join(f"{state:>20}" for state in states)]
    for question in figures["milliseconds"][states[0]]:
        taken = (figures["milliseconds"][state][question] for state in states)
        lines.append(
            f"{question:34}" + "".join(f"{f'{median:,.1f} ({longest:,.1f})':>20}" for median, longest in taken)
        )
    return "\n".join([*lines, "", *verdicts(figures), *far(figures, each, run, sizes)])


def verdicts(figures: dict[str, Any]) -> list[str]:
    """Whether the aims are met. They are meant for a million images, and reported for any number."""
    said = []
    for question, state, aim in AIMS:
        typical = figures["milliseconds"][state][question][0]
        said.append(f"{question}, {state}: {typical:,.1f} ms, aim {aim:,.0f}: {_held(typical, aim)}")
    peak = figures["steps"]["index"]["peak_bytes"]
    rows = f"{figures['rows']:,} rows by latent in {peak / 1e9:.2f} GB"
    return [*said, f"{rows}, aim {MEMORY_AIM / 1e9:.0f}: {_held(peak, MEMORY_AIM)}"]


def _held(value: float, aim: float) -> str:
    return "yes" if value <= aim else "NO"


def far(figures: dict[str, Any], each: dict[str, float], run: float, sizes: Sizes) -> list[str]:
    """The cost of `FAR` images by these rates: bytes and seconds in proportion, except `top_images`, which does not grow."""
    more = FAR / sizes.images
    hours = sum(figures["steps"][name]["seconds"] for name in ("index", "count")) * more / 3600
    disk = f"{run * FAR / 1e9:,.0f} GB with maps, {(run - each['maps']) * FAR / 1e9:,.0f} GB without"
    index = (each[by_latent.ROWS] * FAR + figures["bytes"][by_latent.TOP]) / 1e9
    return [f"{FAR:,} images, by these rates and not measured: {disk}; the index {index:,.0f} GB in {hours:.1f} hours"]

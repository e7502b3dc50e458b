"""The job against what people use today: the same images, the same models, one after the other in the same run.

    the ordinary script     `benchmarks.ordinary`, embeddings and kept latents
    .. by torchvision       the same with transformers' default processor, where torchvision is installed
    .. and each latent      32 maps of each image: a forward and a backward pass for every latent
    .. and the seed's way   32 maps of each image: rollout through all layers, one latent of one image after the other
    Daft                    a batch embedder from the package index: embeddings only
    ours, local / on Ray    embeddings, latents and 32 maps, written and committed

A speed has two forms. `whole` is from the start of the process to its end: imports, models, Ray. `steady` leaves out imports
and the loading of models; of ours it is the steady state of `benchmarks.job`, and of Daft, which loads its model with the
first batch, it leaves out the imports only. Maps of the scripts are timed for a few latents of a few images, scaled to all,
and added to what the ordinary script took in the same round. Ratios are to the ordinary script in the same round; the median
of rounds counts.

Daft needs other versions of PyTorch and transformers than the newest. So Daft and torchvision may be in another Python, whose
path is told. Needs Linux.
"""

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import busy, job
from benchmarks.material import Models, pictures
from benchmarks.ordinary import Settings
from benchmarks.tables import figures

WAYS = {
    "the ordinary script": "embed",
    ".. by torchvision": "torchvision",
    ".. and each latent": "each",
    ".. and the seed's way": "rolled",
    "Daft": "daft",
}
"""What is compared with, and its way in `benchmarks.ordinary.WAYS`."""

OURS = {"ours, local": "local", "ours, on Ray": "Ray"}
"""Our ways, and theirs in `job.WAYS`."""

ELSEWHERE = ("torchvision", "daft")
"""Ways that run in the Python that is told."""

BATCH_SIZE = 64


class Measured(NamedTuple):
    """One way in one round."""

    way: str
    whole: float
    """Images/s from the start of the process to its end."""
    steady: float
    """Images/s without the loading."""
    cpu_seconds: float | None
    """Of one image in the whole, of all processes; None for what is scaled."""


def write_folder(folder: Path, plan: job.Plan) -> Path:
    """JPEGs, each a file of its own."""
    folder.mkdir(parents=True)
    for number, data in enumerate(pictures(plan.size, plan.images)):
        (folder / f"{number:06d}.jpg").write_bytes(data)
    return folder


def measure(folder: Path, plan: job.Plan, models: Models, rounds: int, python: str) -> Iterator[Measured | str]:
    """Every way once in every round. A sentence for each way that cannot run, in the first round."""
    images = write_folder(folder / "images", plan)
    settings = Settings(str(images), models.folder(), models.sae, models.k, BATCH_SIZE, 4, 2)
    for number in range(rounds):
        first: Measured | None = None
        for name, way in WAYS.items():
            one = script(name, way, settings, python if way in ELSEWHERE else sys.executable, folder / "said", first)
            first = first or (one if isinstance(one, Measured) else None)
            if isinstance(one, Measured) or not number:
                yield one
        for name, way in OURS.items():
            # The efficiency is not asked for here, so no need is measured.
            run = job.run(folder / f"{way}-{number}", images, plan, models, job.WAYS[way], job.Need(0, 0))
            cpu = run["whole"]["own"] * busy.cores() * run["seconds"] / run["images"]
            yield Measured(name, run["whole"]["images_per_second"], run["steady"]["images_per_second"], cpu)


def script(name: str, way: str, settings: Settings, python: str, said: Path, first: Measured | None) -> Measured | str:
    """One of the scripts; a sentence if it cannot run there. `first` is the ordinary script in this round."""
    command = [python, "-m", "benchmarks.ordinary", way, json.dumps(settings._asdict())]
    watched = busy.watch(command, said, environment={**os.environ, "HF_HUB_OFFLINE": "1"})
    lines = said.read_text(errors="replace").splitlines()
    if watched.code:
        return f"{name} did not run in {python}: {lines[-1] if lines else f'exit code {watched.code}'}"
    told = json.loads(lines[-1])
    if "lacks" in told:
        return f"{name} was not measured: {told['lacks']} is not installed in {python}"
    if "map" in told:
        assert first is not None
        return scaled(name, told["map"] * settings.k, first)
    own, _ = watched.used(watched.began, watched.ended)
    images = told["images"]
    return Measured(name, images / watched.seconds, images / told["seconds"], own / images)


def scaled(name: str, seconds: float, first: Measured) -> Measured:
    """The ordinary script, and so many seconds more for the maps of each image."""
    return Measured(name, 1 / (1 / first.whole + seconds), 1 / (1 / first.steady + seconds), None)


# ---- What is told.


def rows_of(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """By way: medians over rounds, and of the ratios to the ordinary script in the same round."""
    names = list(dict.fromkeys(one.way for one in measured))
    of_way = {name: [one for one in measured if one.way == name] for name in names}
    first = of_way[next(iter(WAYS))]
    rows = []
    for name, ones in of_way.items():
        row: dict[str, Any] = {"way": name}
        for form in ("whole", "steady"):
            row[form] = statistics.median(getattr(one, form) for one in ones)
            pairs = zip(ones, first, strict=True)
            row[f"{form}_times"] = statistics.median(getattr(one, form) / getattr(base, form) for one, base in pairs)
        cpu = [one.cpu_seconds for one in ones if one.cpu_seconds is not None]
        rows.append(row | {"cpu_seconds": statistics.median(cpu) if cpu else None})
    return rows


def line(one: Measured) -> str:
    """What is told as soon as one way has run."""
    return f"{one.way}: {figures(one.whole)} images/s whole, {figures(one.steady)} steady"


def told(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A table for `benchmarks.tables.aligned`."""
    table: list[tuple[str, ...]] = [("", "images/s, whole", "x", "images/s, steady", "x", "CPU ms an image")]
    for row in rows:
        cpu = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds'] * 1e3:,.1f}"
        speeds = [figures(row[name]) for name in ("whole", "whole_times", "steady", "steady_times")]
        table.append((row["way"], *speeds, cpu))
    return table

"""How fast training steps are, and how much memory they take, against a straightforward dense loop in the same run.

Left out: a job around the steps: reading embeddings, evaluations, checkpoints.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.naive import DenseTopK
from benchmarks.query import peak_rss
from saecore.training.recipe import Recipe, doubled
from saecore.training.survey import Survey
from saecore.training.trainer import Trainer, Worker


class Steps(NamedTuple):
    """The sizes of what is timed, besides the number of latents."""

    width: int
    """Width of the embeddings."""
    k: int
    """Latents that fire."""
    batch_size: int
    """Embeddings a step."""


def measure(
    sizes: Steps, architectures: tuple[str, ...], latents: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Images per second of each way, its ratio to the dense loop's, and the peak memory of a process that does only that."""
    partners = {name: "dense matryoshka" if name == "matryoshka" else "dense topk" for name in architectures}
    names = [*dict.fromkeys(partners.values()), *architectures]
    rows = []
    for n_latents in latents:
        seconds = time_in_turn({name: make_step(sizes, name, n_latents) for name in names}, rounds)
        speeds = {name: sizes.batch_size / statistics.median(times) for name, times in seconds.items()}
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                peak = process.apply(peak_memory, (sizes, name, n_latents))
            rows.append(
                {
                    "name": name,
                    "latents": n_latents,
                    "images_per_second": speeds[name],
                    "times_dense": speeds[name] / speeds[partners.get(name, name)],
                    "peak_bytes": peak,
                }
            )
    return rows


def time_in_turn(
    steps: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step in every round. A round before them is not counted: the first step of each allocates."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = clock()
            step()
            if turn:
                seconds[name].append(clock() - started)
    return seconds


def make_step(sizes: Steps, name: str, latents: int) -> Callable[[], object]:
    """A call that does one step and waits for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(sizes.batch_size, sizes.width)).astype(np.float32)
    if name.startswith("dense"):
        levels = doubled(sizes.k, latents) if name == "dense matryoshka" else (sizes.k,)
        dense = DenseTopK(sizes.width, latents, levels).to(device)
        u = torch.from_numpy(x).to(device)
        return lambda: dense.train_step(u)
    seen = Survey(len(x), np.zeros(sizes.width, np.float32), 1.0, np.zeros(0, np.int64), x, x, False)
    # No remedy for dead latents, since the dense loop has none either.
    recipe = Recipe(latents=latents, architecture=name, k=sizes.k, batch_size=len(x), dead="none")
    trainer = Trainer(recipe, sizes.width, seen, Worker(device=device))
    return lambda: trainer.train(x, 1000)


def peak_memory(sizes: Steps, name: str, latents: int) -> int:
    """Bytes that this process held at most after two steps: to be called in a process of its own."""
    step = make_step(sizes, name, latents)
    step()
    step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()

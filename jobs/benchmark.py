"""How fast, against what, on this machine: ratios within one run, never seconds alone.

    python -m jobs.benchmark train        training an SAE, against a straightforward dense loop
    python -m jobs.benchmark truth        where maps of the demo's scenes lie, against true masks: no speed at all

Left out: the cost of maps (`make bench` prints it).
"""

import dataclasses
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from jobs import session
from saecore.methods import DEFAULT_OPTIONS, METHODS, Options, parse_methods


@dataclasses.dataclass(frozen=True)
class TrainBenchmark:
    """Training steps of ours and of a dense loop in turn, on random embeddings."""

    width: int = 768
    """Width of the embeddings."""
    latents: tuple[int, ...] = (6144, 24576)
    """Numbers of latents to measure at."""
    k: int = 64
    """Latents that fire."""
    architectures: tuple[str, ...] = ("topk", "batchtopk", "matryoshka")
    """Which of ours; matryoshka is compared with a dense loop over the same nested levels, the others with TopK's."""
    batch_size: int = 1024
    """Embeddings a step."""
    rounds: int = 5
    """Steps of each, in turn; the median counts."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        for name in ("width", "k", "batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not self.latents or min(self.latents) < self.k:
            raise ValueError(f"--latents {self.latents}: at least one number, none below --k {self.k}")


@dataclasses.dataclass(frozen=True)
class TruthBenchmark:
    """Maps of the demo's scenes by every method, against the true masks of their objects."""

    scenes: int = 2000
    """Scenes to measure on; as many others choose the latents."""
    method: str = ",".join(METHODS)
    """Methods, joined by commas; those that run the model again (rollout, occlusion) take most of the time."""
    options: tyro.conf.OmitArgPrefixes[Options] = DEFAULT_OPTIONS
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        parse_methods(self.method)
        self.options.check()
        if self.scenes < 50:
            raise ValueError(
                f"--scenes {self.scenes}: at least 50, since as many others say which latents follow a word"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return session.run_job(lambda: benchmark(sys.argv[1:] if argv is None else list(argv)))


def benchmark(argv: list[str]) -> int:
    """Measure and print."""
    kinds: Any = tyro.extras.subcommand_type_from_defaults({"train": TrainBenchmark(), "truth": TruthBenchmark()})
    with session.mistakes():
        chosen = tyro.cli(kinds, args=argv, prog="python -m jobs.benchmark", config=(tyro.conf.OmitArgPrefixes,))
        chosen.check()
    return tell_truth(chosen) if isinstance(chosen, TruthBenchmark) else tell_training(chosen)


def tell_training(chosen: TrainBenchmark) -> int:
    """Measure training and print."""
    rows = measure_training(chosen)
    if chosen.json:
        print(json.dumps({"machine": machine(), "config": dataclasses.asdict(chosen), "rows": rows}))
        return 0
    print(machine())
    print(f"{'':22}{'latents':>9}{'images/s':>11}{'x dense':>9}{'peak memory':>13}")
    for row in rows:
        print(
            f"{row['name']:22}{row['latents']:>9,}{row['images_per_second']:>11,.0f}"
            f"{row['times_dense']:>9.2f}{row['peak_bytes'] / 1e9:>10.2f} GB"
        )
    return 0


def tell_truth(chosen: TruthBenchmark) -> int:
    """Measure maps and print."""
    from saecore.demo import truth

    session.hush()
    progress = session.Progress(chosen.scenes, 0, "scenes")
    tell = truth.nothing if chosen.json else lambda count: progress.add(count, 0)
    found = truth.measure(chosen.scenes, parse_methods(chosen.method), chosen.options, tell)
    if chosen.json:
        tables = {title: truth.table(cases) for title, cases in found.tables().items()}
        print(json.dumps({"config": dataclasses.asdict(chosen), "followers": found.followers, "tables": tables}))
        return 0
    progress.close()
    print(f"{len(found.followers)} latents follow a word: " + ", ".join(f"{j} {w}" for j, w in found.followers.items()))
    for title, cases in found.tables().items():
        print(f"\n{title}: {len(cases.image):,} cases\n\n{truth.markdown(cases)}")
    return 0


def machine() -> str:
    """Device, threads and version, as a figure needs them beside it."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def measure_training(config: TrainBenchmark) -> list[dict[str, Any]]:
    """Images per second of each way, its ratio to the dense loop's, and the peak memory of a process that does only that."""
    rows = []
    partners = {name: "dense matryoshka" if name == "matryoshka" else "dense topk" for name in config.architectures}
    names = [*dict.fromkeys(partners.values()), *config.architectures]
    for latents in config.latents:
        steps = {name: make_step(config, name, latents) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(config.rounds + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if turn:  # the first of each allocates
                    seconds[name].append(time.perf_counter() - started)
        del steps
        speed = {name: config.batch_size / statistics.median(found) for name, found in seconds.items()}
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                peak = process.apply(peak_memory, (config, name, latents))
            rows.append(
                {
                    "name": name,
                    "latents": latents,
                    "images_per_second": speed[name],
                    "times_dense": speed[name] / speed[partners.get(name, name)],
                    "peak_bytes": peak,
                }
            )
    return rows


def make_step(config: TrainBenchmark, name: str, latents: int) -> Callable[[], object]:
    """A call that does one step and waits for it."""
    import numpy as np
    import torch

    from saecore.embeddings import Survey
    from saecore.naive import DenseTopK
    from saecore.recipe import Recipe, doubled
    from saecore.trainer import Trainer, Worker

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(config.batch_size, config.width)).astype(np.float32)
    if name.startswith("dense"):
        levels = doubled(config.k, latents) if name == "dense matryoshka" else (config.k,)
        dense = DenseTopK(config.width, latents, levels).to(device)
        u = torch.from_numpy(x).to(device)
        return lambda: dense.train_step(u)
    seen = Survey(len(x), np.zeros(config.width, np.float32), 1.0, np.zeros(0, np.int64), x, x, False)
    # dead: the dense loop has no remedy for dead latents either.
    recipe = Recipe(latents=latents, architecture=name, k=config.k, batch_size=len(x), dead="none")
    trainer = Trainer(recipe, config.width, seen, Worker(device=device))
    return lambda: trainer.train(x, 1000)


def peak_memory(config: TrainBenchmark, name: str, latents: int) -> int:
    """Bytes that this process held at most after two steps: to be called in a process of its own."""
    import torch

    step = make_step(config, name, latents)
    step()
    step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage there remembers the process that this one was forked from
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())

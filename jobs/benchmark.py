"""How fast, against what, on this machine: ratios within one run, never seconds alone.

python -m jobs.benchmark train        training an SAE, against a straightforward dense loop
python -m jobs.benchmark maps         maps by every method, against a plain forward and the naive ways
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
from typing import Annotated, Any

import tyro

from jobs import session
from saecore.methods import METHODS, parse_methods


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
class MapsBenchmark:
    """Maps of each image's strongest latents by every method, against a plain forward and the naive ways; random weights."""

    shapes: tuple[str, ...] = ("B/32", "B/16", "L/14")
    """Shapes of image towers: B/32, B/16, L/14, or demo, the embedded model's."""
    method: Annotated[str, tyro.conf.arg(aliases=["--methods"])] = ",".join(METHODS)
    """Methods, joined by commas; those that run the model again (rollout, occlusion) take most of the time."""
    k: int = 32
    """Latents explained of each image; 32 is what bounds are on."""
    latents: int = 6144
    """Latents of the SAE."""
    naive_latents: int = 2
    """Latents that the naive ways are timed with, then scaled to k, since they cost 33 forwards and more; 0 leaves them out."""
    batch_size: int = 0
    """Images at once; 0 is 8, 4, 2 and 16 for the shapes above."""
    rounds: int = 7
    """Times that each is timed, in turn; the least counts. What costs more than 3 forwards is timed less often."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, one table for each number: CPU time of one thread, else wall time. A GPU has one table."""
    device: str = ""
    """cpu or cuda; cuda where there is one, if not said."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        parse_methods(self.method)
        for name in ("k", "latents", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.k > self.latents:
            raise ValueError(f"--k {self.k}: the SAE has --latents {self.latents}")
        for name in ("naive_latents", "batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"--threads {self.threads}: at least one number, none below 1")
        import torch

        from saecore.timing import SHAPES

        if wrong := [shape for shape in self.shapes if shape not in SHAPES]:
            raise ValueError(f"--shapes {wrong[0]}: must be of {', '.join(SHAPES)}")
        if self.device not in ("", "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device {self.device}: must be cpu, or cuda on a machine that has a GPU")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return session.run_job(lambda: benchmark(sys.argv[1:] if argv is None else list(argv)))


def benchmark(argv: list[str]) -> int:
    """Measure and print."""
    kinds: Any = tyro.extras.subcommand_type_from_defaults({"train": TrainBenchmark(), "maps": MapsBenchmark()})
    with session.mistakes():
        chosen = tyro.cli(kinds, args=argv, prog="python -m jobs.benchmark", config=(tyro.conf.OmitArgPrefixes,))
        chosen.check()
    return tell_maps(chosen) if isinstance(chosen, MapsBenchmark) else tell_training(chosen)


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


def tell_maps(chosen: MapsBenchmark) -> int:
    """Measure maps and print, table by table, as they are measured."""
    import torch

    from saecore import timing

    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tables = []
    if not chosen.json:
        print(f"{machine()}, transformers {session.versions()['transformers']}")
    for name in chosen.shapes:
        shape = timing.SHAPES[name]
        shape = shape._replace(batch=chosen.batch_size or shape.batch)
        for threads in chosen.threads if device == "cpu" else (torch.get_num_threads(),):
            how = f"{threads} thread{'s' * (threads > 1)}, " + timing.unit(device, threads)
            if not chosen.json:
                print(f"\n{name}, {shape.batch} images at once, k = {chosen.k}; {device}, {how}", flush=True)
            rows = timing.cost_of_maps(
                shape=shape,
                methods=parse_methods(chosen.method),
                k=chosen.k,
                n_latents=chosen.latents,
                naive_latents=chosen.naive_latents,
                rounds=chosen.rounds,
                threads=threads,
                device=device,
            )
            if not chosen.json:
                print(timing.table(rows), flush=True)
            found = {"shape": name, "batch_size": shape.batch, "device": device, "threads": threads}
            tables.append(found | {"rows": [row._asdict() for row in rows]})
    if chosen.json:
        said = {"machine": machine(), "versions": session.versions(), "config": dataclasses.asdict(chosen)}
        print(json.dumps(said | {"tables": tables}))
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

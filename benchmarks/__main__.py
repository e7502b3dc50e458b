"""How fast, in how much memory, against what, on this machine: ratios within one run, never only seconds. And how true.

python -m benchmarks train        training an SAE, against a straightforward dense loop
python -m benchmarks maps         maps by every method, against a plain forward and the naive ways
python -m benchmarks precision    bfloat16 against float32 on a CPU: speed, kept latents, maps
python -m benchmarks pixels       images that are resized fast beside exact ones: pixels, kept latents
python -m benchmarks steps        each step of the job alone, and all together
python -m benchmarks job          how well the job uses the machine, and its start in parts
python -m benchmarks peers        the job against the scripts and programs that people use today
python -m benchmarks query        questions to a synthetic run with and without its index; sizes, memory
python -m benchmarks storage      maps in files: bytes and CPU time of each way that Parquet could store them
python -m benchmarks load         memory of a long run on Ray, of a large tar and of a plan of many shards: is it flat
python -m benchmarks truth        where maps of the demo's scenes lie, against true masks: no speed at all
python -m benchmarks chaos        faults at random moments of a run, and what becomes of its rows: no speed at all
"""

import dataclasses
import inspect
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.disturb import Chaos
from benchmarks.machine import machine
from benchmarks.pixels import Pixels
from benchmarks.precision import Precision
from benchmarks.speed import Job, Peers, Steps
from benchmarks.storage import Storage
from jobs import commands, console, origin
from saecore.methods import DEFAULT_OPTIONS, OF_EVERY_TOWER, REMOVAL, Options, parse_methods
from saecore.sae import sites


@dataclasses.dataclass(frozen=True)
class Train:
    """Training steps of ours and of a dense loop in turn, on random embeddings."""

    width: int = 768
    """Width of the embeddings."""
    latents: tuple[int, ...] = (6144, 24576)
    """Numbers of latents to measure at."""
    k: int = 64
    """Latents that fire."""
    architectures: tuple[str, ...] = ("topk", "batchtopk", "matryoshka")
    """Our architectures. matryoshka is compared with a dense loop over the same nested levels, the others with TopK's loop."""
    batch_size: int = 1024
    """Embeddings a step."""
    rounds: int = 5
    """Steps of each way, in turn; the median counts."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, width=1, k=1, batch_size=1, rounds=1)
        if not self.latents or min(self.latents) < self.k:
            raise ValueError(f"--latents {self.latents}: at least one number, none below --k {self.k}")

    def tell(self) -> None:
        """Measure and print."""
        from benchmarks import training

        sizes = training.Steps(self.width, self.k, self.batch_size)
        rows = training.measure(sizes, self.architectures, self.latents, self.rounds)
        if self.json:
            print(json.dumps({"machine": machine(), "config": dataclasses.asdict(self), "rows": rows}))
            return
        print(machine())
        print(f"{'':22}{'latents':>9}{'images/s':>11}{'x dense':>9}{'peak memory':>13}")
        for row in rows:
            print(
                f"{row['name']:22}{row['latents']:>9,}{row['images_per_second']:>11,.0f}"
                f"{row['times_dense']:>9.2f}{row['peak_bytes'] / 1e9:>10.2f} GB"
            )


@dataclasses.dataclass(frozen=True)
class Maps:
    """Maps of each image's strongest latents by every method, against a plain forward and the naive ways; random weights."""

    shapes: tuple[str, ...] = ("B/32", "B/16", "L/14")
    """Shapes of image towers: B/32, B/16, L/14, or demo, the embedded model's."""
    method: Annotated[str, tyro.conf.arg(aliases=["--methods"])] = ",".join((*OF_EVERY_TOWER, REMOVAL))
    """Methods, joined by commas; those that run the model again (rollout, occlusion, shapley) take most of the time."""
    k: int = 32
    """Latents explained of each image; 32 is what bounds are on."""
    latents: int = 6144
    """Latents of the SAE."""
    naive_latents: int = 2
    """Latents that the naive ways are timed with, then scaled to k, since they cost 33 forwards and more; 0 leaves them out."""
    batch_size: int = 0
    """Images at once; 0 is 8, 4, 2 and 16 for the shapes above."""
    rounds: int = 7
    """Rounds in which all are timed; medians of ratios count. What costs more than 3 forwards is timed less often."""
    threads: tuple[int, ...] = (1, 2)
    """CPU threads, one table for each number: CPU time of one thread, else wall time. A GPU has one table."""
    device: str = ""
    """cpu or cuda; cuda where there is one, if not said."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        with commands.given_fields(self):
            parse_methods(self.method)
        commands.at_least(self, k=1, latents=1, rounds=1, naive_latents=0, batch_size=0)
        if self.k > self.latents:
            raise ValueError(f"--k {self.k}: the SAE has --latents {self.latents}")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"--threads {self.threads}: at least one number, none below 1")
        import torch

        from benchmarks.maps import SHAPES

        if wrong := [shape for shape in self.shapes if shape not in SHAPES]:
            raise ValueError(f"--shapes {wrong[0]}: must be of {', '.join(SHAPES)}")
        if self.device not in ("", "cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--device {self.device}: must be cpu, or cuda on a machine that has a GPU")

    def tell(self) -> None:
        """Measure and print, table by table, as they are measured."""
        import torch

        from benchmarks import maps

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        tables = []
        if not self.json:
            print(f"{machine()}, transformers {origin.versions()['transformers']}")
        for name in self.shapes:
            shape = maps.SHAPES[name]
            shape = shape._replace(batch=self.batch_size or shape.batch)
            for threads in self.threads if device == "cpu" else (torch.get_num_threads(),):
                how = f"{threads} thread{'s' * (threads > 1)}, " + maps.unit(device, threads)
                if not self.json:
                    print(f"\n{name}, {shape.batch} images at once, k = {self.k}; {device}, {how}", flush=True)
                rows = maps.cost_of_maps(
                    shape=shape,
                    methods=parse_methods(self.method),
                    k=self.k,
                    n_latents=self.latents,
                    naive_latents=self.naive_latents,
                    rounds=self.rounds,
                    threads=threads,
                    device=device,
                )
                if not self.json:
                    print(maps.table(rows), flush=True)
                table = {"shape": name, "batch_size": shape.batch, "device": device, "threads": threads}
                tables.append(table | {"rows": [row._asdict() for row in rows]})
        if self.json:
            said = {"machine": machine(), "versions": origin.versions(), "config": dataclasses.asdict(self)}
            print(json.dumps(said | {"tables": tables}))


@dataclasses.dataclass(frozen=True)
class Query:
    """Questions to a synthetic run, with and without its index; what the index takes; sizes on disk."""

    images: int = 20_000
    """Images of the run, rounded up to whole chunks of 512. A million take 2.4 GB on disk."""
    latents: int = 6144
    """Latents of the SAE."""
    k: int = 32
    """Latents kept per image."""
    side: int = 7
    """Patches of a map along each side: 7 is ViT-B/32's."""
    memory: float = 2.0
    """GB for DuckDB while the index is made."""
    threads: int = 0
    """CPU threads of the index; 0 is all."""
    rounds: int = 15
    """Times that each question is asked."""
    folder: str = ""
    """Where to put the run; nothing is a temporary folder. It is removed at the end either way."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, images=1, k=1, side=1, rounds=1)
        if self.k >= self.latents:
            raise ValueError(f"--k {self.k}: must be less than --latents {self.latents}")

    def tell(self) -> None:
        """Write a run, ask it, index it, ask it again, print, and remove it."""
        from benchmarks import query

        sizes = query.Sizes(-(-self.images // 512) * 512, self.latents, self.k, self.side)
        with tempfile.TemporaryDirectory(dir=self.folder or None) as folder:
            figures = query.measure(f"{folder}/run", sizes, self.memory, self.threads, self.rounds)
        if self.json:
            print(json.dumps({"machine": machine(), "config": dataclasses.asdict(self), **figures}))
        else:
            print(machine(), query.told(figures, sizes), sep="\n")


@dataclasses.dataclass(frozen=True)
class Load:
    """Memory: of the processes of a long run on Ray, of one large tar, of a plan of many shards. 0 omits a part."""

    images: int = 200_000
    """Tiny images of the run, which the demo's models explain."""
    shards: int = 400
    """Shards that hold them."""
    chunk_size: int = 512
    """Images per chunk of the run."""
    tar_gb: float = 5.0
    """GB of the large tar."""
    planned: int = 100_000
    """Shards of the plan."""
    folder: str = ""
    """Where to put images and run; nothing is a temporary folder. All is removed at the end either way."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, images=0, shards=1, chunk_size=1, tar_gb=0, planned=0)
        if 0 < self.images < self.shards:
            raise ValueError(f"--images {self.images}: fewer than --shards {self.shards}")
        if sys.platform != "linux":
            raise ValueError("load needs Linux: /proc tells the memory of other processes")

    def tell(self) -> None:
        """Measure part after part, and print each as it is measured."""

        from benchmarks import load

        figures: dict[str, Any] = {}
        if not self.json:
            print(machine(), flush=True)
        for name, measure in (
            ("run", lambda folder: load.run(folder, self.images, self.shards, self.chunk_size)),
            ("stream", lambda folder: load.stream(folder, int(self.tar_gb * 1e9))),
            ("plan", lambda folder: load.plan(folder, self.planned)),
        ):
            if {"run": self.images, "stream": self.tar_gb, "plan": self.planned}[name]:
                with tempfile.TemporaryDirectory(dir=self.folder or None) as folder:
                    figures[name] = measure(Path(folder))
                if not self.json:
                    print("", load.told({name: figures[name]}), sep="\n", flush=True)
        if self.json:
            print(json.dumps({"machine": machine(), "config": dataclasses.asdict(self), **figures}))


@dataclasses.dataclass(frozen=True)
class Truth:
    """Maps of the demo's scenes by every method, against the true masks of their objects. Unless --norm is given, every method
    that has a norm has a row for the other one too."""

    scenes: int = 2000
    """Scenes to measure on; as many others choose the latents."""
    method: str = ",".join((*OF_EVERY_TOWER, REMOVAL))
    """Methods, joined by commas; those that run the model again (rollout, occlusion, shapley) take most of the time."""
    pool: str = ""
    """Measure the demo's SAE of patch tokens instead, pooled so, by every method that explains tokens: max, mean or sum."""
    options: tyro.conf.OmitArgPrefixes[Options] = DEFAULT_OPTIONS
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        with commands.given_fields(self, self.options):
            parse_methods(self.method)
            self.options.check()
            if self.pool:
                sites.check_pool(self.pool, "patches")
        if self.scenes < 50:
            raise ValueError(
                f"--scenes {self.scenes}: at least 50, since as many others say which latents follow a word"
            )

    def tell(self) -> None:
        """Measure and print."""
        from benchmarks import token_truth, truth
        from saecore.pipeline.models import load_models
        from saecore.relevance.explain import check_fits
        from saecore.removal.saved import load_head
        from saecore.towers.tokens import TokenTower

        console.hush()
        methods = parse_methods(self.method)
        with commands.mistakes():
            tower, sae = load_models("demo", "demo-patches" if self.pool else "demo")
            with commands.given_fields(self.options):
                check_fits(tower, methods, self.options)
        progress = console.Progress(self.scenes, 0, "scenes")
        tell = truth.nothing if self.json else lambda count: progress.add(count, 0)
        if isinstance(tower, TokenTower):
            followers, by_title = token_truth.measure(tower, sae, self.pool, self.scenes, tell)
        else:
            listed = truth.rows(methods, self.options)
            measured = truth.measure(tower, sae, self.scenes, listed, tell, load_head("demo"))
            followers, by_title = measured.followers, measured.tables()
        if self.json:
            tables = {title: truth.table(cases) for title, cases in by_title.items()}
            print(json.dumps({"config": dataclasses.asdict(self), "followers": followers, "tables": tables}))
            return
        progress.close()
        words = ", ".join(f"{latent} {word}" for latent, word in followers.items())
        print(f"{len(followers)} latents follow a word: {words}")
        for title, cases in by_title.items():
            print(f"\n{title}: {len(cases.image):,} cases\n\n{truth.markdown(cases)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return commands.run_job(lambda: benchmark(sys.argv[1:] if argv is None else list(argv)))


def benchmark(argv: list[str]) -> int:
    """Measure and print."""
    ways = {
        "train": Train(),
        "maps": Maps(),
        "precision": Precision(),
        "pixels": Pixels(),
        "steps": Steps(),
        "job": Job(),
        "peers": Peers(),
        "query": Query(),
        "storage": Storage(),
        "load": Load(),
        "truth": Truth(),
        "chaos": Chaos(),
    }
    kinds: Any = tyro.extras.subcommand_type_from_defaults(
        ways, {name: inspect.getdoc(way) or "" for name, way in ways.items()}
    )
    with commands.mistakes():
        chosen = tyro.cli(
            kinds,
            args=argv,
            prog="python -m benchmarks",
            description=(__doc__ or "").partition("\n\n")[0],
            config=(tyro.conf.OmitArgPrefixes,),
            registry=commands.help_rules(),
        )
        chosen.check()
    return chosen.tell() or 0


if __name__ == "__main__":
    sys.exit(main())

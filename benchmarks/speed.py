"""The arguments of `python -m benchmarks steps`, `job` and `peers`: the job, its steps, and what people use today."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.material import Size
from benchmarks.tables import aligned
from jobs import commands, origin


@dataclasses.dataclass(frozen=True)
class Steps:
    """Each step of the job alone, by the CPU time of one thread, and all together; JPEGs of several sizes, models of several
    shapes with random weights."""

    sizes: tuple[str, ...] = ("500x375", "1600x1200", "4000x3000")
    """Sizes of the JPEGs, in pixels; the first of them is that of all steps together."""
    shapes: tuple[str, ...] = ("B/32", "B/16", "L/14", "demo")
    """Shapes of image towers: B/32, B/16, L/14, or demo, the embedded model."""
    latents: int = 6144
    """Latents of the SAE."""
    k: int = 32
    """Latents explained of each image."""
    megapixels: float = 24.0
    """Pixels that are decoded of each size in a round, in millions; at least four images."""
    rounds: int = 3
    """Rounds that count; one round before them does not."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, latents=1, k=1, megapixels=0, rounds=1)
        check_material(self.sizes, self.shapes, self.latents, self.k)

    def tell(self) -> None:
        """Measure and print, table by table."""
        from benchmarks import material, steps
        from saecore.images.preprocess import load_preprocess

        figures: dict[str, Any] = {}
        sizes = [Size.parse(text) for text in self.sizes]
        with tempfile.TemporaryDirectory() as temporary:
            folders = {shape: Path(temporary) / shape.replace("/", "") for shape in self.shapes}
            models = {s: material.write_models(folder, s, self.latents, self.k) for s, folder in folders.items()}
            preprocess = load_preprocess(models[self.shapes[0]].clip)
            of_size = {
                str(size): steps.decoding(Path(temporary), size, self._images(size), preprocess, self.rounds)
                for size in sizes
            }
            head = f"{told_machine()}; CPU time of one thread"
            figures["decoding"] = tell_steps(self.json, f"{head}\n\nfrom bytes to pixels, by size of the JPEG", of_size)
            of_shape = {}
            for shape, folder in folders.items():
                folder.mkdir(exist_ok=True)
                name = f"{shape}, {steps.BATCHES[shape]} at once"
                of_shape[name] = steps.modelling(folder, shape, models[shape], sizes[0], self.rounds)
            figures["models"] = tell_steps(self.json, "\nfrom pixels to files, by shape of the tower", of_shape)
        tell_json(self, figures)

    def _images(self, size: Size) -> int:
        """How many JPEGs of a size make up the megapixels."""
        return min(max(4, round(self.megapixels * 1e6 / (size.width * size.height))), 200)


@dataclasses.dataclass(frozen=True)
class Job:
    """How well the job uses the machine: what decoding and models need alone, over cores and time; and its start in parts."""

    shapes: tuple[str, ...] = ("B/32", "demo")
    """Shapes of image towers: B/32, B/16, L/14, or demo, the embedded model."""
    images: tuple[int, ...] = (768, 6144)
    """Images of a run, for each shape."""
    size: str = "500x375"
    """Size of the JPEGs, in pixels."""
    chunk_size: int = 64
    """Images per chunk. Small, since the steady state is measured between the first chunk and the last."""
    ways: tuple[str, ...] = ("local", "Ray")
    """Where the job runs: local, Ray."""
    latents: int = 6144
    """Latents of the SAE."""
    k: int = 32
    """Latents explained of each image; of the demo it is 12."""
    rounds: int = 2
    """Runs of each way, in turn; medians count."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        from benchmarks.job import WAYS

        commands.at_least(self, chunk_size=1, latents=1, k=1, rounds=1)
        if len(self.images) != len(self.shapes):
            raise ValueError(f"--images {self.images}: one number for each of --shapes, which are {len(self.shapes)}")
        if min(self.images) < 3 * self.chunk_size:
            raise ValueError(f"--images {min(self.images)}: at least three chunks of --chunk-size {self.chunk_size}")
        if wrong := [way for way in self.ways if way not in WAYS]:
            raise ValueError(f"--ways {wrong[0]}: must be of {', '.join(WAYS)}")
        check_material((self.size,), self.shapes, self.latents, self.k)

    def tell(self) -> None:
        """Run, and print the tables of each shape."""
        from benchmarks import busy, job, material

        figures = []
        if not self.json:
            print(f"{told_machine()}, {busy.cores()} cores")
        for shape, images in zip(self.shapes, self.images, strict=True):
            plan = job.Plan(shape, Size.parse(self.size), images, self.chunk_size)
            with tempfile.TemporaryDirectory() as temporary:
                models = material.write_models(Path(temporary), shape, self.latents, self.k)
                runs = list(job.measure(Path(temporary), plan, models, self.ways, self.rounds))
            figures.append({"shape": shape, "images": images, "runs": runs})
            if not self.json:
                print(
                    f"\n{shape}, {images:,} JPEGs of {plan.size} in chunks of {plan.chunk_size}: {job.needs_told(runs)}"
                )
                print(*("\n" + aligned(table) for table in job.told(runs)), sep="\n", flush=True)
        tell_json(self, {"cores": busy.cores(), "shapes": figures})


@dataclasses.dataclass(frozen=True)
class Peers:
    """The job with maps, against what people use today on the same images and models: the ordinary script, one-latent scripts,
    Daft."""

    shape: str = "B/32"
    """Shape of the image tower: B/32, B/16, L/14, or demo, the embedded model."""
    images: int = 512
    """JPEGs."""
    size: str = "500x375"
    """Their size, in pixels."""
    chunk_size: int = 64
    """Images per chunk of ours."""
    latents: int = 6144
    """Latents of the SAE."""
    k: int = 32
    """Latents explained of each image; of the demo it is 12."""
    rounds: int = 1
    """Rounds of all ways in turn; medians count."""
    peer_python: str = ""
    """A Python that has Daft with its extra `transformers`, or torchvision, and PyTorch; if not said, this one."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, chunk_size=1, latents=1, k=1, rounds=1, images=3 * self.chunk_size)
        if self.peer_python and not Path(self.peer_python).is_file():
            raise ValueError(f"--peer-python {self.peer_python}: there is no such file")
        check_material((self.size,), (self.shape,), self.latents, self.k)

    def tell(self) -> None:
        """Run all ways, and print the table."""
        from benchmarks import job, material, peers

        measured, said = [], []
        if not self.json:
            print(f"{told_machine()}\n{self.shape}, {self.images:,} JPEGs of {self.size}\n", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            models = material.write_models(Path(temporary), self.shape, self.latents, self.k)
            plan = job.Plan(self.shape, Size.parse(self.size), self.images, self.chunk_size)
            python = self.peer_python or sys.executable
            for one in peers.measure(Path(temporary), plan, models, self.rounds, python):
                if isinstance(one, str):
                    said.append(one)
                else:
                    measured.append(one)
                if not self.json:
                    print(one if isinstance(one, str) else peers.line(one), flush=True)
        rows = peers.rows_of(measured)
        if not self.json:
            print(f"\n{aligned(peers.told(rows))}")
        tell_json(self, {"rows": rows, "not_measured": said})


def check_material(sizes: tuple[str, ...], shapes: tuple[str, ...], latents: int, k: int) -> None:
    """ValueError for sizes or shapes that there are not, for a machine without /proc, or without photographs."""
    from benchmarks import material
    from benchmarks.maps import SHAPES

    if not sizes or not shapes:
        raise ValueError("at least one size of JPEGs and one shape of towers is needed")
    for size in sizes:
        Size.parse(size)
    if wrong := [shape for shape in shapes if shape not in SHAPES]:
        raise ValueError(f"{wrong[0]} is no shape of a tower: must be of {', '.join(SHAPES)}")
    if k > latents:
        raise ValueError(f"--k {k}: the SAE has --latents {latents}")
    if sys.platform != "linux":
        raise ValueError("this benchmark needs Linux: /proc tells the CPU time of other processes")
    material.photographs()


def told_machine() -> str:
    """The machine, and the versions that speed depends on most."""
    from benchmarks.machine import machine

    versions = origin.versions()
    return f"{machine()}, transformers {versions['transformers']}, Pillow {versions['pillow']}, Ray {versions['ray']}"


def tell_steps(as_json: bool, head: str, rows: Any) -> Any:
    """Print a table of `benchmarks.steps` unless JSON is wanted; returns its figures."""
    from benchmarks import steps

    if not as_json:
        print(f"{head}\n\n{aligned(steps.told(rows))}", flush=True)
    return steps.as_json(rows)


def tell_json(asked: Any, figures: dict[str, Any]) -> None:
    """Print one JSON object, if that is wanted."""
    from benchmarks.machine import machine

    if asked.json:
        said = {"machine": machine(), "versions": origin.versions(), "config": dataclasses.asdict(asked)}
        print(json.dumps(said | figures))

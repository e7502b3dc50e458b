"""The command `python -m benchmarks storage`; what it measures is in `benchmarks.encodings`."""

import dataclasses
import json
import platform

from jobs import commands


@dataclasses.dataclass(frozen=True)
class Storage:
    """Bytes and CPU time of an image's maps in files, by codec and encoding: a run's maps, and those of random weights."""

    runs: tuple[str, ...] = ()
    """Folders of complete runs with maps, on a disk."""
    shapes: tuple[str, ...] = ("B/32", "B/16", "L/14")
    """Shapes of image towers with random weights, as `maps` has them; they see crops of photographs."""
    images: int = 64
    """Images of each shape."""
    k: int = 32
    """Maps of an image."""
    rounds: int = 5
    """Times that each is written and read; the least CPU time counts."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def check(self) -> None:
        """ValueError for what cannot be."""
        commands.at_least(self, images=1, k=1, rounds=1)
        from benchmarks.maps import SHAPES

        if wrong := [shape for shape in self.shapes if shape not in SHAPES]:
            raise ValueError(f"--shapes {wrong[0]}: must be of {', '.join(SHAPES)}")

    def tell(self) -> None:
        """Measure and print, table by table."""
        import pyarrow as pa
        import torch

        from benchmarks import encodings
        from saecore.runs.files import open_dataset

        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        tables = {}
        for name in (*self.runs, *self.shapes):
            if name in self.runs:
                maps = open_dataset(name, "maps").to_table().replace_schema_metadata()
            else:
                maps = encodings.random_maps(name, self.images, self.k)
            tables[name] = encodings.measure(maps, self.rounds)
            if not self.json:
                print(f"\n{name}\n\n{encodings.table(tables[name])}", flush=True)
        if self.json:
            rows = {name: [row._asdict() for row in held] for name, held in tables.items()}
            print(
                json.dumps(
                    {
                        "machine": platform.processor() or platform.machine(),
                        "config": dataclasses.asdict(self),
                        "tables": rows,
                    }
                )
            )

"""What one SRG costs: against the bare forwards of the same token sequences, and counted in forwards of whole pictures.

    python -m benchmarks.judging                            # B/32, 16 latents of each of 2 images
    python -m benchmarks.judging --shape B/16 --threads 2

Random weights of the true shapes; all ways in turn in a random order, medians of the ratios within a round (`benchmarks.maps`).

    whole       one forward of whole pictures, 16 at a time
    bare        the tower alone, on as many sequences of the same lengths as the SRG of all latents needs
    SRG         `saecore.evaluation.faithfulness.curves` by random orders: the same sequences, gathered, and the targets' values
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable

import torch
import tyro

from benchmarks import machine
from benchmarks.maps import SHAPES, random_models, time_in_turn, tower_in, unit, watch
from benchmarks.tables import aligned
from saecore.evaluation.faithfulness import STEPS, curves
from saecore.relevance.targets import Targets, no_word_targets
from saecore.removal.ways import ROWS, ROWS_ON_CPU, removal
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower

BOUND = 1.3
"""What an SRG may cost of the forwards that it needs, at B/32 and 16 latents."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What one SRG costs."""

    shape: str = "B/32"
    """B/32, B/16, L/14 or demo."""
    images: int = 2
    """Images at once."""
    latents: int = 16
    """Latents of each."""
    n_latents: int = 4096
    """Latents of the SAE."""
    rounds: int = 5
    """How often each way is timed."""
    threads: int = 1
    """CPU threads."""


def ways(given: Arguments, tower: ImageTower, sae: SAE, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    P, at_once = tower.grid[0] * tower.grid[1], ROWS_ON_CPU if pixels.device.type == "cpu" else ROWS
    drawn = torch.Generator().manual_seed(0)
    n = given.images * given.latents
    latents = torch.randint(given.n_latents, (given.images, given.latents), generator=drawn).to(pixels.device)
    order = torch.stack([torch.randperm(P, generator=drawn) for _ in range(n)]).to(pixels.device)
    order = order.view(given.images, given.latents, P)
    targets = Targets(sae, latents, no_word_targets(sae))
    whole = pixels[:1].expand(at_once, -1, -1, -1)
    first = tower.first_tokens(whole)

    def bare() -> None:
        for step in range(1, STEPS):
            length = tower.n_own + P - round(step * P / STEPS)
            for _ in range(2):
                for rows in range(0, n, at_once):
                    tower.embed_tokens(first[: min(at_once, n - rows), :length])

    def srg() -> object:
        return curves(removal("drop", tower, pixels, targets.values), order).srg

    listed: dict[str, Callable[[], object]] = {"whole": lambda: tower.embed(whole), "bare": bare, "SRG": srg}
    return {name: torch.inference_mode()(way) for name, way in listed.items()}


def main() -> int:
    """The command line; returns the exit code."""
    given = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.judging")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[given.shape]
    model, sae = random_models(shape, given.n_latents, given.latents, device)
    tower = tower_in("float32", model, shape)
    pixels = torch.randint(256, (given.images, shape.image_size, shape.image_size, 3), dtype=torch.uint8, device=device)
    torch.set_num_threads(given.threads)
    timed = time_in_turn(ways(given, tower, sae, pixels), given.rounds, watch(device, given.threads))
    at_once, n = ROWS_ON_CPU if device == "cpu" else ROWS, given.images * given.latents
    over = {
        name: statistics.median(a / b for a, b in zip(timed["SRG"], timed[name], strict=False))
        for name in ("whole", "bare")
    }
    rows = [("", "ms", "ms for each image and latent")]
    for name, seconds in timed.items():
        each = "" if name == "whole" else f"{1e3 * min(seconds) / n:,.1f}"
        rows.append((name, f"{1e3 * min(seconds):,.0f}", each))
    print(f"{given}\n{machine.machine()}\n{unit(device, given.threads)}\n\n{aligned(rows)}\n")
    met = "met" if over["bare"] <= BOUND else "missed"
    print(f"SRG / bare forwards = {over['bare']:.2f} (at most {BOUND}: {met})")
    whole = over["whole"] * at_once / n
    print(f"one image and latent: {whole:.1f} forwards of whole pictures, for {2 * (STEPS - 1)} shorter sequences")
    return 0


if __name__ == "__main__":
    sys.exit(main())

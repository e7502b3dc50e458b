"""The cost of an SAE that reads patch tokens, and of its maps, as ratios to a forward of the layers below it.

    python -m benchmarks.token_maps                                  # B/16, layer 10, 24,576 latents, k = 32
    python -m benchmarks.token_maps --shape B/32 --threads 2

As `benchmarks.maps` measures it: random weights of the true shapes, all ways in turn in a random order, medians of the ratios
within a round. Each way begins with pixels:

    forward        the layers, all tokens of the last one too
    SAE            the same, and the SAE of all tokens, its reconstruction, and the pooled latents
    a method       the same, and the maps of the k strongest latents by this method; with the check of contrib_grad's gradient
    alone          what a method adds to the SAE, by the difference
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
from saecore.methods import DEFAULT_OPTIONS
from saecore.relevance.pooling import pool_tokens
from saecore.relevance.tokens import explain_tokens, layers_needed, token_targets
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.tokens import TokenTower, tokens_at

BOUND = 1.3
"""What a forward with the maps by `contrib` may cost, the SAE not counted, at B/16, layer 10 and k = 32."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The cost of an SAE that reads patch tokens, and of its maps."""

    shape: str = "B/16"
    """B/32, B/16, L/14 or demo."""
    layer: int = 10
    """After which layer the SAE reads."""
    latents: int = 24_576
    """Latents of the SAE."""
    fires: int = 32
    """How many of them fire at a token."""
    k: int = 32
    """Latents kept of each image."""
    pools: tuple[str, ...] = ("max", "mean")
    """How tokens are pooled."""
    methods: tuple[str, ...] = ("activation", "attention", "contrib", "contrib_grad")
    """Methods of maps. contrib_grad is measured by max and cls only: it costs as much for each token that is pooled."""
    batch: int = 0
    """Images at once. 0 is the shape's own number."""
    rounds: int = 7
    """How often each way is timed."""
    threads: int = 1
    """CPU threads."""


def ways(given: Arguments, tower: TokenTower, sae: SAE, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    none = torch.empty(0, dtype=torch.int64, device=pixels.device)

    def run(pool: str, *methods: str) -> object:
        streams, trace = tower.streams(
            pixels, layers_needed(methods, DEFAULT_OPTIONS, tower.n_layers) if methods else 0
        )
        code = pool_tokens(sae, streams[:, tower.reads_from :], pool, given.k, none)
        if not methods:
            return code
        targets = token_targets(sae, tower, streams, code, pool)
        return explain_tokens(methods, tower, pixels, streams, trace, targets, code, DEFAULT_OPTIONS)

    listed: dict[str, Callable[[], object]] = {"forward": lambda: tower.embed(pixels)}
    for pool in given.pools:
        listed[f"SAE, {pool}"] = lambda pool=pool: run(pool)  # type: ignore[misc]
        for method in given.methods:
            if method != "contrib_grad" or pool in ("max", "cls"):
                listed[f"{method}, {pool}"] = lambda pool=pool, method=method: run(pool, method)  # type: ignore[misc]
    return {name: torch.inference_mode()(way) for name, way in listed.items()}


def main() -> int:
    """The command line; returns the exit code."""
    given = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.token_maps")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[given.shape]
    model, _ = random_models(shape, 1, 1, device)
    tower = tokens_at(tower_in("bfloat16" if device == "cuda" else "float32", model, shape), given.layer, "patches")
    sae = SAE(SAEConfig(n_inputs=shape.width, n_latents=given.latents, k=given.fires)).to(device).requires_grad_(False)
    for part in (sae.encoder, sae.decoder):
        assert part is not None
        torch.nn.init.normal_(part)
    batch = given.batch or shape.batch
    pixels = torch.randint(256, (batch, shape.image_size, shape.image_size, 3), dtype=torch.uint8, device=device)
    torch.set_num_threads(given.threads)
    timed = time_in_turn(ways(given, tower, sae, pixels), given.rounds, watch(device, given.threads))

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(timed[name], timed["forward"], strict=False))

    rows = [("", "ms an image", "/ forward", "alone")]
    for name, seconds in timed.items():
        sae_alone = ratio(f"SAE, {name.rpartition(', ')[2]}") if ", " in name and not name.startswith("SAE") else None
        alone = "" if sae_alone is None else f"{ratio(name) - sae_alone:+.3f}"
        rows.append((name, f"{1e3 * min(seconds) / batch:,.1f}", f"{ratio(name):.3f}", alone))
    print(f"{given}\n{machine.machine()}\n{unit(device, given.threads)}\n")
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Are maps faithful? What is left of a latent of the demo as patches are taken out in the order of each method's map.

    python -m benchmarks.faithful                            # the SAE of the embedding, tokens dropped
    python -m benchmarks.faithful --way blur --norm frozen
    python -m benchmarks.faithful --scenes 2000 --shapley 48 --method removal,contrib_grad,contrib --brief

A case is a drawn scene and one of its latents that fire. Of each method it tells:

    SRG             symmetric relevance gain, in the units of the pre-activation (`saecore.evaluation.faithfulness`)
    of another's    the same by the map of another latent of the scene: a method that tells latents apart falls
    alike           mean |rank correlation| of a scene's maps with each other: 1 where all latents have the same map
    occlusion       rank agreement with dropping single patches
    Shapley         rank agreement with Shapley values by `--subsets`, on the first `--shapley` scenes; the row `shapley` is the
                    method by its own number of subsets, drawn from another seed

Means over cases, with 95 % intervals by bootstrap over scenes. The scenes are those of no training, and all methods have the
same.
"""

import dataclasses
import sys
from collections.abc import Sequence

import numpy as np
import torch
import tyro

from benchmarks import truth
from benchmarks.tables import aligned
from saecore.evaluation import faithfulness, localisation
from saecore.evaluation.faithfulness import curves, order_of
from saecore.evaluation.localisation import Mean, mean_over_images
from saecore.methods import OF_EMBEDDING, REMOVAL, SHAPLEY, Options, parse_methods
from saecore.pipeline.models import load_models
from saecore.relevance.agreement import rank_correlation
from saecore.relevance.explain import explain_latents
from saecore.relevance.targets import Targets, no_word_targets
from saecore.removal import ways
from saecore.removal.head import Head
from saecore.removal.saved import load_head
from saecore.removal.shapley import shapley
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower

FIRST = 600_000
"""Number of the first scene, of the evaluation's seed."""

SCORES = ("SRG", "of another's", "alike", "occlusion", "Shapley")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Are maps faithful?"""

    scenes: int = 300
    """Scenes to measure on."""
    shapley: int = 32
    """Of these, scenes whose Shapley values are sampled."""
    subsets: int = 9600
    """Subsets of patches of each of these scenes. The method's own 960 agree with each other by 0.6 only, with these by 0.7."""
    latents: int = 8
    """Latents of each scene, the strongest that fire."""
    method: str = ",".join(name for name in OF_EMBEDDING if name != SHAPLEY)
    """Methods, joined by commas; shapley is measured besides, on its scenes."""
    brief: bool = False
    """Only the SRG of these methods and their agreement with Shapley values."""
    norm: str = "auto"
    """As `relmap explain --norm`."""
    way: str = "drop"
    """What taking out means: drop, mean or blur."""
    batch: int = 16
    """Scenes at once."""


class Scores:
    """Scores of each method, a number for each case, and the scene of each case."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, list[np.ndarray]]] = {}
        self.images: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, method: str, score: str, values: torch.Tensor, images: np.ndarray) -> None:
        """Values (B, n) or (B,) of the scenes with these numbers (B,)."""
        flat = values.flatten().numpy()
        self.held.setdefault(method, {}).setdefault(score, []).append(flat)
        self.images.setdefault(method, {}).setdefault(score, []).append(images.repeat(len(flat) // len(images)))

    def mean(self, method: str, score: str) -> Mean | None:
        """The mean over cases, None if there are none."""
        if score not in self.held[method]:
            return None
        values = np.concatenate(self.held[method][score])
        if np.isnan(values).all():
            return None
        return mean_over_images(values, np.concatenate(self.images[method][score]))

    def above(self, method: str, other: str, score: str = "SRG") -> Mean:
        """By how much a method has more than another, case by case."""
        one, two = (np.concatenate(self.held[name][score]) for name in (method, other))
        return mean_over_images(one - two, np.concatenate(self.images[method][score]))


@torch.inference_mode()
def measure(tower: ImageTower, sae: SAE, given: Arguments, head: Head | None = None) -> Scores:
    """All scores, of the methods and of baselines without a model."""
    scores, seen = Scores(), truth.sample(given.scenes, FIRST)
    methods, options = parse_methods(given.method), Options(norm=given.norm)
    for at in range(0, given.scenes, given.batch):
        pixels = torch.from_numpy(seen.pixels[at : at + given.batch])
        images = at + np.arange(len(pixels))
        latents = sae.encode_sparse(tower.embed(pixels), at_least=given.latents).latents[:, : given.latents]
        targets = Targets(sae, latents, no_word_targets(sae))
        wanted = dict.fromkeys(methods if given.brief else (*methods, "occlusion"))
        made = explain_latents(tower, sae, pixels, latents, tuple(wanted), options, head=head)
        maps = {name: one.relevance for name, one in made.items()}
        if not given.brief:
            maps |= without_model(pixels, maps["occlusion"].shape, tower.grid, at)
        remove = ways.removal(given.way, tower, pixels, targets.values)
        reference = None
        if n_sampled := int((images < given.shapley).sum()):
            few, taken = Targets(sae, latents[:n_sampled], no_word_targets(sae)), images[:n_sampled]
            of_few = ways.removal(given.way, tower, pixels[:n_sampled], few.values)
            n_patches = next(iter(maps.values())).shape[-1]
            reference = shapley(of_few, n_patches, n_sampled, given.subsets).values
            own = shapley(of_few, n_patches, n_sampled, seed=1).values
            for name, values in (("Shapley values", reference), (SHAPLEY, own)):
                scores.add(name, "SRG", curves(of_few, order_of(values)).srg, taken)
                scores.add(name, "alike", faithfulness.alikeness(values), taken)
            scores.add(SHAPLEY, "Shapley", rank_correlation(own, reference), taken)
        for name, values in maps.items():
            order = order_of(values)
            found = curves(remove, order)
            scores.add(name, "SRG", found.srg, images)
            if reference is not None:
                scores.add(name, "Shapley", rank_correlation(values[:n_sampled], reference), images[:n_sampled])
            if given.brief:
                continue
            scores.add(name, "of another's", found.srg_of_another, images)
            scores.add(name, "alike", faithfulness.alikeness(values), images)
            if name != "occlusion":
                scores.add(name, "occlusion", rank_correlation(values, maps["occlusion"]), images)
    return scores


def without_model(pixels: torch.Tensor, shape: torch.Size, grid: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Maps of that shape (B, n, P) that have not seen the model."""
    made = {
        "centre": localisation.centre(len(pixels), grid),
        "edges": localisation.edges(pixels.numpy(), grid),
    }
    maps = {name: torch.from_numpy(m).float()[:, None].expand(shape) for name, m in made.items()}
    drawn = localisation.noise(len(pixels) * shape[1], grid, seed=seed)
    return maps | {"random": torch.from_numpy(drawn).float().view(shape)}


def markdown(scores: Scores) -> str:
    """A row for each method: means +- half of each interval."""
    rows: list[Sequence[str]] = [("", *SCORES)]
    for method in scores.held:
        means = [scores.mean(method, score) for score in SCORES]
        rows.append((method, *("" if m is None else f"{m.value:.2f} ± {(m.high - m.low) / 2:.2f}" for m in means)))
    return aligned(rows)


def main() -> int:
    """The command line; returns the exit code."""
    given = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.faithful")
    tower, sae = load_models("demo", "demo")
    scores = measure(tower, sae, given, load_head("demo"))
    print(f"{given}\n\n{markdown(scores)}\n")
    methods = parse_methods(given.method)
    first = REMOVAL if REMOVAL in methods else methods[0]
    for other in scores.held:
        if other not in (first, SHAPLEY, "Shapley values"):
            apart = scores.above(first, other)
            print(f"{first} - {other}: SRG {apart.value:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())

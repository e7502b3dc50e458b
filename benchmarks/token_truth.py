"""Do maps lie on the right object where the SAE reads patch tokens? Where a latent is active, and what causes it.

    python -m benchmarks truth --pool max

As `benchmarks.truth`, on the same scenes, for the demo's SAE of patch tokens: a case is a scene and a latent that follows one
word and fires there. The latents are chosen by their pooled activations.
"""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks import truth
from benchmarks.truth import Cases, Sample
from saecore.demo.figures import followed
from saecore.demo.lessons import WORDS
from saecore.evaluation import localisation
from saecore.methods import DEFAULT_OPTIONS, OF_TOKENS
from saecore.relevance.pooling import Pooled, pool_tokens
from saecore.relevance.tokens import explain_tokens, layers_needed, token_targets
from saecore.sae.model import SAE
from saecore.towers.tokens import TokenTower


@torch.inference_mode()
def followers(tower: TokenTower, sae: SAE, pool: str, seen: Sample) -> dict[int, str]:
    """Latents that follow a word by their pooled activations, and the word that each follows best."""
    rows, none = [], torch.empty(0, dtype=torch.int64)
    for at in range(0, len(seen.pixels), truth.BATCH):
        streams = tower.embed(torch.from_numpy(seen.pixels[at : at + truth.BATCH]))
        code = pool_tokens(sae, streams, pool, sae.config.n_latents, none)
        rows.append(torch.zeros_like(code.pooled).scatter(1, code.latents, code.pooled))
    best = followed(torch.cat(rows), seen.scenes).max(dim=1)
    chosen = torch.nonzero(best.values > truth.FOLLOWS).flatten().tolist()
    return {latent: WORDS[int(best.indices[latent])] for latent in chosen}


@torch.inference_mode()
def measure(
    tower: TokenTower, sae: SAE, pool: str, n_scenes: int, tell: Callable[[int], object] = truth.nothing
) -> tuple[dict[int, str], dict[str, Cases]]:
    """The latents that follow a word, and the cases by kind of scene, with maps by every method that explains tokens."""
    following = followers(tower, sae, pool, truth.sample(n_scenes, truth.FIRST_CHOSEN))
    asked, seen = torch.tensor(list(following)), truth.sample(n_scenes, truth.FIRST_MEASURED)
    layers = layers_needed(OF_TOKENS, DEFAULT_OPTIONS, tower.n_layers)
    fires: list[np.ndarray] = []
    parts: dict[str, list[np.ndarray]] = {method: [] for method in OF_TOKENS}
    for at in range(0, n_scenes, truth.BATCH):
        pixels = torch.from_numpy(seen.pixels[at : at + truth.BATCH])
        streams, trace = tower.streams(pixels, layers)
        code = pool_tokens(sae, streams[:, tower.reads_from :], pool, 1, asked)
        code = Pooled(code.latents[:, 1:], code.pooled[:, 1:], code.at_tokens[:, 1:], *code[3:])
        targets = token_targets(sae, tower, streams, code, pool)
        made = explain_tokens(OF_TOKENS, tower, pixels, streams, trace, targets, code, DEFAULT_OPTIONS)
        fires.append((code.pooled != 0).numpy())
        for method, one in made.items():
            parts[method].append(one.relevance.numpy())
        tell(len(pixels))
    shown = truth.covered(seen.scenes, list(following.values()), tower.grid)
    image, target = np.nonzero(np.any(shown >= localisation.ON, axis=-1) & np.concatenate(fires))
    maps = {method: np.concatenate(batches)[image, target] for method, batches in parts.items()}
    maps["centre"] = localisation.centre(len(image), tower.grid)
    maps["edges"] = localisation.edges(seen.pixels, tower.grid)[image]
    maps["random"] = localisation.noise(len(image), tower.grid)
    cases = Cases(image, shown[image, target], maps)
    mixed = np.array([len(scene.things) > 1 for scene in seen.scenes])
    return following, {"latents, all scenes": cases, "latents, mixed scenes": cases.where(mixed[image])}

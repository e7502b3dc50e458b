"""How good the embedded default is: zero-shot accuracy of its CLIP, reconstruction and meaning of its SAE's latents.

All figures are of scenes that neither saw in training. Images are what the job makes of them: a JPEG of 192 pixels a side,
resized to 64.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerFast

from saecore.demo.lessons import FACETS, PROMPTS, TOKEN_KEYS, WORDS, normalise, photo
from saecore.demo.scenes import Scene
from saecore.evaluation.localisation import separation
from saecore.sae.model import SAE


def image_embeddings(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Embeddings before any normalisation, as the job stores them and the SAE reads them."""
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def text_embeddings(model: CLIPModel, tokens: dict[str, Tensor]) -> Tensor:
    return model.text_projection(model.text_model(**tokens).pooler_output)


@torch.no_grad()
def embed(model: CLIPModel, sample: list[Scene]) -> Tensor:
    """Embeddings [scenes, d] of the scenes' photos, 256 at a time."""
    parts = []
    with ThreadPoolExecutor() as pool:
        for at in range(0, len(sample), 256):
            pixels = np.stack(list(pool.map(photo, sample[at : at + 256])))
            parts.append(image_embeddings(model, normalise(pixels)))
    return torch.cat(parts)


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: Tensor, sample: list[Scene]
) -> dict[str, float]:
    """Accuracy of text prompts for the colour and shape of the only object, and of the largest of several."""
    figures: dict[str, float] = {}
    single = torch.tensor([len(scene.things) == 1 for scene in sample])
    for facet in ("colour", "shape"):
        words = FACETS[facet]
        texts = [
            p.format(word if facet == "shape" or p == "{}" else f"{word} object") for word in words for p in PROMPTS
        ]
        tokens = tokenizer([t.replace("a orange", "an orange") for t in texts], padding=True, return_tensors="pt")
        text = F.normalize(text_embeddings(model, {k: tokens[k] for k in TOKEN_KEYS}), dim=-1)
        guess = (F.normalize(images, dim=-1) @ text.view(len(words), len(PROMPTS), -1).mean(dim=1).T).argmax(dim=-1)
        right = guess == torch.tensor([words.index(getattr(scene.things[0], facet)) for scene in sample])
        figures |= {f"single {facet}": right[single].float().mean().item()}
        figures |= {f"mixed {facet}": right[~single].float().mean().item()}
    return figures


def followed(activations: Tensor, sample: list[Scene]) -> Tensor:
    """How well each latent separates scenes that show a word of `WORDS` from the others: area under the ROC curve [n, words].

    0.5 is chance. Scenes in which a latent is off are ties: all of them have the mean of their ranks.
    """
    there = np.array([[any(w in (t.colour, t.shape, t.texture) for t in s.things) for w in WORDS] for s in sample])
    return torch.from_numpy(separation(activations.clamp(min=0).numpy(), there)).float()


@torch.no_grad()
def sae_figures(sae: SAE, x: Tensor, sample: list[Scene]) -> dict[str, float]:
    """Reconstruction and use of the latents on embeddings of `sample`."""
    code = sae.encode_sparse(x)
    activations = torch.zeros(len(x), sae.config.n_latents).scatter(1, code.latents, code.activations)
    best = followed(activations, sample).max(dim=1)
    return {
        "cosine": F.cosine_similarity(sae.reconstruct(x), x).mean().item(),
        "cosine, centred": F.cosine_similarity(sae.reconstruct(x) - sae.mean, x - sae.mean).mean().item(),
        "dead": (activations.max(dim=0).values <= 0).float().mean().item(),
        "l0": (activations > 0).sum(dim=1).float().mean().item(),
        "latents following a word": float((best.values > 0.95).sum()),
        "words followed": float(best.indices[best.values > 0.95].unique().numel()),
    }

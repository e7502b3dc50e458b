"""Train the embedded CLIP on drawn scenes and captions. `python -m benchmarks.demo clip` runs it.

It is an ordinary `transformers.CLIPModel` with its own word-level tokenizer. It learns from two captions of each scene, one of
all objects and one of the largest object only, by the contrastive loss. Auxiliary losses read attributes off the image
embedding and off the patch tokens through linear heads, which are not saved. Scenes never repeat. The first show one plain
object in the middle, and scenes grow harder as the model passes (`saecore.demo.lessons.at_level`).

Left out: several machines and mixed precision, since this is written for one small machine.
"""

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from saecore.demo import drawing, scenes
from saecore.demo.figures import embed, text_embeddings, zero_shot
from saecore.demo.lessons import FACETS, MEAN, PIXELS, STD, WORDS, Batch, make_batch, make_tokenizer, normalise

CLIP_FOLDER, SAE_FOLDER = Path(__file__).parent / "clip", Path(__file__).parent / "sae"


def make_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """The model before training: images of 8 x 8 patches, five layers, and two layers for text."""
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 40,
        "hidden_size": 128,
        "intermediate_size": 256,
    }
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 128, "hidden_act": "quick_gelu"} | ends
    vision: dict[str, object] = {"image_size": PIXELS, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
    vision |= {"num_hidden_layers": 5, "num_attention_heads": 4, "projection_dim": 128, "hidden_act": "quick_gelu"}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


class Heads(nn.Module):
    """Linear read-outs of the image embedding and of the patch tokens, for training only."""

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.largest = nn.ModuleDict({facet: nn.Linear(embedding, len(words)) for facet, words in FACETS.items()})
        self.present = nn.Linear(embedding, len(WORDS))
        self.patches = nn.ModuleList(nn.Linear(width, 1 + len(FACETS[facet])) for facet in ("colour", "shape"))

    def forward(self, images: Tensor, tokens: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of the embedding (facets of the largest, presence of every word) and loss of the patches, both to be added."""
        facets = [F.cross_entropy(head(images), batch.truth_BF[:, i]) for i, head in enumerate(self.largest.values())]
        present = F.binary_cross_entropy_with_logits(self.present(images), batch.present_BW)
        patches = [
            F.cross_entropy(head(tokens).transpose(1, 2), batch.patches_BFP[:, i])
            for i, head in enumerate(self.patches)
        ]
        return torch.stack(facets).mean() + 3 * present, 2 * torch.stack(patches).sum()


def contrast(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss without the negatives in which `same[i, j]`: text j is true of image i too."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -math.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def whiten(model: CLIPModel) -> None:
    """Start the patch embedding as a random rotation of whitened patches.

    Flat colour has 10,000 times the variance of edges here: without whitening and without levels
    (`saecore.demo.lessons.at_level`), shapes were still at chance after 100,000 scenes.
    """
    pixels = normalise(np.stack([drawing.render(scene, PIXELS) for scene in scenes.scenes_of(scenes.SEED_SAE, 400)]))
    weight = model.vision_model.embeddings.patch_embedding.weight
    width, size = len(weight), weight.shape[-1]
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    spread, axes = torch.linalg.eigh((patches - patches.mean(dim=0)).T.cov())
    spread, axes = spread.flip(0)[:width], axes.flip(1)[:, :width]
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    whitened = (axes / (spread + 1e-4 * spread[0]).sqrt()).T
    with torch.no_grad():
        weight.copy_((0.5 * rotation @ whitened).view_as(weight))
        model.vision_model.embeddings.position_embedding.weight.normal_(0, 0.3)  # to the patches' new size


def losses(model: CLIPModel, heads: Heads, batch: Batch) -> tuple[tuple[Tensor, ...], float]:
    """To be added: contrast of the largest, contrast of all, and the two of `Heads`; and the share of shapes told right."""
    seen = model.vision_model(pixel_values=batch.pixels)
    image = model.visual_projection(seen.pooler_output)
    scale = model.logit_scale.exp().clamp(max=100)
    told, truth = batch.told_BF[None, :, :], batch.truth_BF[:, None, :]
    true_too = ((told == -1) | (told == truth)).all(dim=-1)
    ids = batch.all_text["input_ids"]
    alike = (ids[:, None] == ids[None]).all(dim=-1)
    largest = contrast(image, text_embeddings(model, batch.largest_text), scale, true_too)
    everything = contrast(image, text_embeddings(model, batch.all_text), scale, alike)
    right = heads.largest["shape"](image).argmax(dim=1) == batch.truth_BF[:, list(FACETS).index("shape")]
    return (largest, everything, *heads(image, seen.last_hidden_state[:, 1:], batch)), right.float().mean().item()


@dataclass(frozen=True)
class ClipBuild:
    """Train the small CLIP."""

    minutes: float = 50
    """Wall-clock budget, minutes, resumed runs included; the learning rate decays over its second half."""
    batch: int = 64
    """Scenes a step."""
    rate: float = 1e-3
    """Peak learning rate of AdamW."""
    decay: float = 0.05
    """Weight decay of matrices."""
    pass_mark: float = 0.75
    """The lessons become harder after a batch in which the model tells this share of the shapes right."""
    lessons: int = 500
    """Number of such batches from the easiest level to scenes as they are."""
    threads: int = 2
    """PyTorch threads."""
    checkpoint: Path = Path("runs/demo-build/clip.pt")
    """Where to save every two minutes, and to resume from if it exists."""
    out: Path = CLIP_FOLDER
    """Folder for the model, its tokenizer and its image processor."""


class ClipTraining:
    """The model, the heads and the optimiser, and how far they are: what the next step depends on, besides its batch."""

    def __init__(self, config: ClipBuild) -> None:
        torch.manual_seed(0)
        self.config = config
        self.tokenizer = make_tokenizer()
        self.model = make_clip(self.tokenizer)
        self.heads = Heads(self.model.config.projection_dim, self.model.config.vision_config.hidden_size)
        named = [*self.model.named_parameters(), *self.heads.named_parameters()]
        self.weights = [weight for _, weight in named]
        decays = {id(weight) for name, weight in named if weight.ndim >= 2 and "embedding" not in name}
        matrices = [weight for weight in self.weights if id(weight) in decays]
        others = [weight for weight in self.weights if id(weight) not in decays]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.rate,
            betas=(0.9, 0.98),
        )
        whiten(self.model)
        self.scenes = 0
        """Scenes seen."""
        self.level = 0.0
        """How hard the lessons are (`saecore.demo.lessons.at_level`)."""

    def step(self, batch: Batch, progress: float) -> list[float]:
        """One step at that share of the budget, from 0 to 1; the four losses before it, as `losses` lists them."""
        warm = (self.scenes + self.config.batch) / 5_000
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.rate * min(1.0, warm, max(2 * (1 - progress), 0.01))
        parts, right = losses(self.model, self.heads, batch)
        if right >= self.config.pass_mark:
            self.level = min(1.0, self.level + 1 / self.config.lessons)
        self.optimiser.zero_grad()
        torch.stack(parts).sum().backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.scenes += self.config.batch
        return [part.item() for part in parts]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "done": self.scenes,
            "level": self.level,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was left."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scenes, self.level = state["done"], state["level"]


def train_clip(config: ClipBuild) -> None:
    """Train until the budget is spent; resume from the checkpoint if there is one; print figures every 150 steps."""
    torch.set_num_threads(config.threads)
    training, spent = ClipTraining(config), 0.0
    if config.checkpoint.exists():
        state = torch.load(config.checkpoint, weights_only=True)
        training.restore(state)
        spent = state["spent"]
    sample = list(scenes.scenes_of(scenes.SEED_EVALUATION, 256))
    mark, saved, recent = time.monotonic(), spent, list[list[float]]()
    with ThreadPoolExecutor(1) as pool:
        batches = _batches(training, pool)
        while (progress := spent / (60 * config.minutes)) < 1:
            recent.append(training.step(next(batches), progress))
            # A pause (a suspended laptop) is no training: a step counts two seconds at most.
            now = time.monotonic()
            spent, mark = spent + min(now - mark, 2.0), now
            if len(recent) == 150:
                seen = zero_shot(training.model, training.tokenizer, embed(training.model, sample), sample)
                means = dict(zip(("largest", "all", "attributes", "patches"), np.mean(recent, axis=0), strict=True))
                figures = ", ".join(f"{name} {value:.3f}" for name, value in (means | seen).items())
                where = f"{spent / 60:5.1f} min {training.scenes:7d} scenes, level {training.level:.2f}"
                print(f"{where}: {figures}", flush=True)
                recent = []
            if spent - saved > 120 or spent > 60 * config.minutes:
                saved = spent
                config.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                torch.save(training.state() | {"spent": spent}, config.checkpoint.with_suffix(".new"))
                config.checkpoint.with_suffix(".new").replace(config.checkpoint)
                save_clip(training.model, training.tokenizer, config.out)
    print(f"{training.scenes} scenes in {spent / 60:.0f} minutes; written to {config.out}")


def _batches(training: ClipTraining, pool: ThreadPoolExecutor, ahead: int = 4) -> Iterator[Batch]:
    """Batches from where the training is, drawn by another thread while it steps, so at the level of `ahead` steps before."""
    waiting = deque[Future[Batch]]()
    for start in itertools.count(training.scenes, training.config.batch):
        waiting.append(pool.submit(make_batch, training.tokenizer, start, training.config.batch, training.level))
        if len(waiting) > ahead:
            yield waiting.popleft().result()


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Model, tokenizer and image processor, as `transformers` 4 and 5 load them."""
    from transformers import CLIPImageProcessor

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its new name for the class; 4 knows the old one only, 5 knows both.
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described = {key: value for key, value in described.items() if key != "backend"}
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    CLIPImageProcessor(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)

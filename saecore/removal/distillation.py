"""Train a head of removal (`saecore.removal.head`): no labels, only what the frozen tower makes of pictures without patches.

    loss = mean over images and subsets S of |(e(S) - e(no patches) - sum_{i in S} phi_i) W|^2

Subsets come by the sizes that the Shapley kernel gives them, in pairs of S and the patches that are not in S. Of all complete
phi the Shapley values have the least of that loss, for each image and under any metric W (Charnes et al. 1988; FastSHAP,
arXiv:2107.07436): a metric only says which directions a head that cannot have them all right should have right. W whitens
e(S) - e(no patches), since a text and an atom of an SAE do not read along the largest variance of embeddings.

Forwards without patches cost most, so their embeddings are used in some rounds over the images (`Recipe.reuse`) before other
subsets are drawn. Images, subsets and order depend on the seed and the number of the step only. So a training that goes on from
a checkpoint, and makes these embeddings again, ends at the weights of one that was not interrupted.

The matrices of the head's transformer are trained by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), all else by
AdamW. With a head of two layers in the demo, 1,500 steps then reach what AdamW alone reaches in 5,000.

Left out: files, and decoding of images (`jobs.distill`).

Shapes as in `saecore.removal.head`; K subsets of each image.
"""

import contextlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saecore.removal.head import Head, completed, nothing
from saecore.removal.recipe import Recipe
from saecore.removal.shapley import shapley
from saecore.removal.ways import Removal, dropping
from saecore.towers.tower import ImageTower

WARM_UP = 100
"""Steps in which the rate rises."""

DECAY = 0.01
"""Weight decay of both optimisers."""

MEASURED = 4
"""Groups of images on which the metric is measured."""


class Drawn(NamedTuple):
    """Subsets of the patches of B images."""

    kept: list[Tensor]
    """K tensors int64 (B, m): the patches in the subset, as many for every image."""
    members: Tensor
    """float32 (B, K, P): 1 where a patch is in the subset."""


def draw(images: int, n_patches: int, subsets: int, generator: torch.Generator) -> Drawn:
    """Subsets in pairs of a set and the patches that it lacks, of sizes by the Shapley kernel.

    All images have the same sizes, which come from K / 2 equal parts of their distribution: so their forwards have one length.
    """
    sizes = torch.arange(1, n_patches, dtype=torch.float64)
    share = (1 / (sizes * (n_patches - sizes))).cumsum(0)
    pairs = subsets // 2
    at = (torch.arange(pairs) + torch.rand(pairs, generator=generator, dtype=torch.float64)) / pairs
    kept, members = list[Tensor](), list[Tensor]()
    for size in (torch.searchsorted(share / share[-1], at).clamp(max=n_patches - 2) + 1).tolist():
        order = torch.rand(images, n_patches, generator=generator).argsort(1)
        for part in (order[:, :size], order[:, size:]):
            kept.append(part)
            members.append(torch.zeros(images, n_patches).scatter(1, part, 1.0))
    return Drawn(kept, torch.stack(members, 1))


class Group(NamedTuple):
    """The images of a step. They stay together as long as their subsets are used."""

    images: Tensor
    """int64 (B,)."""
    members: Tensor
    """float32 (B, K, P)."""
    apart: Tensor
    """float16 (B, K, E): e(S) - e(no patches)."""


class Distillation:
    """A head in training. `step` numbers count from 0; `load` takes up what `state` gave."""

    def __init__(self, head: Head, tower: ImageTower, pixels: Tensor, recipe: Recipe) -> None:
        self.head, self.tower, self.pixels, self.recipe = head, tower, pixels, recipe
        self.device = tower.mean.device
        self.done = 0
        """Steps that are done."""
        self._era = -1
        self._held: dict[int, Group] = {}
        matrices = {name: p for name, p in head.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
        others = [p for name, p in head.named_parameters() if name not in matrices]
        self.optimisers: list[tuple[float, torch.optim.Optimizer]] = [
            (recipe.rate, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=DECAY)),
            (recipe.muon_rate, torch.optim.Muon(matrices.values(), weight_decay=DECAY)),
        ]
        """Each with its largest rate."""
        layer = tower.path()[0].out
        self.half: contextlib.AbstractContextManager[Any] = (
            torch.autocast(self.device.type, torch.bfloat16)
            if layer.dtype == torch.bfloat16
            else contextlib.nullcontext()
        )

    @torch.no_grad()
    def begin(self, first: Head | None = None) -> None:
        """Measure what the head needs of the tower: its embedding without patches, and the metric, on a few batches.

        first: a head of the same size whose weights, and whose metric, are taken instead.
        """
        if first is not None:
            self.head.load_state_dict(first.state_dict())
        self.head.empty.copy_(nothing(self.tower))
        if first is not None:
            return
        groups = min(MEASURED, max(1, len(self.pixels) // self.recipe.images_per_step))
        apart = torch.cat([self._batch(number).apart.flatten(0, 1) for number in range(groups)]).double()
        values, directions = torch.linalg.eigh(apart.mT @ apart / len(apart))
        deviation = (values.clamp(min=0) + self.recipe.ridge * values.mean()).sqrt()
        self.head.whiten.copy_(directions / deviation)
        self.head.unwhiten.copy_((directions * deviation).mT)

    def step(self) -> float:
        """One step; returns its loss."""
        recipe, number = self.recipe, self.done
        with torch.no_grad():
            group = self._batch(number)
            embedding, trace = self.tower(self.pixels[group.images].to(self.device), keys=True)
            apart = group.apart.to(self.device).float() @ self.head.whiten
            total = (embedding - self.head.empty) @ self.head.whiten
        with self.half:
            phi = self.head.whitened(self.tower, trace)
        loss = (apart - group.members.to(self.device) @ completed(phi.float(), total)).square().mean()
        self.head.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for rate, optimiser in self.optimisers:
            for settings in optimiser.param_groups:
                settings["lr"] = rate * min(1.0, (number + 1) / WARM_UP) * (1 - number / recipe.steps)
            optimiser.step()
        self.done += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that a training goes on from."""
        return {
            "done": self.done,
            "head": self.head.state_dict(),
            "optimisers": [one.state_dict() for _, one in self.optimisers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.head.load_state_dict(state["head"])
        for (_, one), held in zip(self.optimisers, state["optimisers"], strict=True):
            one.load_state_dict(held)
        self.done = state["done"]

    def _batch(self, number: int) -> "Group":
        """The images of a step, with their subsets and what the tower makes of these."""
        groups = max(1, len(self.pixels) // self.recipe.images_per_step)
        turn, place = divmod(number, groups)
        era = turn // self.recipe.reuse
        if era != self._era:
            self._era = era
            self._held.clear()
        group = int(torch.randperm(groups, generator=self._generator(turn, 0))[place])
        if group not in self._held:
            self._held[group] = self._make(era, group)
        return self._held[group]

    def _make(self, era: int, group: int) -> "Group":
        """A group of an era: its images, its subsets, and the embeddings of these in half precision."""
        recipe = self.recipe
        size, (height, width) = recipe.images_per_step, self.tower.grid
        order = torch.randperm(len(self.pixels), generator=self._generator(era, 1))
        images = order[group * size : (group + 1) * size]
        drawn = draw(len(images), height * width, recipe.subsets, self._generator(era, 2 + group))
        return Group(images, drawn.members, self._apart(self.pixels[images].to(self.device), drawn).half().cpu())

    def _generator(self, *of: int) -> torch.Generator:
        """Random numbers that depend on the seed and on what they are for, and on nothing that was drawn before."""
        mixed = np.random.SeedSequence((self.recipe.seed, *of)).generate_state(1)[0]
        return torch.Generator().manual_seed(int(mixed))

    def _apart(self, pixels: Tensor, drawn: Drawn) -> Tensor:
        """e(S) - e(no patches), float32 (B, K, E)."""
        remove = of_embedding(self.tower, pixels)
        left = [remove(kept[:, None].to(self.device))[:, 0] for kept in drawn.kept]
        return torch.stack(left, 1) - self.head.empty


def of_embedding(tower: ImageTower, pixels: Tensor) -> Removal:
    """The embedding itself as patches are dropped: its E coordinates are the targets."""
    return dropping(tower, pixels, lambda embeddings: embeddings)


# ---- How good it is.


class HeldOut(NamedTuple):
    """A head against sampled Shapley values, on images that it was not trained on."""

    error: float
    """Squared distance from the sampled values as a part of their own square, whitened."""
    of_sampling: float
    """How much of that is the sampled values' own error, likewise."""
    predicted: Tensor
    """float32 (B, n, P): read-outs of the head, along the n images' own embeddings less their mean."""
    sampled: Tensor
    """float32 (B, n, P): the same of the sampled values."""


@torch.no_grad()
def held_out(head: Head, tower: ImageTower, pixels: Tensor, subsets: int) -> HeldOut:
    """Compare a head with Shapley values by so many subsets, image by image."""
    embedding, trace = tower(pixels, keys=True)
    phi = head(tower, trace, embedding)
    found = [
        shapley(dropping(tower, one, lambda left: left @ head.whiten), phi.shape[1], 1, subsets)
        for one in pixels.split(1)
    ]
    sampled, own = (torch.cat(part).mT for part in zip(*found, strict=True))  # B P E, whitened
    size = sampled.square().sum()
    error = (phi @ head.whiten - sampled).square().sum() / size
    along = (embedding - embedding.mean(0)).expand(len(phi), -1, -1)
    return HeldOut(float(error), float(own.square().sum() / size), along @ phi.mT, along @ (sampled @ head.unwhiten).mT)

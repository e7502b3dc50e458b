"""One SAE in training: a step of the optimiser, and everything that the next step depends on.

    gradient of `saecore.training.objectives.objective`
    -> its part along each decoder row is removed
    -> it is clipped to `clip_norm`
    -> AdamW (betas 0.9, 0.999, eps 6.25e-10, no weight decay)
    -> decoder rows are brought back to length 1

This is MSAE's order, except that MSAE restores the length before the step. Of several processes each takes every `world`-th
row of the same batches, and gradients are averaged, so that their number changes results only by rounding; the exception is
batchtopk, which selects within the rows of a process.

Left out: when to evaluate, save and stop (`saecore.training.loop`).
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from saecore.sae.calibration import calibrate
from saecore.sae.model import SAE
from saecore.training.objectives import objective
from saecore.training.recipe import Recipe, pace
from saecore.training.survey import Survey, geometric_median

MAX_DEAD_AFTER = 1_000_000
"""The largest default of `Recipe.dead_after`, in embeddings."""

RESAMPLE_ENCODER = 0.2
"""Length of a resampled latent's encoder row, divided by the mean length of the rows of latents that are not dead (Bricken et
al. 2023, Towards Monosemanticity)."""


class Worker(NamedTuple):
    """The place of this process among those that train together."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"


class Trainer:
    """An SAE, its optimiser, and the counters that they need."""

    def __init__(self, recipe: Recipe, width: int, seen: Survey, worker: Worker) -> None:
        self.recipe, self.worker, self.step = recipe, worker, 0
        torch.manual_seed(recipe.seed)
        self.sae = initial(recipe, width, seen).to(worker.device)
        self.parameters = [parameter for parameter in self.sae.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=recipe.peak_rate(), eps=6.25e-10, weight_decay=0.0, fused=True
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters] if recipe.ema else []
        self.dead_after = recipe.dead_after or min(seen.rows - len(seen.held_out), MAX_DEAD_AFTER)
        self.silent = torch.zeros(recipe.latents, dtype=torch.int64, device=worker.device)
        """int64 (n,): embeddings since each latent fired."""

    @property
    def dead(self) -> Tensor:
        """bool (n,): latents that have not fired for `dead_after` embeddings."""
        return self.silent >= self.dead_after

    def train(self, batch: np.ndarray, total: int) -> float:
        """One step on a whole batch (batch_size, d), of which this worker takes its rows; returns the loss."""
        # A copy: the batch is a view of the buffer, and this worker takes every world-th row of it.
        x = torch.from_numpy(batch[self.worker.rank :: self.worker.world].copy()).to(
            self.worker.device, non_blocking=True
        )
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.peak_rate() * pace(self.recipe, self.step, total)
        outcome = objective(self.sae, self.recipe, x, self.dead)
        self.optimiser.zero_grad(set_to_none=True)
        outcome.loss.backward()
        self._share(outcome.fired)
        self._project()
        if self.recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm, foreach=True)
        self.optimiser.step()
        self._normalise()
        self.silent += len(batch)
        self.silent[outcome.fired] = 0
        self.step += 1
        period = max(1, self.dead_after // len(batch))
        if self.recipe.dead == "resample" and self.step % period == 0:
            self._resample(x, outcome.error)
        for average, parameter in zip(self.average, self.parameters, strict=bool(self.average)):
            average.lerp_(parameter.detach(), 1 - self.recipe.ema)
        return float(outcome.loss.detach())

    def _share(self, fired: Tensor) -> None:
        if self.worker.world == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradient = parameter.grad.contiguous()
            torch.distributed.all_reduce(gradient)
            parameter.grad.copy_(gradient / self.worker.world)
        counted = fired.int()
        torch.distributed.all_reduce(counted)
        fired.copy_(counted > 0)

    @torch.no_grad()
    def _project(self) -> None:
        decoder = self.sae.decoder
        if decoder is not None and decoder.grad is not None:
            decoder.grad -= (decoder.grad * decoder).sum(-1, keepdim=True) * decoder

    @torch.no_grad()
    def _normalise(self) -> None:
        if self.sae.decoder is not None:
            self.sae.decoder.copy_(F.normalize(self.sae.decoder, dim=-1))
        if isinstance(self.sae.threshold, torch.nn.Parameter):
            self.sae.threshold.clamp_(min=0)

    @torch.no_grad()
    def _resample(self, x: Tensor, error: Tensor) -> None:
        """Each dead latent begins anew as an embedding, which is drawn with a probability proportional to its squared error."""
        places = self.dead.nonzero().squeeze(1)
        if not len(places):
            return
        rows = torch.cat(_gathered(self.sae.inputs(x).values - self.sae.pre_bias, self.worker))
        weight = torch.cat(_gathered(error.square().sum(-1), self.worker))
        generator = torch.Generator().manual_seed(self.recipe.seed + self.step)
        chosen = torch.multinomial(
            weight.cpu(), len(places), replacement=len(places) > len(weight), generator=generator
        )
        directions = F.normalize(rows[chosen.to(rows.device)], dim=-1)
        alive = ~self.dead
        length = self.sae.encoder[:, alive].norm(dim=0).mean() if alive.any() else rows.new_tensor(1.0)
        self.sae.encoder.T[places] = directions * length * RESAMPLE_ENCODER
        self.sae.latent_bias[places] = 0
        if self.sae.decoder is not None:
            self.sae.decoder[places] = directions
        for parameter in (self.sae.encoder, self.sae.latent_bias, self.sae.decoder):
            state = self.optimiser.state.get(parameter, {}) if parameter is not None else {}
            for moment in (state[name] for name in ("exp_avg", "exp_avg_sq") if name in state):
                (moment.T if parameter is self.sae.encoder else moment)[places] = 0
        self.silent[places] = 0

    # ---- What is kept.

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "step": self.step,
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "silent": self.silent,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = [tensor.to(self.worker.device) for tensor in state["average"]]
        self.silent = state["silent"].to(self.worker.device)

    def finished(self, sample: Tensor, source: str = "") -> SAE:
        """The SAE as it would be saved now: of the averaged weights if the recipe has an average, and with a threshold."""
        sae = (
            SAE(dataclasses.replace(self.sae.config, source=source)).to(self.worker.device).requires_grad_(False).eval()
        )
        sae.load_state_dict(self.sae.state_dict())
        for own, average in zip(sae.parameters(), self.average, strict=bool(self.average)):
            own.copy_(average)
        if sae.config.architecture == "batchtopk":
            calibrate(sae, sample, self.recipe.k)
        return sae


def initial(recipe: Recipe, width: int, seen: Survey) -> SAE:
    """An untrained SAE: random unit decoder rows, encoder their transpose, standardisation from the survey."""
    sae = SAE(recipe.sae(width))
    atoms = F.normalize(torch.randn(recipe.latents, width), dim=-1)
    with torch.no_grad():
        sae.encoder.copy_(atoms.T)
        if sae.decoder is not None:
            sae.decoder.copy_(atoms)
        if recipe.centre:
            sae.mean.copy_(torch.from_numpy(seen.mean))
        if recipe.rescale:
            sae.scale.fill_(seen.scale)
        sample = torch.from_numpy(seen.sample)
        if recipe.pre_bias == "median":
            sae.pre_bias.copy_(torch.from_numpy(geometric_median(sae.inputs(sample).values.numpy())))
        if isinstance(sae.threshold, torch.nn.Parameter):
            # With these thresholds k latents fire from the first step on. A threshold far from all pre-activations has no
            # gradient and would stay there.
            p = sae.pre_activations(sample[:1024])
            strength = (p.abs() if recipe.by_magnitude else p).flatten()
            sae.threshold.fill_(max(0.0, float(strength.kthvalue(len(strength) - recipe.k * len(p) + 1).values)))
    return sae


def _gathered(rows: Tensor, worker: Worker) -> list[Tensor]:
    if worker.world == 1:
        return [rows]
    parts = [torch.empty_like(rows) for _ in range(worker.world)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return parts

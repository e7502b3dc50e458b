"""The straightforward way, that benchmarks compare with: correct, dense, written as papers write it."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class DenseTopK(nn.Module):
    """TopK SAE in plain PyTorch, or several nested k of one: dense activations, a dense decode a level, all by autograd."""

    def __init__(self, width: int, latents: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        atoms = F.normalize(torch.randn(latents, width), dim=-1)
        self.levels = levels
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.encoder = nn.Parameter(atoms.T.contiguous())
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Parameter(atoms.clone())
        self.optimiser = torch.optim.AdamW(self.parameters(), lr=5e-4, eps=6.25e-10, weight_decay=0.0, fused=True)

    def train_step(self, u: Tensor) -> float:
        """One step on standardised embeddings (B, d), with projection, clipping and norms as in `saecore.training.trainer`."""
        p = (u - self.pre_bias) @ self.encoder + self.latent_bias
        losses = []
        for k in self.levels:
            top = p.topk(k, dim=-1)
            a = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
            losses.append(F.mse_loss(a @ self.decoder + self.pre_bias, u))
        loss = torch.stack(losses).mean()
        self.optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = self.decoder.grad
            assert gradient is not None
            gradient -= (gradient * self.decoder).sum(-1, keepdim=True) * self.decoder
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.decoder.copy_(F.normalize(self.decoder, dim=-1))
        return float(loss.detach())

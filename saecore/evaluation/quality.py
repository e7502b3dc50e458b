"""How good an SAE is on embeddings that it was not trained on.

With x the embeddings, x' their reconstruction by the latents that fire, bars for means over images:

    fvu             sum |x - x'|^2 / sum |x - xbar|^2              what SAELens, saev and Prisma report
    fvu_msae        mean over images of Var_j(x - x') / Var_j(x)   what MSAE reports: blind to an offset of a whole image
    nmae            mean over images of |x - x'|_1 / |x|_1
    cosine          mean over images of cos(x, x')
    l0              mean number of latents that fire
    dead            share of latents that fire for none of these images
    cknna           alignment of latents with embeddings among 10 nearest neighbours (Huh et al. 2024, arXiv:2405.07987)
    orthogonality   sum over i != j of (D_i . D_j)^2 / n^2 for unit rows: 0 if all atoms are orthogonal

Left out: how true the names and maps of latents are.

Shapes: B images, d inputs, n latents, C classes.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saecore.sae.model import SAE

BATCH = 1024
"""Images at once."""

CKNNA_ROWS = 1024
"""Images among which neighbours are searched: the cost of the estimate grows with the square of this number."""

NEIGHBOURS = 10


class Quality(NamedTuple):
    """The figures in the head of this file, and the number of images."""

    fvu: float
    fvu_msae: float
    nmae: float
    cosine: float
    l0: float
    dead: float
    cknna: float
    orthogonality: float
    images: int


def quality(sae: SAE, x: Tensor) -> Quality:
    """All figures on embeddings (B, d)."""
    with torch.inference_mode():
        sums = dict.fromkeys(("error", "spread", "fvu_msae", "nmae", "cosine", "l0"), 0.0)
        mean = x.double().mean(0)
        fired = torch.zeros(sae.config.n_latents, dtype=torch.bool, device=x.device)
        for rows in x.split(BATCH):
            code = sae.encode_sparse(rows)
            left = (rows - sae.decode_sparse(code.latents, code.activations, rows)).double()
            rows = rows.double()
            sums["error"] += float(left.square().sum())
            sums["spread"] += float((rows - mean).square().sum())
            sums["fvu_msae"] += float((left.var(-1) / rows.var(-1)).sum())
            sums["nmae"] += float((left.abs().sum(-1) / rows.abs().sum(-1)).sum())
            sums["cosine"] += float(F.cosine_similarity(rows, rows - left).sum())
            fires = code.activations != 0
            sums["l0"] += float(fires.sum())
            fired[code.latents[fires]] = True
        return Quality(
            fvu=sums["error"] / sums["spread"],
            **{name: sums[name] / len(x) for name in ("fvu_msae", "nmae", "cosine", "l0")},
            dead=1 - float(fired.double().mean()),
            cknna=_alignment_of_latents(sae, x),
            orthogonality=orthogonality(sae.atoms),
            images=len(x),
        )


def _alignment_of_latents(sae: SAE, x: Tensor) -> float:
    """Alignment of an SAE's latents with the embeddings; NaN for too few of them."""
    rows = x[:: math.ceil(len(x) / CKNNA_ROWS)]  # from everywhere: rows may lie in the order of their classes
    if len(rows) <= NEIGHBOURS + 3:
        return math.nan
    return cknna(sae.standardise(rows), sae.encode_sparse(rows).dense(sae.config.n_latents))


def cknna(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Alignment of two representations (B, dx) and (B, dy) of the same images: 1 if their neighbourhoods agree, 0 if by chance.

    K = x x', L = y y'; M marks pairs that are among each other's row's nearest by K and by L;
    hsic(M K, M L) / sqrt(hsic(M_K K, M_K K) hsic(M_L L, M_L L)), M_K and M_L the neighbours by one of them.
    """
    with torch.inference_mode():
        kernels = [(rows @ rows.T).double() for rows in (x.double(), y.double())]
        masks = []
        for kernel in kernels:
            others = kernel.clone().fill_diagonal_(-math.inf)
            masks.append(torch.zeros_like(kernel).scatter(1, others.topk(neighbours, dim=1).indices, 1.0))
        own = [_hsic(mask * kernel, mask * kernel) for mask, kernel in zip(masks, kernels, strict=True)]
        both = masks[0] * masks[1]
        return _hsic(both * kernels[0], both * kernels[1]) / (math.sqrt(own[0] * own[1]) + 1e-6)


def _hsic(one: Tensor, other: Tensor) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al. 2012, equation 5) of (B, B) kernels."""
    m = len(one)
    one, other = one.clone().fill_diagonal_(0), other.clone().fill_diagonal_(0)
    traced = (one * other.T).sum()
    means = one.sum() * other.sum() / ((m - 1) * (m - 2))
    crossed = 2 / (m - 2) * (one.sum(0) * other.sum(1)).sum()
    return float((traced + means - crossed) / (m * (m - 3)))


def orthogonality(atoms: Tensor) -> float:
    """Mean squared cosine between different rows of (n, d), over n^2: through the (d, d) Gram matrix, never (n, n)."""
    rows = F.normalize(atoms.double(), dim=-1)
    everything = (rows.T @ rows).square().sum()  # sum over all i, j of (D_i . D_j)^2
    own = rows.square().sum(-1).square().sum()
    return float((everything - own) / len(rows) ** 2)


def recovery(sae: SAE, x: Tensor, ks: list[int]) -> list[dict[str, float]]:
    """FVU and cosine on (B, d) if only the k strongest latents are kept, for every k.

    For topk and batchtopk, `ks` may exceed the SAE's own k: then the next latents fire too, as in MSAE's full latents.
    """
    ks = sorted({min(k, sae.config.n_latents) for k in ks})
    error, cosine, spread = np.zeros(len(ks)), np.zeros(len(ks)), 0.0
    mean = x.double().mean(0)
    with torch.inference_mode():
        for rows in x.split(BATCH):
            code = sae.encode_sparse(rows, at_least=ks[-1])
            values = code.activations
            if sae.config.architecture in ("topk", "batchtopk"):
                values = sae.output(code.pre_activations)
            spread += float((rows.double() - mean).square().sum())
            for place, k in enumerate(ks):
                reconstruction = sae.decode_sparse(code.latents[:, :k], values[:, :k].contiguous(), rows)
                error[place] += float((rows - reconstruction).double().square().sum())
                cosine[place] += float(F.cosine_similarity(rows, reconstruction).double().sum())
    return [{"k": k, "fvu": float(error[i] / spread), "cosine": float(cosine[i] / len(x))} for i, k in enumerate(ks)]


def alignment(one: SAE, other: SAE) -> dict[str, float]:
    """Agreement of two SAEs: cosine of atoms, and of encoder directions, over the best one-to-one matching of atoms.

    `atoms` and `encoders` are means over the pairs; `same` is the share of pairs whose atoms have a cosine above 0.9.
    """
    if one.config.n_inputs != other.config.n_inputs:
        raise ValueError(
            f"SAEs on widths {one.config.n_inputs} and {other.config.n_inputs} cannot be compared: they are not of one CLIP"
        )
    atoms, encoders = (
        (F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T).detach().cpu().numpy()
        for a, b in ((one.atoms, other.atoms), (one.encoder.T, other.encoder.T))
    )
    pairs = linear_sum_assignment(-atoms)
    return {
        "atoms": float(atoms[pairs].mean()),
        "encoders": float(encoders[pairs].mean()),
        "same": float((atoms[pairs] > 0.9).mean()),
    }


# ---- Classifiers on the embeddings and on their reconstruction.


def agreement(original: Tensor, reconstructed: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """Two sets of logits (B, C) on the same images: KL(original | reconstructed) in nats, same answer, accuracy of each."""
    before, after = original.log_softmax(-1), reconstructed.log_softmax(-1)
    figures = {
        "kl": float(F.kl_div(after, before, log_target=True, reduction="batchmean")),
        "same": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }
    if labels is not None:
        figures["accuracy"] = float((before.argmax(-1) == labels).double().mean())
        figures["accuracy_reconstructed"] = float((after.argmax(-1) == labels).double().mean())
    return figures


def zero_shot(
    sae: SAE, x: Tensor, texts: Tensor, labels: Tensor | None = None, temperature: float = 100.0
) -> dict[str, float]:
    """CLIP's zero-shot classifier, 100 cos(x, text) for class texts (C, d), on embeddings (B, d) and their reconstruction."""
    texts = F.normalize(texts, dim=-1)
    logits = [temperature * F.normalize(rows, dim=-1) @ texts.T for rows in (x, _reconstructed(sae, x))]
    return agreement(logits[0], logits[1], labels)


def linear_probe(sae: SAE, x: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """A linear classifier fitted to half of the embeddings (B, d), used on the other half and on its reconstruction.

    Embeddings are standardised and brought to length sqrt(d); logistic regression, L2 penalty, LBFGS to convergence.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    classes = int(labels.max()) + 1

    def seen(rows: Tensor) -> Tensor:
        return F.normalize(sae.standardise(rows), dim=-1) * x.shape[1] ** 0.5

    probe = torch.nn.Linear(x.shape[1], classes, device=x.device)
    torch.nn.init.zeros_(probe.weight)
    torch.nn.init.zeros_(probe.bias)
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    inputs, targets = seen(x[train]), labels[train]

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(probe(inputs), targets) + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.inference_mode():
        logits = [probe(seen(rows)) for rows in (x[test], _reconstructed(sae, x[test]))]
    return agreement(logits[0], logits[1], labels[test])


def _reconstructed(sae: SAE, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([sae.reconstruct(rows) for rows in x.split(BATCH)])

"""Curves, SRG and Shapley values where the truth is known, and removal beside plain forwards without the patches."""

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.evaluation import faithfulness
from saecore.evaluation.faithfulness import curves, order_of
from saecore.relevance.explain import explain_latents
from saecore.relevance.targets import Targets, no_word_targets
from saecore.removal import ways
from saecore.removal.shapley import shapley
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.stopped import StoppedTower, stopped_at
from tests.helpers.derivations import plain_forward, plain_layers
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_sae, random_siglip, random_tower

IMAGES, N, P = 3, 4, 20

Game = Callable[[frozenset[int]], float]


def additive(w: Tensor, constant: float = 0.7) -> ways.Removal:
    """z = constant + sum of w (B, n, P) over the patches that stay."""

    def left(kept: Tensor) -> Tensor:
        B, R, _ = kept.shape
        rows = w[:, None].expand(B, R, *w.shape[1:])
        return constant + rows.gather(-1, kept[:, :, None].expand(-1, -1, w.shape[1], -1)).sum(-1)

    return left


def worths() -> Tensor:
    return torch.randn(IMAGES, N, P, generator=torch.Generator().manual_seed(5))


# ---- Curves and SRG.


def test_curves_are_those_computed_by_hand() -> None:
    w = worths()
    found = curves(additive(w), order_of(w), steps=5)
    for image, target in itertools.product(range(IMAGES), range(N)):
        falling = sorted(w[image, target].tolist(), reverse=True)
        mif = [0.7 + sum(falling[gone:]) for gone in (0, 4, 8, 12, 16, 20)]
        lif = [0.7 + sum(falling[: P - gone]) for gone in (0, 4, 8, 12, 16, 20)]
        np.testing.assert_allclose(found.mif[image, target], mif, atol=1e-5)
        np.testing.assert_allclose(found.lif[image, target], lif, atol=1e-5)
        area = sum((a + b) / 2 / 5 for a, b in itertools.pairwise(np.subtract(lif, mif)))
        assert found.srg[image, target] == pytest.approx(area, abs=1e-5)


def test_the_true_map_beats_every_other_and_the_inverted_loses() -> None:
    w, drawn = worths(), torch.Generator().manual_seed(6)
    remove = additive(w)
    true = curves(remove, order_of(w)).srg
    near = curves(remove, order_of(w + torch.randn(w.shape, generator=drawn))).srg
    chance = torch.stack([curves(remove, order_of(torch.rand(w.shape, generator=drawn))).srg for _ in range(200)])
    inverted = curves(remove, order_of(-w)).srg
    assert (true >= near).all()
    assert true.mean() > near.mean() > chance.mean() > inverted.mean()
    assert abs(chance.mean()) < 0.2
    torch.testing.assert_close(inverted, -true, rtol=1e-5, atol=1e-5)


def test_equal_patches_come_in_an_order_that_tells_nothing() -> None:
    maps = torch.tensor([[[1.0, 0, 0, 0, 2, 0, 0, 0]]])
    order = order_of(maps)[0, 0].tolist()
    assert order[:2] == [4, 0]
    assert sorted(order) == list(range(8))
    assert order[2:] != sorted(order[2:])
    assert order_of(maps)[0, 0].tolist() == order


# ---- Shapley values.


def test_they_are_exact_where_z_is_additive() -> None:
    w = worths()
    found = shapley(additive(w), P, IMAGES, subsets=100)
    torch.testing.assert_close(found.values, w, rtol=1e-4, atol=1e-4)
    assert found.error.max() < 1e-4


def game(of: Game) -> ways.Removal:
    """Any function of the set of patches that stay, for one image and one target."""

    def left(kept: Tensor) -> Tensor:
        return torch.tensor([[[of(frozenset(one))] for one in kept[0].tolist()]])

    return left


def exact(of: Game, n: int) -> list[float]:
    """By the definition: over all subsets."""
    values = []
    for patch in range(n):
        others = [other for other in range(n) if other != patch]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for chosen in itertools.combinations(others, size):
                total += weight * (of(frozenset({*chosen, patch})) - of(frozenset(chosen)))
        values.append(total)
    return values


def redundant(stay: frozenset[int]) -> float:
    """Two patches can stand in for each other: without one of them nothing is lost."""
    return float(bool(stay & {1, 4})) + 0.5 * (2 in stay)


def entangled(stay: frozenset[int]) -> float:
    return math.sin(sum(1.3**patch for patch in stay)) + len(stay & {0, 3, 5}) ** 2


@pytest.mark.parametrize("of", [redundant, entangled])
def test_they_are_near_the_definition(of: Game) -> None:
    n = 8
    found = shapley(game(of), n, 1, subsets=3000)
    values, error, expected = found.values[0, 0].numpy(), found.error[0, 0].numpy(), np.array(exact(of, n))
    assert np.abs(values - expected).max() < max(0.06, 5 * error.max())
    assert 0 < error.max() < 0.1
    assert values.sum() == pytest.approx(of(frozenset(range(n))) - of(frozenset()), abs=1e-5)
    if of is redundant:
        assert np.abs(values - [0, 0.5, 0.5, 0, 0.5, 0, 0, 0]).max() < 0.06


def test_too_few_subsets_are_refused() -> None:
    with pytest.raises(ValueError, match="subsets do not tell the values of 20 patches"):
        shapley(additive(worths()), P, IMAGES, subsets=19)


# ---- What taking out means.


def test_dropped_patches_are_what_a_plain_forward_has_without_them() -> None:
    _, tower = random_tower(**SHAPES[0])
    sae, pixels, latents = random_sae(), random_pixels(tower, 2), torch.tensor([[1, 5, 9], [2, 5, 70]])
    targets = Targets(sae, latents, no_word_targets(sae))
    remove = ways.removal("drop", tower, pixels, targets.values)
    kept = torch.tensor([[[0, 3, 7, 15], [2, 1, 9, 14]], [[5, 6, 7, 8], [0, 1, 2, 15]]])
    with torch.inference_mode():
        found = remove(kept)
        whole = remove(torch.arange(16).expand(2, 1, -1))
        torch.testing.assert_close(
            whole[:, 0], targets.values(tower.embed(pixels)[:, None])[:, 0], rtol=1e-4, atol=1e-4
        )
        assert remove(kept[:, :, :0]).shape == (2, 2, 3)
    first = plain_forward(tower, pixels)[0].entering.detach()
    vision = copy.deepcopy(tower.vision).double()
    for image, group in itertools.product(range(2), range(2)):
        tokens = first[image : image + 1, [0, *(patch + 1 for patch in kept[image, group].tolist())]]
        cls = plain_layers(vision, tokens)[-1].leaving[:, 0].detach()
        normed = vision.post_layernorm(cls) @ tower.projection.weight.double().T
        pre = ((normed - sae.mean) * sae.scale - sae.pre_bias) @ sae.encoder.double() + sae.latent_bias
        torch.testing.assert_close(found[image, group].double(), pre[0, latents[image]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("siglip", [False, True])
def test_filled_patches_are_edited_pixels(siglip: bool) -> None:
    """Of the SigLIP, two pixels at the right and the lower edge are in no patch, and stay."""
    _, tower = random_siglip(**SIGLIP_SHAPES[2]) if siglip else random_tower(**SHAPES[0])
    pixels, size = random_pixels(tower, 2), tower.vision.config.patch_size
    kept = torch.tensor([[[0, 4]], [[3, 5]]])
    remove = ways.filling(tower, pixels, torch.full_like(pixels, 77), lambda embeddings: embeddings)
    with torch.inference_mode():
        found = remove(kept)
        for image in range(2):
            edited = pixels[image].clone()
            for patch in set(range(tower.grid[0] * tower.grid[1])) - set(kept[image, 0].tolist()):
                row, column = divmod(patch, tower.grid[1])
                edited[row * size : (row + 1) * size, column * size : (column + 1) * size] = 77
            torch.testing.assert_close(found[image], tower.embed(edited[None]), rtol=1e-5, atol=1e-5)


def test_the_mean_colour_is_zero_for_the_tower_and_a_blur_keeps_the_light() -> None:
    _, tower = random_tower(**SHAPES[0])
    pixels = random_pixels(tower, 1)
    seen = list[Tensor]()
    embed = tower.embed

    def watched(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return embed(pixels)

    tower.embed = watched  # type: ignore[method-assign]
    nothing = torch.empty(1, 1, 0, dtype=torch.int64)
    for way in ("mean", "blur"):
        ways.removal(way, tower, pixels, lambda embeddings: embeddings)(nothing)
    mean, blurred = seen
    assert tower.normalise(mean).abs().max() < 0.02
    assert blurred.float().std() < 0.5 * pixels.float().std()
    assert float(blurred.float().mean()) == pytest.approx(float(pixels.float().mean()), rel=0.05)
    with pytest.raises(ValueError, match="way 'melt': must be one of drop, mean, blur"):
        ways.removal("melt", tower, pixels, lambda embeddings: embeddings)


def test_a_model_of_patches_only_keeps_one() -> None:
    _, tower = random_siglip(**SIGLIP_SHAPES[0])
    pixels = random_pixels(tower, 1)
    remove = ways.removal("drop", tower, pixels, lambda embeddings: embeddings[..., :3])
    order = torch.stack([torch.randperm(16) for _ in range(3)])[None]
    with torch.inference_mode():
        found = curves(remove, order, steps=4, least=1)
        assert found.mif.shape == (1, 3, 5)
        assert found.mif.isfinite().all()
        with pytest.raises(ValueError, match="one at least must stay"):
            remove(order[..., :0])


# ---- A tower whose truth is known by construction.

NAMED, WIDTH, OUT = (3, 7), 48, 40


def copying() -> tuple[StoppedTower, SAE]:
    """One layer whose CLS looks at the named patches, and copies whether they are white: z is the mean over them of +1 or -1.

    Tokens are pairs (+a, -a) of coordinates: one says which patch it is, one whether it is white or black. So each has mean 0
    and variance 1, and LayerNorms leave it as it is. The SAE reads CLS after the layer, where no norm follows.
    """
    model, tower = random_tower(width=WIDTH, heads=1, layers=1)
    vision = model.vision_model
    for parameter in vision.parameters():
        parameter.zero_()
    layer = vision.encoder.layers[0]
    for norm in (vision.pre_layrnorm, layer.layer_norm1, layer.layer_norm2):
        norm.weight.fill_(1)
    a, content, query = (WIDTH / 4) ** 0.5, 32, 34
    patches = vision.embeddings.patch_embedding.weight
    patches[content], patches[content + 1] = a / patches[0].numel(), -a / patches[0].numel()
    for patch in range(16):
        place = vision.embeddings.position_embedding.weight[patch + 1]
        place[2 * patch], place[2 * patch + 1] = a, -a
    vision.embeddings.class_embedding[query], vision.embeddings.class_embedding[query + 1] = 2**0.5 * a, -(2**0.5) * a
    layer.self_attn.q_proj.weight[0, query] = 40 * WIDTH**0.5 / (2**0.5 * a)
    for patch in NAMED:
        layer.self_attn.k_proj.weight[0, 2 * patch] = 1 / a
    layer.self_attn.v_proj.weight[0, content] = 1 / a
    layer.self_attn.out_proj.weight[OUT, 0] = 1
    stopped = stopped_at(tower, 0)
    stopped.mean.fill_(0.5)
    stopped.std.fill_(0.5)
    sae = SAE(SAEConfig(n_inputs=WIDTH, n_latents=1, k=1)).requires_grad_(False)
    sae.encoder[OUT, 0] = 1
    return stopped, sae


def test_the_perfect_map_has_the_srg_computed_by_hand_and_methods_find_it() -> None:
    """Both named patches are white, all others black. Without one of the two, CLS looks at the other, and z stays 1. Without
    both it looks evenly at itself, which has 0, and at the m patches that are left, which have -1: z = -m / (m + 1)."""
    lif, mif = [*[1.0] * 8, 0.0], [1.0, *(-m / (m + 1) for m in range(14, -1, -2))]
    by_hand = sum((a + b) / 2 / 8 for a, b in itertools.pairwise(np.subtract(lif, mif)))
    tower, sae = copying()
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    for patch in NAMED:
        row, column = 8 * (patch // 4), 8 * (patch % 4)
        pixels[0, row : row + 8, column : column + 8] = 255
    latents = torch.zeros(1, 1, dtype=torch.int64)
    targets = Targets(sae, latents, no_word_targets(sae))
    with torch.inference_mode():
        made = explain_latents(tower, sae, pixels, latents, ("contrib", "contrib_grad", "occlusion", "attention"))
        expected = torch.zeros(16)
        expected[list(NAMED)] = 0.5
        for method in ("contrib", "contrib_grad"):
            torch.testing.assert_close(made[method].relevance[0, 0], expected, rtol=1e-4, atol=1e-4)
        assert made["occlusion"].relevance.abs().max() < 1e-4, "either named patch can stand in for the other"
        remove = ways.removal("drop", tower, pixels, targets.values)
        found = {name: float(curves(remove, order_of(one.relevance), steps=8).srg) for name, one in made.items()}
        inverted = float(curves(remove, order_of(-expected[None, None]), steps=8).srg)
        worth = shapley(remove, 16, 1, subsets=3000)
    assert found["contrib"] == pytest.approx(by_hand, abs=1e-3)
    assert found["contrib_grad"] == pytest.approx(by_hand, abs=1e-3)
    assert inverted == pytest.approx(-by_hand, abs=1e-3)
    assert inverted < found["occlusion"] < by_hand
    named = worth.values[0, 0][list(NAMED)]
    assert named.min() > 3 * worth.values[0, 0][[patch for patch in range(16) if patch not in NAMED]].max()
    assert float(named[0]) == pytest.approx(float(named[1]), abs=0.15)


# ---- Whether maps tell targets apart.


def test_methods_that_know_no_target_are_alike() -> None:
    _, tower = random_tower(**SHAPES[2])
    sae, pixels, latents = random_sae(), random_pixels(tower, 3), torch.arange(8).expand(3, -1)
    with torch.inference_mode():
        made = explain_latents(tower, sae, pixels, latents, ("contrib", "attention"))
    assert faithfulness.alikeness(made["attention"].relevance).min() > 0.999
    assert faithfulness.alikeness(made["contrib"].relevance).max() < 0.8
    order = order_of(made["contrib"].relevance)
    remove = additive(torch.randn(3, 8, order.shape[-1], generator=torch.Generator().manual_seed(2)))
    # Each target by the order of the one before it, the first by the last's.
    torch.testing.assert_close(curves(remove, order).srg_of_another, curves(remove, order.roll(1, 1)).srg)

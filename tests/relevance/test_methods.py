"""Every method of maps against its formula, on gradients and attention that autograd and a plain forward give in float64."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.methods import METHODS, OF_EVERY_TOWER, Options, dtype_of, parse_methods
from saecore.relevance.explain import explain_latents
from saecore.relevance.maps import completeness_error
from saecore.relevance.targets import Targets, concept_weights, word_targets
from saecore.requests import parse_targets
from saecore.sae.checkpoints import load_sae
from saecore.sae.model import SAE
from saecore.towers.clip import ClipTower
from tests.helpers.derivations import (
    Layer,
    assert_close,
    embed,
    fused,
    ours,
    plain_forward,
    read,
    replayed,
    some_latents,
)
from tests.helpers.towers import SHAPES, demo_tower, random_head, random_pixels, random_sae, random_tower

ALL = [*range(len(SHAPES)), "demo"]

DECOMPOSITIONS = [name for name, method in METHODS.items() if method.decomposes]


def models(which: Any) -> tuple[Any, ClipTower, SAE]:
    """transformers' image tower, ours over it, an SAE: random weights of a shape, or the embedded ones."""
    if which == "demo":
        tower = demo_tower()
        return tower.vision, tower, load_sae("demo")
    model, tower = random_tower(**SHAPES[which])
    return model.vision_model, tower, random_sae()


def by_formula(name: str, D: list[np.ndarray], layers: list[Layer]) -> np.ndarray:
    """(B, k, P), written as the papers have it, with whole token-by-token matrices where they have those."""
    rows = [layer.A[:, None, :, 0].detach().numpy() for layer in layers]
    if name == "contrib_grad":
        return sum((A * G).sum(2)[..., 1:] for A, G in zip(rows, D, strict=True))
    if name == "chefer":
        return np.maximum(rows[-1] * D[-1], 0).mean(2)[..., 1:]
    if name == "legrad":
        return np.maximum(D[-1], 0).mean(2)[..., 1:]
    if name == "gradeclip":
        q, k = layers[-1].q.detach().numpy()[:, 0], layers[-1].k.detach().numpy()[:, 1:]
        cosine = np.einsum("bd,bpd->bp", q, k) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(k, axis=2)
        low, high = cosine.min(1, keepdims=True), cosine.max(1, keepdims=True)
        return np.maximum(((cosine - low) / (high - low))[:, None] * D[-1].sum(2)[..., 1:], 0)
    return np.broadcast_to(rows[-1].mean(2)[..., 1:], D[-1].sum(2)[..., 1:].shape)


def all_layers(name: str, D: list[np.ndarray], layers: list[Layer]) -> np.ndarray:
    """Chefer's rule with N x N matrices in which only the CLS row of each layer's is not zero; LeGrad's sum of layers."""
    if name == "legrad":
        return sum(np.maximum(G, 0).mean(2)[..., 1:] for G in D)
    B, k, _, N = D[0].shape
    R = np.broadcast_to(np.eye(N), (B, k, N, N)).copy()
    for layer, G in zip(layers, D, strict=True):
        cam = np.zeros((B, k, N, N))
        cam[:, :, 0] = np.maximum(layer.A[:, None, :, 0].detach().numpy() * G, 0).mean(2)
        R = R + cam @ R
    return R[:, :, 0, 1:]


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("which", ALL)
def test_methods_along_the_cls_path_equal_their_formula(which: Any, norm: str) -> None:
    _, tower, sae = models(which)
    pixels, latents = random_pixels(tower, 3), some_latents(sae, 3, 5)
    D = [layer.numpy() for layer in replayed(tower, sae, pixels, latents, exact=norm == "exact")]
    layers = plain_forward(tower, pixels)
    for name in ("contrib_grad", "chefer", "legrad", "gradeclip", "attention"):
        depth = int(name == "legrad")
        maps = ours(tower, sae, pixels, latents, name, norm=norm, legrad_target="cls", layers=depth)
        assert_close(maps, by_formula(name, D, layers))
    for name in ("chefer", "legrad"):
        maps = ours(tower, sae, pixels, latents, name, norm=norm, legrad_target="cls", layers=len(D))
        assert_close(maps, all_layers(name, D, layers))
    maps = ours(tower, sae, pixels, latents, "contrib_grad", norm=norm, layers=1)
    assert_close(maps, by_formula("contrib_grad", D[-1:], layers[-1:]))


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("which", ALL)
def test_methods_of_the_full_model_equal_autograd(which: Any, norm: str) -> None:
    """Of the last layer's N x N attention only the CLS row has a gradient; rollout and the mean token's LeGrad use all rows
    of all layers, and autograd gives them whole."""
    _, tower, sae = models(which)
    exact, k = norm == "exact", 4
    pixels, latents = random_pixels(tower, 2), some_latents(sae, 2, k)
    layers = plain_forward(tower, pixels)
    z = read(sae, embed(tower, layers[-1].leaving[:, 0], exact), latents)
    gradients = [torch.autograd.grad(z[:, j].sum(), [layer.A for layer in layers], retain_graph=True) for j in range(k)]
    last = torch.stack([of_layers[-1] for of_layers in gradients], 1)  # (B, k, H, N, N)
    assert last[..., 1:, :].abs().max() == 0
    expected = (layers[-1].A[:, None] * last).clamp(min=0).mean(2)[..., 0, 1:].detach()
    assert_close(ours(tower, sae, pixels, latents, "chefer", norm=norm), expected)

    for discard in (0.9, 0.0):
        rows = [rolled([layer.A.detach().numpy() for layer in layers], of_layers, discard) for of_layers in gradients]
        maps = ours(tower, sae, pixels, latents, "rollout", norm=norm, discard=discard)
        assert_close(maps, np.stack(rows, 1))

    depth = min(2, len(layers))
    total = torch.zeros_like(expected)
    for layer in layers[-depth:]:
        z = read(sae, embed(tower, layer.leaving.mean(1), exact), latents)
        for j in range(k):
            gradient = torch.autograd.grad(z[:, j].sum(), layer.A, retain_graph=True)[0]
            total[:, j] += gradient.clamp(min=0).mean((1, 2))[:, 1:]
    maps = ours(tower, sae, pixels, latents, "legrad", norm=norm, legrad_target="mean", layers=depth)
    assert_close(maps, total)


def rolled(attention: list[np.ndarray], gradients: Any, discard: float) -> np.ndarray:
    """Rollout as the classic scripts have it: whole matrices from the first layer up, the smallest entries sorted out."""
    rows = []
    for image in range(len(attention[0])):
        N = attention[0].shape[-1]
        R = np.eye(N)
        for A, G in zip(attention, gradients, strict=True):
            mixed = fused(A[image], G[image].numpy(), discard) + np.eye(N)
            R = mixed / mixed.sum(1, keepdims=True) @ R
        rows.append(R[0, 1:])
    return np.stack(rows)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ALL)
def test_occlusion_is_transformers_run_again_without_the_tokens(which: Any, block: int) -> None:
    """transformers' own encoder on the sequence with a block's tokens taken out, one image and one block at a time.

    Blocks of 3 are smaller at the edge of grids of 4 and 8.
    """
    vision, tower, sae = models(which)
    pixels, latents = random_pixels(tower, 2), some_latents(sae, 2, 5)
    height, width = tower.grid
    maps = ours(tower, sae, pixels, latents, "occlusion", block=block).unflatten(-1, (height, width))
    with torch.inference_mode():
        first = vision.pre_layrnorm(vision.embeddings(tower.normalise(pixels)))

        def value(image: int, tokens: list[int]) -> Tensor:
            hidden = vision.encoder(inputs_embeds=first[image : image + 1, tokens]).last_hidden_state
            embedding = tower.projection(vision.post_layernorm(hidden[:, 0]))
            return sae.pre_activations(embedding)[0, latents[image]]

        everything = list(range(1 + height * width))
        for image in range(2):
            for top in range(0, height, block):
                for left in range(0, width, block):
                    inside = [
                        1 + y * width + x
                        for y in range(top, min(height, top + block))
                        for x in range(left, min(width, left + block))
                    ]
                    loss = value(image, everything) - value(image, [i for i in everything if i not in inside])
                    square = maps[image, :, top : top + block, left : left + block]
                    expected = (loss / len(inside))[:, None, None].expand_as(square)
                    torch.testing.assert_close(square, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("which", ALL)
def test_dense_reads_each_token_as_if_it_were_the_cls_token(which: Any) -> None:
    vision, tower, sae = models(which)
    pixels, latents = random_pixels(tower, 2), some_latents(sae, 2, 5)
    layers = plain_forward(tower, pixels)
    expected = torch.stack(
        [read(sae, embed(tower, layers[-1].leaving[:, 1 + i], True), latents) for i in range(tower.grid[0] ** 2)], -1
    )
    assert_close(ours(tower, sae, pixels, latents, "dense"), expected.detach())
    # By value: what the CLS token would be given if it looked at this patch alone, through a frozen final LayerNorm.
    last = copy.deepcopy(vision.encoder.layers[-1]).double()
    given = last.self_attn.v_proj(last.layer_norm1(layers[-1].entering)[:, 1:]) @ last.self_attn.out_proj.weight.T
    norm, cls = tower.vision.post_layernorm, layers[-1].leaving[:, :1]
    deviation = (cls.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    moved = (given - given.mean(-1, keepdim=True)) / deviation * norm.weight @ tower.projection.weight.double().T
    w = (sae.encoder.double() * sae.scale).T[latents]
    assert_close(ours(tower, sae, pixels, latents, "dense", dense="value"), (w @ moved.mT).detach())


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("which", ALL)
def test_decompositions_and_their_remainder_add_up(which: Any, layers: int, norm: str) -> None:
    """For latents, texts and concepts, with SAEs whose normaliser depends on the image, of all layers and of the last."""
    _, tower, plain = models(which)
    generator = torch.Generator().manual_seed(5)
    texts = torch.randn(4, tower.n_outputs, generator=generator).numpy()
    for normalise in ("none", "layer_norm", "constant_norm"):
        sae = SAE(dataclasses.replace(plain.config, normalise=normalise)).requires_grad_(False)
        sae.load_state_dict(plain.state_dict())
        words = word_targets(sae, texts, n_texts=2, n_latents=6, positive=False)
        pixels, latents = random_pixels(tower, 4), some_latents(sae, 4, 20)
        with torch.inference_mode():
            options = Options(layers=layers, norm=norm, subsets=320)
            by_method = explain_latents(
                tower, sae, pixels, latents, DECOMPOSITIONS, options, words, head=random_head(tower)
            )
            embedding = tower.embed(pixels)
            z = Targets(sae, latents, words).values(embedding[:, None])[:, 0]
            pre = sae.pre_activations(embedding).gather(1, latents)
        torch.testing.assert_close(z[:, :20], pre, rtol=1e-4, atol=1e-4)
        for maps in by_method.values():
            assert completeness_error(maps, z).max() < 1e-5
            assert maps.relevance.sum(-1).std(0).mean() > 0.005


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
def test_read_outs_of_texts_and_concepts(normalise: str, exact: bool) -> None:
    """Values against NumPy; read-outs give the values, and are the true gradient where `exact`."""
    plain = random_sae()
    sae = SAE(dataclasses.replace(plain.config, normalise=normalise)).requires_grad_(False).double()
    sae.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(6)
    texts = torch.randn(3, 24, generator=generator).double()
    x = torch.randn(5, 24, generator=generator).double().requires_grad_()
    words = word_targets(sae, texts.numpy(), n_texts=1, n_latents=4, positive=True)
    targets = Targets(sae, torch.randint(0, 96, (5, 2), generator=generator), words)
    z = targets.values(x[:, None])[:, 0]
    cosine = (x @ texts[0]) / x.norm(dim=-1) / texts[0].norm()
    torch.testing.assert_close(z[:, 2], cosine, rtol=1e-6, atol=1e-6)
    atoms, at = sae.atoms.numpy(), texts[2].numpy()
    cosines = atoms @ at / np.linalg.norm(atoms, axis=1) / np.linalg.norm(at)
    best = np.argsort(-cosines)[:4]
    expected = (sae.pre_activations(x).detach().numpy()[:, best] * cosines[best]).sum(1) / cosines[best].sum()
    np.testing.assert_allclose(z[:, 4].detach(), expected, rtol=1e-5, atol=1e-5)
    w, c = targets.read_outs(x.detach(), exact)
    torch.testing.assert_close((w * x[:, None]).sum(-1) + c, z, rtol=1e-5, atol=1e-5)
    if exact:
        for target in range(z.shape[1]):
            gradient = torch.autograd.grad(z[:, target].sum(), x, retain_graph=True)[0]
            torch.testing.assert_close(w[:, target], gradient, rtol=1e-4, atol=1e-5)


def test_concept_weights_by_hand() -> None:
    sae = random_sae(n_inputs=2, n_latents=4, k=2)
    assert sae.decoder is not None
    sae.decoder.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-5.0, 0.0], [1.0, 1.0]]))
    latents, weights = concept_weights(sae, torch.tensor([10.0, 0.0]), 3)
    assert set(latents.tolist()) == {0, 2, 3}
    torch.testing.assert_close(
        dict(zip(latents.tolist(), weights.tolist(), strict=True)), {0: 1.0, 2: -1.0, 3: 0.5**0.5}
    )
    latents, weights = concept_weights(sae, torch.tensor([10.0, 0.0]), 2, positive=True)
    assert latents.tolist() == [0, 3]


@pytest.mark.parametrize("name", OF_EVERY_TOWER)
def test_a_map_depends_on_its_image_and_its_read_out_only(name: str) -> None:
    """Batch and single, k = 1 and k = 64 agree."""
    _, tower, sae = models(0)
    pixels = random_pixels(tower, 5)
    latents = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i))[:64] for i in range(5)])
    together = ours(tower, sae, pixels, latents, name)
    for image in range(5):
        alone = ours(tower, sae, pixels[image : image + 1], latents[image : image + 1, 9:10], name)
        torch.testing.assert_close(alone[0, 0], together[image, 9], rtol=1e-4, atol=1e-5)


def test_several_methods_share_one_forward() -> None:
    _, tower, sae = models(0)
    pixels, latents = random_pixels(tower, 3), some_latents(sae, 3, 5)
    forwards = []
    tower.register_forward_hook(lambda *_: forwards.append(1))
    with torch.inference_mode():
        together = explain_latents(tower, sae, pixels, latents, OF_EVERY_TOWER)
    assert len(forwards) == 1
    for name in OF_EVERY_TOWER:
        torch.testing.assert_close(
            together[name].relevance, ours(tower, sae, pixels, latents, name), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", ["contrib", "contrib_grad", "chefer", "legrad", "attention"])
def test_heads_add_up_to_the_map(name: str) -> None:
    _, tower, sae = models(0)
    pixels, latents = random_pixels(tower, 3), some_latents(sae, 3, 5)
    with torch.inference_mode():
        whole = explain_latents(tower, sae, pixels, latents, (name,))[name]
        by_head = explain_latents(tower, sae, pixels, latents, (name,), heads=True)[name]
    assert by_head.relevance.shape[2] == tower.n_heads
    assert by_head.relevance.std(2).mean() > 0
    torch.testing.assert_close(by_head.relevance.sum(2), whole.relevance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_head.remainder, whole.remainder, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_methods_in_bfloat16_are_nearly_the_same() -> None:
    """As on a GPU. Occlusion takes differences of two forwards, which bfloat16 drowns: a tower stays in float32 for it."""
    latents, pixels = torch.arange(10).expand(4, -1), random_pixels(demo_tower(), 4)
    by_dtype = []
    for dtype in (torch.float32, torch.bfloat16):
        tower, sae = demo_tower(), load_sae("demo")
        tower.run_in(dtype)
        with torch.inference_mode():
            by_dtype.append(explain_latents(tower, sae, pixels, latents, OF_EVERY_TOWER))
    for name in [name for name in OF_EVERY_TOWER if not METHODS[name].needs_float32]:
        exact, rounded = (maps[name].relevance for maps in by_dtype)
        assert rounded.dtype == torch.float32
        largest = exact.abs().amax(-1).clamp(min=1e-6)  # gradeclip has maps that are zero everywhere
        assert ((rounded - exact).abs().amax(-1) / largest).mean() < 0.04
    assert [dtype_of("cuda", names) for names in ((), ("contrib",), ("contrib", "occlusion"))] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]
    assert dtype_of("cpu") == "float32"


@pytest.mark.parametrize(
    ("given", "specs"),
    [
        (["kept"], ["kept"]),
        (["text: a red square", "concept:red"], ["kept", "text:a red square", "concept:red"]),
        (["concept:red", "kept", "text:a red square"], ["kept", "text:a red square", "concept:red"]),
        (["latents:3", "latents: 17,3"], ["latents:3,17"]),
        (["latents:3", "no-kept"], ["latents:3"]),
        (["latents:3", "kept"], ["kept", "latents:3"]),
        (["latents:3", "text:x"], ["latents:3", "text:x"]),
        (["text:x", "no-kept", "text: x"], ["no-kept", "text:x"]),
    ],
)
def test_targets_have_one_spelling(given: list[str], specs: list[str]) -> None:
    """Texts and concepts add to the kept latents, and what asks for the same makes the same fingerprint."""
    request = parse_targets(given)
    assert request.specs() == specs
    assert parse_targets(specs) == request
    assert request.kept == ("kept" in specs)


def test_what_is_asked_for_is_read_as_written() -> None:
    assert parse_methods("chefer, contrib,chefer") == ("chefer", "contrib")
    request = parse_targets(["kept", "latents:3,17", "text: a red: square ", "concept:red", "latents:3"])
    assert (request.kept, request.latents, request.texts, request.concepts) == (
        True,
        (3, 17),
        ("a red: square",),
        ("red",),
    )
    assert request.labels() == ["text: a red: square", "concept: red"]
    for wrong in ("contrib,lrp", "", "contrib,,chefer"):
        with pytest.raises(ValueError, match=r"method .*: must be"):
            parse_methods(wrong)
    for targets in (["latents:"], ["latents:3,x"], ["text:"], ["words:red"], ["kept:3"], ["no-kept:3"], [""]):
        with pytest.raises(ValueError, match=r"targets '.*': must be"):
            parse_targets(targets)
    with pytest.raises(ValueError, match="at least one"):
        parse_targets([])
    with pytest.raises(ValueError, match="targets kept no-kept: one asks for what the other omits"):
        parse_targets(["no-kept", "text:x", "kept"])
    with pytest.raises(ValueError, match="targets no-kept leaves nothing to explain"):
        parse_targets(["no-kept"])
    for options, sentence in (
        ({"norm": "loose"}, "norm 'loose' is not one of auto, frozen, exact"),
        ({"layers": -1}, "layers -1"),
        ({"discard": 1.0}, "discard 1.0"),
        ({"block": 0}, "block 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Options(**options).check()

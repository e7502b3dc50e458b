"""Methods with a published name are the published methods, with default options: for latents, texts and concepts.

Each procedure is written here anew, in float64 and as its public code works: one image and one target at a time, whole
matrices, and autograd through the whole model. docs/maps.md says where ours differs from that code on purpose. Weights are
random.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from saecore.methods import DEFAULT_OPTIONS, METHODS, OF_EMBEDDING, OF_TOKENS, Options
from saecore.relevance import tokens
from saecore.relevance.explain import FUNCTIONS, explain_latents
from saecore.relevance.targets import Targets, WordTargets, word_targets
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.clip import ClipTower
from saecore.towers.tower import ImageTower
from tests.helpers.towers import random_pixels, random_sae, random_siglip, random_tower

Score = Callable[[Tensor], Tensor]
"""An embedding (E,) -> the value of a target."""

CLIP: dict[str, Any] = {
    "image_size": 96,
    "patch_size": 16,
    "width": 64,
    "heads": 4,
    "layers": 5,
    "activation": "quick_gelu",
}
SIGLIP = {**CLIP, "layers": 4, "activation": "gelu_pytorch_tanh"}


class Layer(NamedTuple):
    """A layer's tensors for one image. The axis of heads comes first, then that of tokens."""

    A: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor  # (N, D): the outputs of the heads, side by side
    leaving: Tensor
    out: Any


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(n, D), (N, D), (N, D) -> the attention (H, n, N), as a variable of autograd, and the outputs of the heads (n, D)."""
    split = [x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v)]
    A = torch.softmax(split[0] @ split[1].mT / split[0].shape[-1] ** 0.5, -1)
    A = A if A.requires_grad else A.requires_grad_()
    return A, (A @ split[2]).transpose(0, 1).flatten(1)


def layers_of(vision: Any, x: Tensor) -> list[Layer]:
    layers = []
    for layer in vision.encoder.layers:
        own, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = own.q_proj(normed), own.k_proj(normed), own.v_proj(normed)
        A, o = attend(q, k, v, vision.config.num_attention_heads)
        y = x + own.out_proj(o)
        x = y + layer.mlp(layer.layer_norm2(y))
        layers.append(Layer(A, q, k, v, o, x, own.out_proj))
    return layers


def chefer(layers: list[Layer], z: Tensor) -> Tensor:
    A = layers[-1].A
    gradient = gradient_of(z, A)
    R = torch.eye(A.shape[-1], dtype=A.dtype)
    R = R + (gradient * A).clamp(min=0).mean(0) @ R
    return R[0, 1:]


def gradeclip(layers: list[Layer], z: Tensor, projected: bool) -> Tensor:
    last = layers[-1]
    g = gradient_of(z, last.o)[0]
    q, k = (linear(x, last.out.weight, last.out.bias) if projected else x for x in (last.q, last.k))
    cosine = cosine_similarity(q[:1], k[1:], dim=-1)
    weights = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    return (g * last.v[1:] * weights[:, None]).sum(-1).relu()


def rollout(layers: list[Layer], z: Tensor) -> Tensor:
    """The script of relevancy_map_SAE, with the gradient that its hook was meant to see."""
    result = torch.eye(layers[0].A.shape[-1], dtype=torch.float64)
    for layer in layers:
        cam = (layer.A.mean(0) * gradient_of(z, layer.A).mean(0)).clamp(min=0)
        flat = cam.flatten()
        flat[flat.topk(int(0.9 * len(flat)), largest=False).indices] = 0
        cam = flat.view_as(cam) + torch.eye(len(cam), dtype=torch.float64)
        result = cam / cam.sum(-1, keepdim=True) @ result
    return result[0, 1:]


def gradient_of(z: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(z, by, retain_graph=True)[0]


def legrad_clip(layers: list[Layer], score: Score, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Sums over the last two layers. Each has an embedding of its own, made of its mean token."""
    maps = [gradient_of(score(embed(layer.leaving.mean(0))), layer.A).clamp(min=0) for layer in layers[-2:]]
    return torch.stack(maps).sum(0).mean((0, 1))[1:]


def legrad_siglip(vision: Any, layers: list[Layer], score: Score, blank: Score | None) -> Tensor:
    """The last two layers, each pooled without the LayerNorm that comes before the pooling, and then the correction."""
    head, heads = vision.head, vision.config.num_attention_heads
    total, lit = torch.zeros(2, len(layers[0].leaving), dtype=torch.float64)
    for layer in layers[-2:]:
        (W_q, W_k, W_v), (b_q, b_k, b_v) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
        x = layer.leaving
        A, o = attend(linear(head.probe[0], W_q, b_q), linear(x, W_k, b_k), linear(x, W_v, b_v), heads)
        a = head.attention.out_proj(o)[0]
        e = a + head.mlp(head.layernorm(a))
        total = total + gradient_of(score(e), A).clamp(min=0).mean(0)[0]
        if blank is not None:
            lit = lit + gradient_of(blank(e), A).clamp(min=0).mean(0)[0]
    if blank is not None:
        total[(lit - lit.min()) / (lit.max() - lit.min()) > 0.8] = 0
    return total


# ---- Targets, also written anew.


def cosine(text: Tensor) -> Score:
    return lambda e: e @ text / e.norm() / text.norm()


def pre_activation(sae: SAE, latent: int) -> Score:
    def score(e: Tensor) -> Tensor:
        v = (e - sae.mean) * sae.scale
        if sae.config.normalise == "layer_norm":
            v = (v - v.mean()) / (v.std() + 1e-5)
        return (v - sae.pre_bias) @ sae.encoder[:, latent].double() + sae.latent_bias[latent]

    return score


def mean_of(scores: list[Score], weights: Tensor) -> Score:
    return lambda e: sum((w * score(e) for w, score in zip(weights, scores, strict=True)), torch.zeros(()).double())


class Case(NamedTuple):
    tower: ImageTower
    sae: SAE
    pixels: Tensor
    latents: Tensor
    words: WordTargets
    scores: list[Score]  # of both latents, two texts and a concept
    blank: Score
    vision: Any  # transformers' model, float64
    layers: list[list[Layer]]  # of each image

    def maps(self, method: str, **options: Any) -> Tensor:
        with torch.inference_mode():
            by_method = explain_latents(
                self.tower, self.sae, self.pixels, self.latents, (method,), Options(**options), self.words
            )
        return by_method[method].relevance

    def embed(self, token: Tensor) -> Tensor:
        assert isinstance(self.tower, ClipTower)
        e: Tensor = self.vision.post_layernorm(token) @ self.tower.projection.weight.double().T
        return e

    def assert_equal(self, maps: Tensor, published: Callable[[list[Layer], Score], Tensor]) -> None:
        """Within 1e-5 of the largest value in all images' maps of the target, since a map by gradeclip may be almost zero."""
        for target, score in enumerate(self.scores):
            expected = torch.stack([published(layers, score) for layers in self.layers]).detach()
            assert (maps[:, target] - expected).abs().max() < 1e-5 * expected.abs().max(), target


def case_of(model: Any, tower: ImageTower, normalise: str) -> Case:
    plain = random_sae(n_inputs=tower.n_outputs)
    sae = SAE(SAEConfig(tower.n_outputs, 96, k=8, normalise=normalise)).requires_grad_(False)
    sae.load_state_dict(plain.state_dict())
    texts = np.random.default_rng(6).standard_normal((4, tower.n_outputs)).astype(np.float32)
    words = word_targets(sae, texts[:3], n_texts=2, n_latents=4, positive=False, blank=texts[3:])
    pixels, latents = random_pixels(tower, 3), torch.tensor([[3, 41]] * 3)
    scores = [pre_activation(sae, latent) for latent in (3, 41)]
    scores += [cosine(torch.from_numpy(text).double()) for text in texts[:2]]
    named = [pre_activation(sae, int(latent)) for latent in words.concept_latents[0]]
    scores.append(mean_of(named, words.concept_weights[0].double()))
    vision = getattr(model, "vision_model", model)
    with torch.inference_mode():
        first = tower.first_tokens(pixels)
    vision = type(vision)(vision.config).double().eval().requires_grad_(False)
    vision.load_state_dict({name: tensor.double() for name, tensor in tower.vision.state_dict().items()})
    layers = [layers_of(vision, tokens.clone().double()) for tokens in first]
    return Case(tower, sae, pixels, latents, words, scores, cosine(torch.from_numpy(texts[3]).double()), vision, layers)


@pytest.fixture(params=["none", "layer_norm"], scope="module")
def clip(request: pytest.FixtureRequest) -> Case:
    return case_of(*random_tower(**CLIP), request.param)


@pytest.fixture(params=["none", "layer_norm"], scope="module")
def siglip(request: pytest.FixtureRequest) -> Case:
    return case_of(*random_siglip(**SIGLIP), request.param)


def of_embedding(case: Case, published: Callable[..., Tensor], *more: Any) -> Callable[[list[Layer], Score], Tensor]:
    """A procedure whose gradient begins at the embedding."""
    return lambda layers, score: published(layers, score(case.embed(layers[-1].leaving[0])), *more)


def test_chefer(clip: Case) -> None:
    clip.assert_equal(clip.maps("chefer"), of_embedding(clip, chefer))


def test_rollout(clip: Case) -> None:
    clip.assert_equal(clip.maps("rollout"), of_embedding(clip, rollout))


def test_gradeclip_with_the_real_heads(clip: Case) -> None:
    """Its notebook's cosine, and its scripts'."""
    clip.assert_equal(clip.maps("gradeclip"), of_embedding(clip, gradeclip, False))
    projected = clip.maps("gradeclip", gradeclip_cosine="projected")
    clip.assert_equal(projected, of_embedding(clip, gradeclip, True))
    assert (projected - clip.maps("gradeclip")).abs().max() > 0.05 * projected.max()


def test_legrad(clip: Case) -> None:
    clip.assert_equal(clip.maps("legrad"), lambda layers, score: legrad_clip(layers, score, clip.embed))


def test_legrad_of_siglip(siglip: Case) -> None:
    def published(layers: list[Layer], score: Score) -> Tensor:
        return legrad_siglip(siglip.vision, layers, score, siglip.blank)

    def uncorrected(layers: list[Layer], score: Score) -> Tensor:
        return legrad_siglip(siglip.vision, layers, score, None)

    siglip.assert_equal(siglip.maps("legrad"), published)
    siglip.assert_equal(siglip.maps("legrad", legrad_correction=False), uncorrected)
    blanked = siglip.maps("legrad", legrad_correction=False) != siglip.maps("legrad")
    assert blanked.any(-1).all()


@pytest.mark.parametrize("method", ["chefer", "legrad", "gradeclip", "rollout"])
def test_frozen_norms_give_another_map(clip: Case, method: str) -> None:
    """Otherwise the tests above would hold for any default norm."""
    own, exact, frozen = clip.maps(method), clip.maps(method, norm="exact"), clip.maps(method, norm="frozen")
    torch.testing.assert_close(own, exact, rtol=0, atol=0)
    assert ((frozen - own).abs().amax(-1) > 0.1 * own.amax(-1)).any(0).float().mean() > 0.5


LAYERS = {0: "all", 1: "last", 2: "last 2", None: "none"}


def test_the_table_of_methods_in_the_docs_says_what_the_code_says() -> None:
    lines = (Path(__file__).parent.parent.parent / "docs" / "maps.md").read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("| `--method` |"))
    assert [cell.strip() for cell in lines[start].split("|")[3:8]] == [
        "norm",
        "layers",
        "begins at",
        "units",
        "computed as published by",
    ]
    table = {}
    for line in lines[start + 2 :]:
        if not line.startswith("| `"):
            break
        name, _, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        table[re.findall(r"`(\w+)`", name)[0]] = cells
    assert list(table) == list(METHODS)
    assert list(OF_EMBEDDING) == list(FUNCTIONS)
    assert set(OF_TOKENS) == set(tokens.FUNCTIONS)
    for name, (norm, layers, target, units, published) in table.items():
        method = METHODS[name]
        assert (norm, layers, target) == (method.norm, LAYERS[method.layers], method.target), name
        assert units == (method.units or "none"), name
        assert published.startswith(method.published or "ours"), name


def test_norms_and_layers_are_the_methods_own_unless_asked_otherwise() -> None:
    norms = {name: DEFAULT_OPTIONS.norm_of(name) for name in OF_EMBEDDING}
    assert {name for name, norm in norms.items() if norm == "exact"} == {"chefer", "legrad", "gradeclip", "rollout"}
    assert {name for name, norm in norms.items() if norm == "frozen"} == {
        "contrib",
        "contrib_grad",
        "shapley",
        "removal",
    }
    assert Options(dense="value").norm_of("dense") == "frozen"
    asked = {name: Options(norm="frozen").norm_of(name) for name in OF_EMBEDDING}
    assert {name for name, norm in asked.items() if norm != "frozen"} == {"dense", "occlusion", "attention"}
    assert [DEFAULT_OPTIONS.layers_of(name, 12) for name in ("contrib", "chefer", "legrad")] == [12, 1, 2]
    assert DEFAULT_OPTIONS.layers_of("legrad", 1) == 1
    assert Options(layers=4).layers_of("legrad", 12) == 4


def test_methods_of_one_run_have_each_its_norm_and_read_outs_are_computed_once_for_each() -> None:
    """Together as alone, whatever the others' norms are."""
    _, tower = random_tower()
    sae, pixels, latents = random_sae(), random_pixels(tower, 2), torch.tensor([[3, 5], [7, 9]])
    asked = ("contrib", "chefer", "contrib_grad", "gradeclip", "attention")
    computed, of_both = [], Targets.read_outs

    def counted(*given: Any) -> Any:
        computed.append(given[2])
        return of_both(*given)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(Targets, "read_outs", counted)
        together = explain_latents(tower, sae, pixels, latents, asked)
    assert sorted(computed) == [False, True]
    for name in asked:
        with torch.inference_mode():
            alone = explain_latents(tower, sae, pixels, latents, (name,))[name]
        torch.testing.assert_close(together[name].relevance, alone.relevance)


def test_legrad_of_siglip_says_what_it_lacks() -> None:
    _, tower = random_siglip(**SIGLIP)
    sae, pixels = random_sae(n_inputs=64), random_pixels(tower, 1)
    with pytest.raises(ValueError, match="legrad_correction=False"):
        explain_latents(tower, sae, pixels, torch.tensor([[3]]), ("legrad",))
    explain_latents(tower, sae, pixels, torch.tensor([[3]]), ("legrad",), Options(legrad_target="cls"))

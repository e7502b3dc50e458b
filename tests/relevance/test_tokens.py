"""Tokens of a layer: what the SAE makes of them, and their maps, against transformers, NumPy and autograd in float64."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saecore.methods import Options
from saecore.relevance import pooling
from saecore.relevance.maps import Maps, completeness_error
from saecore.relevance.pooling import Pooled, pool_tokens
from saecore.relevance.tokens import FUNCTIONS, TokenTargets, explain_tokens, token_targets
from saecore.sae.model import SAE
from saecore.sae.sites import POOLS, check_pool
from saecore.towers.tokens import TokenTower, tokens_at
from tests.helpers.derivations import assert_close
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_sae, random_siglip, random_tower

TOWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (random_tower, SHAPES[0]),
    "deep": (random_tower, SHAPES[2]),
    "siglip": (random_siglip, SIGLIP_SHAPES[2]),
}

NORMALISED: list[dict[str, Any]] = [
    {"normalise": "layer_norm"},
    {"normalise": "constant_norm"},
    {"site": "layer1.residual:all:l2"},
]

K = 6


def made(which: str, layer: int = 1, reads: str = "patches") -> tuple[Any, TokenTower]:
    """transformers' model, and ours over it as far as a layer."""
    make, shape = TOWERS[which]
    model, whole = make(**shape)
    return model, tokens_at(whole, layer, reads)


def sae_of(tower: TokenTower, **config: Any) -> SAE:
    sae = random_sae(tower.n_outputs, n_latents=40, k=5)
    sae.config = dataclasses.replace(sae.config, **config)
    return sae


class Explained:
    """All methods' maps of some images, and what they were made of."""

    def __init__(self, tower: TokenTower, sae: SAE, pool: str, images: int = 3, **options: Any) -> None:
        self.tower, self.sae = tower, sae
        self.pixels = random_pixels(tower, images)
        how = Options(**options)
        with torch.inference_mode():
            self.streams, trace = tower.streams(self.pixels, how.layers or tower.n_layers)
            read = self.streams[:, tower.reads_from :]
            self.code: Pooled = pool_tokens(sae, read, pool, K, torch.tensor([3, 17]))
            self.targets: TokenTargets = token_targets(sae, tower, self.streams, self.code, pool)
            what = (self.pixels, self.streams, trace, self.targets, self.code, how)
            self.values, self.maps = self.targets.whole(self.streams), explain_tokens(tuple(FUNCTIONS), tower, *what)

    def __getitem__(self, method: str) -> Maps:
        return self.maps[method]


# ---- The tokens, and what an SAE makes of them.


@pytest.mark.parametrize("which", TOWERS)
@pytest.mark.parametrize("reads", ["patches", "all"])
def test_streams_are_transformers_hidden_states(which: str, reads: str) -> None:
    for layer in range(TOWERS[which][1]["layers"]):
        model, tower = made(which, layer, reads)
        pixels, first = random_pixels(tower, 7), tower.n_own if reads == "patches" else 0
        with torch.inference_mode():
            hidden = model(pixel_values=tower.normalise(pixels), output_hidden_states=True).hidden_states[layer + 1]
            torch.testing.assert_close(tower.embed(pixels), hidden[:, first:], rtol=1e-5, atol=1e-5)
            streams, trace = tower.streams(pixels, 1)
            torch.testing.assert_close(streams, hidden, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(tower.embed(pixels[3:4]), hidden[3:4, first:], rtol=1e-5, atol=1e-5)
        assert len(trace.v) == 1


def plain_sae(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstructions (T, n), (T, d) of vectors, as the papers write a TopK, ReLU or JumpReLU SAE."""
    m, b, E, D = (part.double().numpy() for part in (sae.mean, sae.pre_bias, sae.encoder, sae.atoms))
    p = ((x - m) * float(sae.scale) - b) @ E + sae.latent_bias.double().numpy()
    if sae.config.architecture == "topk":
        fires = p >= np.sort(p, 1)[:, -sae.config.k][:, None]
    else:
        fires = p > (0 if sae.threshold is None else sae.threshold.double().numpy())
    a = np.maximum(p, 0) * fires
    return a, (a @ D + b) / float(sae.scale) + m


@pytest.mark.parametrize("architecture", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("pool", POOLS)
def test_pooled_latents_are_those_of_a_numpy_sae(pool: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tower = made("clip", 1, "all")
    config = dataclasses.replace(
        random_sae().config, n_inputs=tower.n_outputs, n_latents=40, k=5, architecture=architecture
    )
    sae, generator = SAE(config).requires_grad_(False), torch.Generator().manual_seed(4)
    for tensor in sae.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    sae.scale.fill_(1.7)
    pixels = random_pixels(tower, 3)
    with torch.inference_mode():
        hidden = model(pixel_values=tower.normalise(pixels), output_hidden_states=True).hidden_states[2]
    # Images apart or together, in blocks that divide them unevenly.
    for entries in (1, 2 * 17 * 40, 1 << 20):
        monkeypatch.setitem(pooling.ENTRIES_AT_ONCE, "cpu", entries)
        code = pool_tokens(sae, tower.embed(pixels), pool, K, torch.tensor([3, 17]))
        for image, x in enumerate(hidden.double().numpy()):
            a, reconstruction = plain_sae(sae, x)
            values = {"max": a.max(0), "mean": a.mean(0), "sum": a.sum(0), "cls": a[0]}[pool]
            kept = code.latents[image].numpy()
            strongest = np.sort(values)[::-1][:K]
            np.testing.assert_allclose(values[kept[:K]], strongest, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(code.pooled[image], values[kept], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(code.at_tokens[image], a.T[kept], rtol=1e-5, atol=1e-5)
            assert kept[K:].tolist() == [3, 17]
            assert code.l0[image] == (a > 0).any(0).sum()
            error = ((x - reconstruction) ** 2).sum() / ((x - sae.mean.numpy()) ** 2).sum()
            assert code.fvu[image] == pytest.approx(error, rel=1e-4)
            cosines = (x * reconstruction).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(reconstruction, axis=1)
            assert code.cosine[image] == pytest.approx(cosines.mean(), rel=1e-4)


def test_no_more_tokens_are_encoded_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of tokens times all latents would be gigabytes: 32 images of B/16 by 24,576 latents are 620 MB."""
    tower = made("clip", 1, "all")[1]
    sae, streams, rows = sae_of(tower), tower.embed(random_pixels(tower, 7)), list[int]()
    encode = SAE.encode_sparse

    def counted(self: SAE, x: Tensor, at_least: int = 1) -> Any:
        rows.append(len(x))
        return encode(self, x, at_least)

    monkeypatch.setattr(SAE, "encode_sparse", counted)
    monkeypatch.setitem(pooling.ENTRIES_AT_ONCE, "cpu", 2 * 17 * 40)
    pool_tokens(sae, streams, "max", K, torch.tensor([3]))
    assert rows == [34, 34, 34, 17]


# ---- Maps.


class Plain:
    """A tower in float64, layer by layer, and the SAE's read-outs of its tokens, norms held constant."""

    def __init__(self, explained: Explained) -> None:
        tower = explained.tower
        self.tower, self.sae = tower, explained.sae
        self.vision = copy.deepcopy(tower.vision).double()
        first = self.vision.embeddings(tower.normalise(explained.pixels).double())
        self.first = self.vision.pre_layrnorm(first) if tower.n_own else first
        self.latents, self.weights = explained.targets.latents, explained.targets.weights.double()

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.tower.n_heads, -1)).transpose(1, 2)

    def layer(self, layer: Any, x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x (B, N, D), and whose queries, keys and values they are -> A, v by head, what the attention adds."""
        at, normed = layer.self_attn, layer.layer_norm1(x)
        q, k, v = (self.heads(part(normed)) for part in (at.q_proj, at.k_proj, at.v_proj))
        A = torch.softmax(q @ k.mT * at.scale, -1)
        return A, v, at.out_proj((A @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.vision.encoder.layers:
            x = x + self.layer(layer, x)[2]
            x = x + layer.mlp(layer.layer_norm2(x))
        return x

    def pre_activations(self, x: Tensor) -> Tensor:
        """Streams (B, M, D) -> p (B, n, M); the deviation or the length by which a sample is divided is a constant."""
        sae, config = self.sae, self.sae.config
        length = x.norm(dim=-1, keepdim=True).detach() if config.unit_length else 1.0
        u = (x / length - sae.mean.double()) * sae.scale.double()
        if config.normalise == "layer_norm":
            centred = u - u.mean(-1, keepdim=True)
            u = centred / (u.std(-1, keepdim=True).detach() + 1e-5)
        elif config.normalise == "constant_norm":
            u = u / (u.norm(dim=-1, keepdim=True).detach() / u.shape[-1] ** 0.5)
        rows = sae.encoder.T.double()[self.latents]
        return ((u - sae.pre_bias.double()) @ rows.mT + sae.latent_bias.double()[self.latents][:, None]).mT

    def z(self, x: Tensor) -> Tensor:
        return (self.pre_activations(x) * self.weights).sum(-1)


def of_patches(tower: TokenTower, by_token: Tensor) -> Tensor:
    return by_token[..., tower.n_own :].detach()


def cases() -> list[tuple[str, str, str, dict[str, Any]]]:
    """SigLIP's tokens are all patches, none of them CLS."""
    ways = [(which, *way) for which in TOWERS for way in WAYS if which != "siglip" or way[1] != "cls"]
    normalised = [("clip", "all", pool, config) for config in NORMALISED for pool in ("max", "mean")]
    return [(*way, {}) for way in ways] + normalised


WAYS = [("patches", "max"), ("patches", "mean"), ("all", "max"), ("all", "sum"), ("all", "cls")]


@pytest.mark.parametrize(("which", "reads", "pool", "config"), cases())
def test_contrib_equals_autograd_on_the_linearised_model(
    which: str, reads: str, pool: str, config: dict[str, Any]
) -> None:
    """Attention and MLPs are constants. What each token carries, and what others read of it, is scaled by 1 + epsilon."""
    tower = made(which, 2, reads)[1]
    explained = Explained(tower, sae_of(tower, **config), pool)
    plain = Plain(explained)
    x = plain.first.detach()
    epsilon = torch.zeros(x.shape[:2], dtype=torch.float64, requires_grad=True)
    linear = x * (1 + epsilon[..., None])
    for layer in plain.vision.encoder.layers:
        A, v, added = (part.detach() for part in plain.layer(layer, x))
        read = layer.self_attn.out_proj((A @ (v * (1 + epsilon)[:, None, :, None])).transpose(1, 2).flatten(2))
        after = x + added
        mlp = layer.mlp(layer.layer_norm2(after)).detach()
        x, linear = after + mlp, linear + read + mlp
    z = plain.z(linear)
    assert_close(explained.values, z.detach())
    expected = torch.stack([torch.autograd.grad(z[:, j].sum(), epsilon, retain_graph=True)[0] for j in range(K + 2)], 1)
    assert_close(explained["contrib"].relevance, of_patches(tower, expected))


@pytest.mark.parametrize(("which", "reads", "pool", "config"), cases())
def test_contrib_grad_equals_autograd_along_each_token(
    which: str, reads: str, pool: str, config: dict[str, Any]
) -> None:
    """One token runs through all layers, and the others are constants."""
    tower = made(which, 2, reads)[1]
    explained = Explained(tower, sae_of(tower, **config), pool, images=2)
    plain = Plain(explained)
    streams = [plain.first.detach()]
    for layer in plain.vision.encoder.layers:
        x = streams[-1] + plain.layer(layer, streams[-1])[2]
        streams.append((x + layer.mlp(layer.layer_norm2(x))).detach())
    expected = torch.zeros_like(plain.weights)
    for token in range(streams[0].shape[1]):
        if not plain.weights[..., token].any():
            continue
        own = start = streams[0][:, token].clone().requires_grad_()
        bumps, rows = [], []
        for layer, x in zip(plain.vision.encoder.layers, streams, strict=False):
            at, normed, mine = layer.self_attn, layer.layer_norm1(x), layer.layer_norm1(own)[:, None]
            mixed = torch.cat([normed[:, :token], mine, normed[:, token + 1 :]], 1)
            q, k, v = plain.heads(at.q_proj(mine)), plain.heads(at.k_proj(mixed)), plain.heads(at.v_proj(mixed))
            row = torch.softmax(q @ k.mT * at.scale, -1)
            bumps.append(torch.zeros_like(row).requires_grad_())
            rows.append(row.detach())
            own = own + at.out_proj(((row + bumps[-1]) @ v).transpose(1, 2).flatten(2))[:, 0]
            own = own + layer.mlp(layer.layer_norm2(own))
        p = plain.pre_activations(own[:, None])[..., 0]
        for j in range(p.shape[1]):
            gradients = torch.autograd.grad(p[:, j].sum(), [start, *bumps], retain_graph=True)
            total = sum((row * bump).sum(1)[:, 0] for row, bump in zip(rows, gradients[1:], strict=True))
            assert isinstance(total, Tensor)
            total[:, token] += (gradients[0] * start).sum(-1).detach()
            expected[:, j] += plain.weights[:, j, token, None] * total
    assert_close(explained["contrib_grad"].relevance, of_patches(tower, expected))


@pytest.mark.parametrize(("which", "reads", "pool", "config"), cases())
def test_occlusion_equals_brute_force(which: str, reads: str, pool: str, config: dict[str, Any]) -> None:
    tower = made(which, 1, reads)[1]
    explained = Explained(tower, sae_of(tower, **config), pool, images=2)
    plain = Plain(explained)
    whole = plain.z(plain.forward(plain.first))
    for patch in range(tower.grid[0] * tower.grid[1]):
        rest = [token for token in range(plain.first.shape[1]) if token != patch + tower.n_own]
        p = plain.pre_activations(plain.forward(plain.first[:, rest]))
        loss = whole - (p * plain.weights[..., rest]).sum(-1)
        got = explained["occlusion"].relevance[..., patch].double()
        torch.testing.assert_close(got, loss.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("which", "reads", "pool", "config"), cases())
def test_sums_add_up_whatever_the_layers(which: str, reads: str, pool: str, config: dict[str, Any]) -> None:
    tower = made(which, 2, reads)[1]
    for layers in (0, 1, 2):
        explained = Explained(tower, sae_of(tower, **config), pool, layers=layers)
        for method in ("contrib", "contrib_grad"):
            assert completeness_error(explained[method], explained.values).max() < 1e-5, (method, layers)
        error = explained["contrib_grad"].gradient_error
        assert error is not None
        assert (error / explained.values.abs().clamp(min=1)).max() < 1e-5


def test_a_wrong_gradient_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from saecore.towers import cls_path

    tower = made("clip", 2)[1]
    right = cls_path.slope
    monkeypatch.setattr(cls_path, "slope", lambda layer, inner: torch.ones_like(right(layer, inner)))
    explained = Explained(tower, sae_of(tower), "max")
    wrong = explained["contrib_grad"]
    assert (wrong.relevance.sum(-1) + wrong.remainder - explained.values).abs().max() < 1e-4, "the sum is no judge"
    assert completeness_error(wrong, explained.values).max() > 0.01


@pytest.mark.parametrize("pool", POOLS)
def test_what_is_explained_and_where_it_is_active(pool: str) -> None:
    """z is the pooled activation itself where a ReLU gives it, and the control's rows are attention's."""
    tower = made("clip", 1, "all")[1]
    explained = Explained(tower, sae_of(tower), pool)
    fires = explained.code.pooled > 0
    torch.testing.assert_close(explained.values[fires], explained.code.pooled[fires], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(explained["activation"].relevance, explained.code.at_tokens[..., 1:], rtol=0, atol=0)
    assert fires[:, : 5 if pool == "cls" else K].all()  # 5 latents fire at a token
    sums = explained["attention"].relevance.sum(-1)
    assert ((sums > 0) & (sums <= 1 + 1e-6))[fires].all()
    if pool == "max":
        strongest = explained.code.at_tokens.argmax(-1)
        assert (explained.targets.weights.argmax(-1) == strongest)[fires].all()


def test_batches_of_one_and_seven_agree() -> None:
    tower = made("siglip", 1)[1]
    sae = sae_of(tower)
    for pool in ("max", "mean"):
        together = Explained(tower, sae, pool, images=7)
        for image in (0, 3, 6):
            alone = _alone(together, image, pool)
            assert (alone.code.latents[0] == together.code.latents[image]).all()
            for method, maps in together.maps.items():
                torch.testing.assert_close(
                    alone[method].relevance[0], maps.relevance[image], rtol=1e-4, atol=1e-4, msg=method
                )


def _alone(together: Explained, image: int, pool: str) -> Explained:
    tower = together.tower
    explained = Explained.__new__(Explained)
    with torch.inference_mode():
        streams, trace = tower.streams(together.pixels[image : image + 1], tower.n_layers)
        explained.code = pool_tokens(together.sae, streams[:, tower.reads_from :], pool, K, torch.tensor([3, 17]))
        explained.targets = token_targets(together.sae, tower, streams, explained.code, pool)
        what = (together.pixels[image : image + 1], streams, trace, explained.targets, explained.code, Options())
        explained.values, explained.maps = (
            explained.targets.whole(streams),
            explain_tokens(tuple(FUNCTIONS), tower, *what),
        )
    return explained


@pytest.mark.parametrize(("output", "by_magnitude"), [("absolute", True), ("signed", True)])
@pytest.mark.parametrize("pool", ["max", "sum"])
def test_signed_outputs_compete_by_magnitude(output: str, by_magnitude: bool, pool: str) -> None:
    tower = made("clip", 1)[1]
    explained = Explained(tower, sae_of(tower, output=output, by_magnitude=by_magnitude), pool)
    sizes = explained.code.pooled.abs()[:, :K]
    assert (sizes[:, :-1] >= sizes[:, 1:] - 1e-6).all()
    fires = explained.code.at_tokens != 0
    assert fires[:, :K].any(-1).all()
    if output == "absolute" and pool == "sum":  # |p| is p with its sign
        torch.testing.assert_close(explained.values, explained.code.pooled, rtol=1e-4, atol=1e-4)


def test_pools_are_told_and_no_other_word() -> None:
    check_pool("max", "patches")
    check_pool("cls", "all")
    check_pool("", "cls")
    check_pool("", "")
    for pool, tokens, said in [
        ("", "patches", "pool: the SAE reads patches tokens, and one value .* must be one of max, mean, sum$"),
        ("cls", "patches", "pool 'cls': the SAE reads patches"),
        ("avg", "all", "one of max, mean, sum, cls"),
        ("max", "cls", "nothing to pool"),
        ("max", "", "nothing to pool"),
    ]:
        with pytest.raises(ValueError, match=said):
            check_pool(pool, tokens)

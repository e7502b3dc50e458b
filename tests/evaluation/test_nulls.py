"""SAEs and towers that have learned nothing: what is drawn, what stays, and what they compute, beside transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

from saecore.evaluation.nulls import cascaded, untrained, with_other_rows
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.siglip import SiglipTower
from saecore.towers.stopped import StoppedTower, stopped_at
from saecore.towers.tokens import TokenTower, tokens_at
from saecore.towers.tower import ImageTower
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_sae, random_siglip, random_tower


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- Encoder rows.


def test_other_rows_have_the_length_of_the_trained_and_no_direction_of_theirs() -> None:
    sae = random_sae(n_inputs=256, n_latents=400)
    before = kept(sae)
    other = with_other_rows(sae, seed=3)
    torch.testing.assert_close(other.encoder.norm(dim=0), sae.encoder.norm(dim=0), rtol=3e-7, atol=0)
    cosines = torch.cosine_similarity(other.encoder, sae.encoder, dim=0)
    assert abs(cosines.mean()) < 4 / (400 * 256) ** 0.5, "four standard deviations of the mean of random cosines"
    assert cosines.std() == pytest.approx(256**-0.5, rel=0.15)
    assert other.encoder.stride() == sae.encoder.stride()
    assert same({**kept(other), "encoder": sae.encoder}, before), "only the encoder differs"
    assert same(kept(sae), before)
    assert torch.equal(other.encoder, with_other_rows(sae, seed=3).encoder)
    assert not torch.equal(other.encoder, with_other_rows(sae, seed=4).encoder)


def test_a_tied_decoder_is_still_the_encoder() -> None:
    sae = SAE(SAEConfig(n_inputs=4, n_latents=6, tied=True, architecture="relu"))
    with torch.no_grad():
        sae.encoder.normal_()
    other = with_other_rows(sae)
    assert other.atoms.data_ptr() == other.encoder.data_ptr()
    assert other.encoder.requires_grad


# ---- Towers.

KINDS = ["clip", "siglip", "clip, CLS of layer 1", "clip, tokens of layer 1", "siglip, tokens of layer 1"]


def made(kind: str) -> ImageTower:
    tower: ImageTower = (
        random_siglip(**SIGLIP_SHAPES[0])[1] if kind.startswith("siglip") else random_tower(**SHAPES[0])[1]
    )
    if kind.endswith("CLS of layer 1"):
        return stopped_at(tower, 1)
    return tokens_at(tower, 1, "patches") if kind.endswith("tokens of layer 1") else tower


def plain(tower: ImageTower, pixels: Tensor) -> Tensor:
    """What a fresh model of transformers makes of the pixels with the tower's weights, at the tower's site."""
    whole: Any = getattr(tower, "whole", tower)
    config, state = whole.vision.config, whole.vision.state_dict()
    if isinstance(whole, SiglipTower):
        model: Any = SiglipVisionModel(config)
        getattr(model, "vision_model", model).load_state_dict(state)
    else:
        model = CLIPVisionModelWithProjection(config)
        model.vision_model.load_state_dict(state)
        model.visual_projection.load_state_dict(whole.projection.state_dict())
    out = model.eval()(pixel_values=tower.normalise(pixels), output_hidden_states=True)
    if tower is whole:
        return out.pooler_output if isinstance(whole, SiglipTower) else out.image_embeds
    stream = out.hidden_states[tower.n_layers]
    return stream[:, tower.reads_from :] if isinstance(tower, TokenTower) else stream[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_towers_that_have_learned_nothing(kind: str) -> None:
    tower = made(kind)
    before, whole = kept(tower), getattr(tower, "whole", None)
    pixels, state = random_pixels(tower, 2), torch.get_rng_state()
    other, again = untrained(tower, seed=5), untrained(tower, seed=5)
    top, part = cascaded(tower, tower.n_layers, seed=5), cascaded(tower, 1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(kept(tower), before)
    assert same(kept(other), kept(again))
    assert not same(kept(other), kept(untrained(tower, seed=6)))
    assert same(kept(cascaded(tower, 0)), before)
    assert type(other) is type(tower)
    for made_anew in (other, top, part):
        assert (made_anew.n_outputs, made_anew.grid, made_anew.n_layers) == (
            tower.n_outputs,
            tower.grid,
            tower.n_layers,
        )
        assert not any(parameter.requires_grad for parameter in made_anew.parameters())
        if isinstance(made_anew, StoppedTower | TokenTower):
            assert made_anew.vision.encoder.layers[0] is made_anew.whole.vision.encoder.layers[0]
            assert made_anew.whole is not whole
        with torch.inference_mode():
            torch.testing.assert_close(made_anew.embed(pixels), plain(made_anew, pixels), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(made_anew.embed(pixels), tower.embed(pixels), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_drawn_from_the_top(kind: str) -> None:
    tower = made(kind)
    drawn = getattr(untrained(tower, seed=5), "whole", untrained(tower, seed=5))
    trained = getattr(tower, "whole", tower)
    for layers in range(1, tower.n_layers + 1):
        other = cascaded(tower, layers, seed=5)
        found = getattr(other, "whole", other)
        for index, layer in enumerate(found.vision.encoder.layers):
            source = trained if index < tower.n_layers - layers else drawn
            assert same(kept(layer), kept(source.vision.encoder.layers[index])), (layers, index)
        assert same(kept(found.vision.embeddings), kept(trained.vision.embeddings))
        head = "head" if isinstance(found, SiglipTower) else "projection"
        heads = [getattr(one.vision if head == "head" else one, head) for one in (found, drawn, trained)]
        assert same(kept(heads[0]), kept(heads[1]))
        assert not same(kept(heads[0]), kept(heads[2]))
        assert same(kept(found.vision.post_layernorm), kept(drawn.vision.post_layernorm))
    with pytest.raises(ValueError, match=f"layers 9: this tower has {tower.n_layers} layers"):
        cascaded(tower, 9)


def test_precision_stays() -> None:
    tower = made("clip")
    tower.run_in(torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in tower.state_dict().items()}
    for other in (untrained(tower), cascaded(tower, 2)):
        assert {name: tensor.dtype for name, tensor in other.state_dict().items()} == types

"""Our forward against transformers' own, on random small CLIPs and on the embedded model."""

import io
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from saecore.hub import DEMO_CLIP
from saecore.images.decode import decode_image
from saecore.relevance.explain import explain_latents
from saecore.towers.loading import load_tower
from tests.helpers.photographs import photographs
from tests.helpers.towers import SHAPES, random_pixels, random_sae, random_tower


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_equals_transformers(shape: dict[str, Any]) -> None:
    model, tower = random_tower(**shape)
    pixels = random_pixels(tower, 5)
    with torch.inference_mode():
        expected = model(tower.normalise(pixels)).image_embeds
        embedding, _ = tower(pixels)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tower.embed(pixels), expected, rtol=1e-5, atol=1e-5)


def test_embedding_equals_transformers_on_the_embedded_model() -> None:
    tower = load_tower("demo")
    model = CLIPVisionModelWithProjection.from_pretrained(DEMO_CLIP).eval()
    pixels = random_pixels(tower, 5)
    with torch.inference_mode():
        expected = model(tower.normalise(pixels)).image_embeds
        torch.testing.assert_close(tower.embed(pixels), expected, rtol=1e-5, atol=1e-5)


def test_photographs_embed_as_with_the_models_own_image_processor() -> None:
    """Bytes to embedding by both ways, on the photographs of scikit-image and scikit-learn: cosine and pixels."""
    from transformers import CLIPImageProcessorPil

    tower, processor = load_tower("demo"), CLIPImageProcessorPil.from_pretrained(DEMO_CLIP)
    model = CLIPVisionModelWithProjection.from_pretrained(DEMO_CLIP).eval()
    for name, pixels in photographs().items():
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG", quality=90)
        ours = torch.from_numpy(decode_image(sink.getvalue(), tower.preprocess).pixels.copy())[None]
        theirs = processor(Image.open(sink).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            torch.testing.assert_close(tower.normalise(ours), theirs, rtol=1e-5, atol=1e-5)
            cosine = torch.cosine_similarity(tower.embed(ours), model(theirs).image_embeds)
        assert cosine > 0.9999, name


@pytest.mark.parametrize("shape", SHAPES)
def test_trace_is_what_transformers_computes(shape: dict[str, Any]) -> None:
    """Attention rows against eager attention's weights, residual streams against hidden_states."""
    model, tower = random_tower(**shape)
    model.set_attn_implementation("eager")
    pixels = random_pixels(tower, 3)
    with torch.inference_mode():
        theirs = model(tower.normalise(pixels), output_attentions=True, output_hidden_states=True)
        _, trace = tower(pixels)
    for layer, attention in enumerate(theirs.attentions):
        torch.testing.assert_close(trace.query_attention[layer], attention[:, :, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trace.query_before[layer], theirs.hidden_states[layer][:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trace.query_final, theirs.hidden_states[-1][:, 0], rtol=1e-5, atol=1e-5)


def test_layers_in_bfloat16_give_nearly_the_same() -> None:
    """As on a GPU: the embedding keeps its direction, and maps still add up to what bfloat16's 8 bits allow."""
    _, tower = random_tower(layers=6, width=64)
    sae, pixels = random_sae(), random_pixels(tower, 8)
    latents = torch.arange(96).expand(8, -1)
    exact = tower.embed(pixels)
    tower.run_in(torch.bfloat16)
    embedding = tower.embed(pixels)
    assert embedding.dtype == torch.float32
    assert torch.cosine_similarity(embedding, exact).min() > 0.999
    maps = explain_latents(tower, sae, pixels, latents)["contrib"]
    assert maps.relevance.dtype == torch.float32
    error = (maps.relevance.sum(-1) + maps.remainder - sae.pre_activations(embedding).gather(1, latents)).abs()
    terms = maps.relevance.abs().sum(-1) + maps.remainder.abs()
    assert (error / terms).max() < 0.03  # a bfloat16 is right to 0.4 %; measured 1.4 %


def test_a_patch_with_an_outlying_norm_is_flagged_as_sink() -> None:
    """Planted: one position's embedding is made huge in one direction, so that its token stays large in every block."""
    model, tower = random_tower(image_size=64, patch_size=8)
    with torch.inference_mode():
        # The flat first LayerNorm would undo a planted norm: let it pass big tokens by planting after it, through the MLPs'
        # residual: position 17 gets a direction that LayerNorm's weight then blows up for that token only.
        direction = torch.zeros(model.config.hidden_size)
        direction[0] = 100.0
        model.vision_model.embeddings.position_embedding.weight[1 + 17] += direction
        model.vision_model.pre_layrnorm.weight[0] = 50.0
        _, trace = tower(random_pixels(tower, 2))
    assert trace.sinks.nonzero().tolist() == [[0, 17], [1, 17]]


def test_a_model_that_is_not_a_clip_is_refused_by_name(tmp_path: object) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'vit' model"):
        load_tower(str(tmp_path))


def test_a_checkpoint_without_its_projection_is_refused(tmp_path: object) -> None:
    from transformers import CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((DEMO_CLIP / "preprocessor_config.json").read_text())  # type: ignore[operator]
    with pytest.raises(ValueError, match="visual_projection"):
        load_tower(str(tmp_path))


def test_a_missing_model_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="no/such-model") as caught:
        load_tower("no/such-model")
    assert "\n" not in str(caught.value)

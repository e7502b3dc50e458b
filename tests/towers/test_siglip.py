"""SigLIP: our forward against transformers' own, every method against autograd and a plain pooling in float64, and the jobs."""

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import sentencepiece
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from jobs import embed, explain
from saecore.demo import drawing, scenes
from saecore.methods import METHODS, OF_EVERY_TOWER, Options
from saecore.relevance.explain import check_fits, explain_latents
from saecore.relevance.maps import completeness_error
from saecore.relevance.targets import Targets, WordTargets, word_targets
from saecore.runs.files import open_dataset
from saecore.sae.model import SAE
from saecore.towers.loading import load_text_tower, load_tower
from saecore.towers.siglip import SiglipTower
from saecore.towers.text import TextTower, embed_texts
from tests.helpers.derivations import Layer, assert_close, fused, ours, plain_layers, read, some_latents
from tests.helpers.mistakes import mistake
from tests.helpers.towers import SIGLIP_SHAPES, fill, random_pixels, random_sae, random_siglip

DECOMPOSITIONS = [name for name in OF_EVERY_TOWER if METHODS[name].decomposes]


class Pooled(NamedTuple):
    """The pooling as the formula has it, float64, in autograd's graph."""

    A: Tensor  # (B, H, N), a variable
    terms: Tensor  # (B, N, D): what each token gives to `a`
    a: Tensor  # (B, D)
    e: Tensor  # (B, D)
    q: Tensor  # (D,)
    k: Tensor  # (B, N, D)
    v: Tensor  # (B, N, D)


def pooled(vision: Any, tokens: Tensor) -> Pooled:
    head, n_heads = vision.head, vision.config.num_attention_heads
    h = vision.post_layernorm(tokens)
    (W_q, W_k, W_v), (b_q, b_k, b_v) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    q, k, v = W_q @ head.probe[0, 0] + b_q, h @ W_k.T + b_k, h @ W_v.T + b_v
    q_HD, k_BNHD, v_BNHD = (t.unflatten(-1, (n_heads, -1)) for t in (q, k, v))
    A = torch.softmax(torch.einsum("hd,bnhd->bhn", q_HD, k_BNHD) / q_HD.shape[-1] ** 0.5, -1)
    A = A if A.requires_grad else A.requires_grad_()
    out = head.attention.out_proj
    terms = torch.einsum("bhn,bnhd->bnhd", A, v_BNHD).flatten(2) @ out.weight.T
    a = terms.sum(1) + out.bias
    return Pooled(A, terms, a, a + head.mlp(head.layernorm(a)), q, k, v)


class Case(NamedTuple):
    tower: SiglipTower
    sae: SAE
    pixels: Tensor
    latents: Tensor
    vision: Any  # transformers' model, float64
    layers: list[Layer]
    pool: Pooled

    def gradients(self, e: Tensor, *by: Tensor) -> list[tuple[Tensor, ...]]:
        """Of each of the k latents, read off `e`."""
        z = read(self.sae, e, self.latents)
        return [torch.autograd.grad(z[:, j].sum(), by, retain_graph=True) for j in range(z.shape[1])]

    def maps(self, method: str, **options: Any) -> Tensor:
        return ours(self.tower, self.sae, self.pixels, self.latents, method, blank(self.sae), **options)


def blank(sae: SAE) -> WordTargets:
    """A text that says nothing, and no target; random, since so are the weights."""
    texts = np.random.default_rng(4).standard_normal((1, sae.config.n_inputs)).astype(np.float32)
    return word_targets(sae, texts[:0], 0, 0, False, texts)


@pytest.fixture(params=SIGLIP_SHAPES, ids=lambda shape: f"{shape['layers']} layers", scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    model, tower = random_siglip(**request.param)
    sae, pixels = random_sae(n_inputs=tower.n_outputs), random_pixels(tower, 3)
    vision = copy.deepcopy(model).double()
    layers = plain_layers(vision, vision.embeddings(tower.normalise(pixels)))
    return Case(tower, sae, pixels, some_latents(sae, 3, 5), vision, layers, pooled(vision, layers[-1].leaving))


def test_embedding_equals_transformers(case: Case) -> None:
    model = copy.deepcopy(case.vision).float()
    with torch.inference_mode():
        expected = model(case.tower.normalise(case.pixels)).pooler_output
        embedding, trace = case.tower(case.pixels)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.tower.embed(case.pixels), expected, rtol=1e-5, atol=1e-5)
    assert_close(embedding, case.pool.e.detach())
    assert_close(trace.query_attention[0], case.pool.A.detach())
    assert case.tower.grid[0] * case.tower.grid[1] == trace.values[0].shape[1]


@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_methods_through_the_pooling_equal_autograd(case: Case, norm: str) -> None:
    pool = case.pool
    A = pool.A[:, None].detach()
    D = torch.stack([found[0] for found in case.gradients(pool.e, pool.A)], 1)
    # Gradient x input of a model in which only what patches give to `a` is live, and the MLP is a constant.
    gate = torch.ones(pool.terms.shape[:2], dtype=torch.float64, requires_grad=True)
    direct = (pool.terms.detach() * gate[..., None]).sum(1) + (pool.e - pool.terms.sum(1)).detach()
    expected = {
        "contrib": torch.stack([found[0] for found in case.gradients(direct, gate)], 1),
        "contrib_grad": (A * D).sum(2),
        "chefer": (A * D).clamp(min=0).mean(2),
        "legrad": D.clamp(min=0).mean(2),
        "attention": A.mean(2).expand(-1, D.shape[1], -1),
    }
    for name, wanted in expected.items():
        assert_close(case.maps(name, norm=norm, legrad_target="cls"), wanted)
        assert_close(case.maps(name, norm=norm, legrad_target="cls", layers=1), wanted)
    cosine = torch.cosine_similarity(pool.q.expand_as(pool.k), pool.k, dim=-1)
    low, high = cosine.amin(1, keepdim=True), cosine.amax(1, keepdim=True)
    loose = ((cosine - low) / (high - low))[:, None]
    assert_close(case.maps("gradeclip", norm=norm), (loose * D.sum(2)).clamp(min=0).detach())


def test_rollout_equals_whole_matrices(case: Case) -> None:
    """Layers of the encoder as for CLIP, the pooling's row on top of them, without an identity."""
    every = case.gradients(case.pool.e, *(layer.A for layer in case.layers), case.pool.A)
    for discard in (0.9, 0.5, 0.0):
        expected = np.zeros((len(case.pixels), len(every), case.pool.A.shape[-1]))
        for image in range(len(case.pixels)):
            for target, found in enumerate(every):
                *inner, top = (G[image].numpy() for G in found)
                row = fused(case.pool.A[image, :, None].detach().numpy(), top[:, None], discard)
                row /= max(row.sum(), 1e-300)
                for layer, G in zip(reversed(case.layers), reversed(inner), strict=True):
                    mixed = fused(layer.A[image].detach().numpy(), G, discard) + np.eye(row.shape[1])
                    row = row @ (mixed / mixed.sum(1, keepdims=True))
                expected[image, target] = row
        assert_close(case.maps("rollout", discard=discard), expected)


def test_dense_is_the_pooling_of_each_patch_alone(case: Case) -> None:
    last = case.layers[-1].leaving
    alone = [read(case.sae, pooled(case.vision, last[:, [i]]).e, case.latents) for i in range(last.shape[1])]
    assert_close(case.maps("dense"), torch.stack(alone, -1).detach())
    w = (case.sae.encoder.double() * case.sae.scale).T[case.latents]
    given = case.pool.v @ case.vision.head.attention.out_proj.weight.T
    assert_close(case.maps("dense", dense="value"), (w @ given.mT).detach())


@pytest.mark.parametrize("block", [1, 2])
def test_occlusion_is_transformers_run_again_without_the_tokens(case: Case, block: int) -> None:
    model = copy.deepcopy(case.vision).float()
    height, width = case.tower.grid
    found = case.maps("occlusion", block=block).unflatten(-1, (height, width))
    with torch.inference_mode():
        first = model.embeddings(case.tower.normalise(case.pixels))

        def values(left: list[int]) -> Tensor:
            hidden = model.encoder(inputs_embeds=first[:, left]).last_hidden_state
            return case.sae.pre_activations(model.head(model.post_layernorm(hidden))).gather(1, case.latents)

        everything = list(range(height * width))
        whole = values(everything)
        for top in range(0, height, block):
            for left in range(0, width, block):
                square = found[:, :, top : top + block, left : left + block]
                inside = [y * width + x for y in range(top, top + block) for x in range(left, min(width, left + block))]
                lost = whole - values([i for i in everything if i not in inside])
                expected = (lost / square[0, 0].numel())[:, :, None, None].expand_as(square)
                torch.testing.assert_close(square, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("norm", ["frozen", "exact"])
def test_decompositions_and_their_remainder_add_up(case: Case, norm: str) -> None:
    """For latents, texts and concepts, with SAEs whose normaliser depends on the image."""
    texts = torch.randn(4, case.tower.n_outputs, generator=torch.Generator().manual_seed(5)).numpy()
    for normalise in ("none", "layer_norm", "constant_norm"):
        sae = SAE(dataclasses.replace(case.sae.config, normalise=normalise)).requires_grad_(False)
        sae.load_state_dict(case.sae.state_dict())
        words = word_targets(sae, texts, n_texts=2, n_latents=6, positive=False)
        with torch.inference_mode():
            found = explain_latents(
                case.tower, sae, case.pixels, case.latents, DECOMPOSITIONS, Options(norm=norm), words
            )
            z = Targets(sae, case.latents, words).values(case.tower.embed(case.pixels)[:, None])[:, 0]
        for maps in found.values():
            assert completeness_error(maps, z).max() < 1e-5
            assert maps.relevance.sum(-1).std(0).mean() > 0.005


@pytest.mark.parametrize("name", OF_EVERY_TOWER)
def test_a_map_depends_on_its_image_and_its_read_out_only(name: str) -> None:
    _, tower = random_siglip(**SIGLIP_SHAPES[0])
    sae, pixels = random_sae(n_inputs=32), random_pixels(tower, 4)
    latents = torch.stack([torch.randperm(96, generator=torch.Generator().manual_seed(i))[:40] for i in range(4)])
    together = ours(tower, sae, pixels, latents, name, blank(sae))
    for image in range(4):
        alone = ours(tower, sae, pixels[image : image + 1], latents[image : image + 1, 9:10], name, blank(sae))
        torch.testing.assert_close(alone[0, 0], together[image, 9], rtol=1e-4, atol=1e-5)


def test_layers_in_bfloat16_give_nearly_the_same() -> None:
    """As on a GPU, for all methods; bounds as for CLIP."""
    _, tower = random_siglip(**SIGLIP_SHAPES[2])
    sae, pixels = random_sae(n_inputs=64), random_pixels(tower, 8)
    latents = torch.arange(12).expand(8, -1)
    exact = tower.embed(pixels)
    tower.run_in(torch.bfloat16)
    with torch.inference_mode():
        embedding = tower.embed(pixels)
        assert embedding.dtype == torch.float32
        assert torch.cosine_similarity(embedding, exact).min() > 0.999
        found = explain_latents(tower, sae, pixels, latents, OF_EVERY_TOWER, words=blank(sae))
        pre = sae.pre_activations(embedding).gather(1, latents)
    assert {maps.relevance.dtype for maps in found.values()} == {torch.float32}
    for maps in (found[name] for name in DECOMPOSITIONS):
        error = (maps.relevance.sum(-1) + maps.remainder - pre).abs()
        assert (error / (maps.relevance.abs().sum(-1) + maps.remainder.abs())).max() < 0.03


def test_a_patch_with_an_outlying_norm_is_flagged_as_sink() -> None:
    """Planted: one position's embedding is made huge, so that its residual stream stays so through all layers."""
    _, tower = random_siglip(64, 8, 32, 4, 3, "gelu_pytorch_tanh")
    tower.vision.embeddings.position_embedding.weight[17, 0] += 100
    with torch.inference_mode():
        _, trace = tower(random_pixels(tower, 2))
    assert trace.sinks.nonzero().tolist() == [[0, 17], [1, 17]]


def test_what_this_tower_has_not_is_refused() -> None:
    _, tower = random_siglip(**SIGLIP_SHAPES[0])
    check_fits(tower, ("occlusion",), Options(block=3))
    with pytest.raises(ValueError, match="block 4: this model has 4 patches a side"):
        check_fits(tower, ("occlusion",), Options(block=4))
    for name, most, target in (("contrib", 1, "mean"), ("legrad", 1, "cls"), ("legrad", 3, "mean")):
        check_fits(tower, (name, "dense"), Options(layers=most, legrad_target=target))
        with pytest.raises(ValueError, match=f"layers {most + 1}: {name} has {most} to look at"):
            check_fits(tower, (name, "dense"), Options(layers=most + 1, legrad_target=target))


# ---- Files, as transformers writes them.


def spiece(folder: Path) -> SiglipTokenizer:
    """SigLIP's own tokenizer, over a vocabulary learned from scene captions. It lower-cases, and drops punctuation."""
    captions = (scene.caption for scene in scenes.scenes_of(scenes.SEED_DEMO, 300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions, model_prefix=str(folder / "spiece"), vocab_size=60, minloglevel=2
    )
    return SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"])


def word_level() -> PreTrainedTokenizerFast:
    """As some of SigLIP 2's: returns a mask that the model never saw, and knows lower-case words only."""
    words = ["<pad>", "<eos>", "<unk>", "a", "red", "blue", "circle", "square"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SigLIP with random weights: 64 pixels, patches of 16, texts of 40 tokens to another width before its head."""
    folder = tmp_path_factory.mktemp("siglip")
    tokenizer = spiece(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = small | {"num_hidden_layers": 3, "image_size": 64, "patch_size": 16}
    text = {**small, "hidden_size": 48, "projection_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 40}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": len(tokenizer)}))
    fill(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    described = {"image_processor_type": "SiglipImageProcessor", "resample": 2, "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    random_sae(n_inputs=32).save(folder / "sae")
    return folder


def test_explain_on_a_saved_model(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Embeddings are those of transformers' model behind its own image processor; all methods, all kinds of targets."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    given = [
        "--images",
        str(shards),
        "--clip",
        str(folder),
        "--sae",
        str(folder / "sae"),
        "--out",
        str(tmp_path / "run"),
    ]
    given += ["--method", ",".join(OF_EVERY_TOWER), "--targets", "kept", "text:a Red circle", "concept:blue"]
    assert explain.main([*given, "--keep-embeddings", "--limit", "6", "--local"]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        f"{record['worst_completeness_error']:.1e} worst error of map + remainder, in float32"
        in capsys.readouterr().out
    )
    assert record["status"] == "complete"
    assert record["worst_completeness_error"] < 1e-5
    assert record["grid"] == [4, 4]
    norms = record["parts"]["norms"]
    assert (norms["contrib"], norms["chefer"], norms["legrad"]) == ("frozen", "exact", "exact")
    said = open_dataset(str(tmp_path / "run"), "maps").schema.metadata[b"norms"].decode()
    assert said.startswith("contrib frozen, contrib_grad frozen, chefer exact, ")
    rows = open_dataset(str(tmp_path / "run"), "images").to_table().sort_by("image_id").to_pylist()
    maps = open_dataset(str(tmp_path / "run"), "maps").to_table().to_pylist()
    assert len(rows) == 6
    assert len(maps) == 6 * len(OF_EVERY_TOWER) * (8 + 2)
    assert {row["target"] for row in maps} == {None, "text: a Red circle", "concept: blue"}

    again = [*given, "--norm", "frozen", "--keep-embeddings", "--limit", "6", "--local"]
    assert "norms was {" in mistake(explain.main, again, capsys)

    model, processor = SiglipModel.from_pretrained(folder).eval(), SiglipImageProcessorPil.from_pretrained(folder)
    for row in rows:
        scene = scenes.scene_at(scenes.SEED_DEMO, int(Path(row["key"]).stem))
        picture = Image.open(io.BytesIO(drawing.jpeg(scene, 192))).convert("RGB")
        with torch.inference_mode():
            expected = model.vision_model(**processor(picture, return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(row["embedding"], expected, rtol=1e-4, atol=1e-4)


TEXTS = ["red", "A red Circle, and a blue square!", "large " * 60]


def test_texts_are_embedded_as_in_training(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = SiglipModel.from_pretrained(folder).eval(), SiglipTokenizer.from_pretrained(folder)

    def expected(ids: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model.text_model(ids).pooler_output.numpy()

    ids = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt")["input_ids"]
    assert ids.shape == (3, 40)
    tower = load_text_tower(str(folder))
    for batch_size in (1, 64):
        np.testing.assert_allclose(embed_texts(tower, TEXTS, batch_size), expected(ids), rtol=1e-5, atol=1e-5)
    assert tower.too_long(TEXTS) == 1

    upper = TextTower(tower.model, word_level())
    padded = torch.tensor([[3, 4, 6, 1] + 36 * [0]])  # a red circle <eos>, no mask over the padding
    np.testing.assert_allclose(embed_texts(upper, ["A RED Circle"]), expected(padded), rtol=1e-5, atol=1e-5)

    words = tmp_path / "words.txt"
    words.write_text("\n".join(text.strip() for text in TEXTS))
    assert embed.main(["--text", str(words), "--clip", str(folder), "--out", str(tmp_path / "texts")]) == 0
    assert "1 texts are longer than the 40 tokens" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "texts" / "texts.parquet")
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected(ids), rtol=1e-5, atol=1e-5)


def test_a_tower_that_is_not_supported_is_refused_by_name(
    folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Siglip2Config().save_pretrained(tmp_path / "naflex")
    for load in (load_tower, load_text_tower):
        with pytest.raises(ValueError, match=r"'siglip2' model; supported are .* SigLIP 2 at a fixed resolution"):
            load(str(tmp_path / "naflex"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    SiglipVisionModel(SiglipVisionConfig(**small, image_size=64, patch_size=16, vision_use_head=False)).save_pretrained(
        tmp_path / "headless"
    )
    (tmp_path / "headless" / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    blind = tmp_path / "blind"  # without a text tower
    SiglipVisionModel(SiglipVisionConfig(**small, image_size=64, patch_size=16)).save_pretrained(blind)
    (blind / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    given = ["--images", str(shards), "--sae", str(folder / "sae"), "--local", "--out", str(tmp_path / "run")]
    for more, complaint in (
        (["--clip", str(tmp_path / "naflex")], "'siglip2' model"),
        (["--clip", str(tmp_path / "headless")], "without its pooling head"),
        (["--clip", str(folder), "--layers", "2"], "--layers 2: contrib has 1"),
        (["--clip", str(blind), "--method", "legrad"], "unless its option legrad_correction is off"),
    ):
        assert complaint in mistake(explain.main, [*given, *more], capsys)

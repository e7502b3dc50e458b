"""The text tower against transformers' own CLIPModel, templates, and what a vocabulary file may hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from saecore.hub import DEMO_CLIP
from saecore.naming.vocabulary import read_vocabulary
from saecore.towers.loading import load_text_tower
from saecore.towers.text import TextTower, embed_texts, embed_words

TEXTS = ["red", "a red circle", "blue square and a green star", "red " * 60]


@pytest.fixture(scope="module")
def tower() -> TextTower:
    return load_text_tower("demo")


def test_embeddings_equal_transformers(tower: TextTower) -> None:
    model, tokenizer = CLIPModel.from_pretrained(DEMO_CLIP).eval(), AutoTokenizer.from_pretrained(DEMO_CLIP)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
    # transformers 4 returns the features, 5 an output whose pooled part they are.
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    for batch_size in (1, 3, 64):
        found = embed_texts(tower, TEXTS, batch_size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert not np.allclose(np.linalg.norm(found, axis=1), 1)
    assert tower.too_long(TEXTS) == 1
    assert embed_texts(tower, []).shape == (0, tower.n_outputs)


def test_several_templates_are_averaged_on_the_sphere(tower: TextTower) -> None:
    words = ["red", "circle", "br{}ces"]
    plain = embed_words(tower, words, ["a {}"])
    np.testing.assert_array_equal(plain, embed_texts(tower, ["a red", "a circle", "a br{}ces"]))
    each = [embed_words(tower, words, [template]) for template in ("{}", "a {}")]
    expected = sum(found / np.linalg.norm(found, axis=1, keepdims=True) for found in each) / 2
    np.testing.assert_allclose(embed_words(tower, words, ["{}", "a {}"]), expected, rtol=1e-5, atol=1e-6)


def test_the_hash_is_of_the_weights_and_of_the_vocabulary(tower: TextTower) -> None:
    other = load_text_tower("demo")
    assert other.sha256() == tower.sha256()
    other.tokenizer.add_tokens(["zebra"])
    assert other.sha256() != tower.sha256()


def test_a_vocabulary_is_cleaned_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffzebra\r\nApfelstrudel mit Soße\n\n  \nzebra \nlast".encode())
    vocabulary = read_vocabulary(str(file))
    assert vocabulary == (["zebra", "Apfelstrudel mit Soße", "last"], 2, 1)


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "cannot be read"), (b"\n \n", "holds no words"), (b"caf\xe9\n", "is not UTF-8")]
)
def test_a_bad_vocabulary_is_one_sentence(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_vocabulary(str(file))
    assert "\n" not in str(caught.value)


def test_what_is_no_clip_with_a_text_side_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig

    with pytest.raises(ValueError, match=r"^no/such-model") as caught:
        load_text_tower("no/such-model")
    assert "\n" not in str(caught.value)
    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'vit' model"):
        load_text_tower(str(tmp_path / "vit"))
    bare = tmp_path / "text"
    CLIPTextModel(
        CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(bare)
    with pytest.raises(ValueError, match="tokenizer") as caught:
        load_text_tower(str(bare))
    assert "\n" not in str(caught.value)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_text((DEMO_CLIP / name).read_text())
    with pytest.raises(ValueError, match="text_projection"):
        load_text_tower(str(bare))

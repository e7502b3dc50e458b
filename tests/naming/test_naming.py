"""Names are those that were planted; every score against a second derivation in NumPy; MSAE's score matrices."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from saecore import schema
from saecore.naming.names import Nearest, Valid, latents_of, names_table, nearest
from saecore.naming.scores import DIRECTIONS, LEAST_IMAGES, by_data, by_direction, centred, directions, open_interpreter
from saecore.sae.model import SAE, SAEConfig

WORDS = ["red", "green", "blue", "circle", "star", "a night sky", "snow"]
V, E, N = len(WORDS), 16, 24


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    """Embeddings of the words, of different lengths, with a large part in common, as CLIP's have."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(V, E, generator=generator) + 2) * torch.linspace(0.5, 3, V)[:, None]


def sae_of(decoder: torch.Tensor) -> SAE:
    """An SAE with that decoder, whose mean and scale matter."""
    sae = SAE(SAEConfig(n_inputs=decoder.shape[1], n_latents=len(decoder), k=2)).requires_grad_(False)
    sae.decoder = torch.nn.Parameter(decoder, requires_grad=False)
    sae.mean.copy_(3 * torch.randn(decoder.shape[1], generator=torch.Generator().manual_seed(1)))
    sae.scale.fill_(0.4)
    return sae


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in other] for a in one])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a word or two, and of a few latents."""
    monkeypatch.setattr("saecore.naming.scores.BLOCK", 2 * N)


# ---- Planted truth.


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_planted_names_are_recovered(texts: torch.Tensor, kind: str) -> None:
    """Latent j is word order[j], its row of another length; with the mean, only once that is added does it point there."""
    order = torch.tensor([3, 0, 6, 6, 2, 5, 1, 4])
    towards = texts[order] * torch.linspace(0.2, 5, 8)[:, None]
    blank = sae_of(towards)
    sae = sae_of(towards if kind == "decoder" else (towards - blank.mean) * blank.scale)
    found = nearest(by_direction(directions(sae, kind), texts), 3)
    table = names_table(WORDS, found, None, False, Valid(margin=0.05))
    assert table["name"].to_pylist() == [WORDS[word] for word in order]
    between = cosines(texts.numpy(), texts.numpy())[order.numpy()]
    np.testing.assert_allclose(table["score"], 1, atol=1e-5)
    np.testing.assert_allclose(table["margin"], 1 - np.sort(between)[:, -2], atol=1e-5)
    runners_up = np.argsort(-between)[:, 1]
    assert table["runner_up"].to_pylist() == [WORDS[word] for word in runners_up]
    assert table["valid"].to_pylist() == (1 - np.sort(between)[:, -2] >= 0.05).tolist()
    others = directions(sae, "decoder+mean" if kind == "decoder" else "decoder")
    assert (nearest(by_direction(others, texts), 1).words[:, 0] != order).any()


def test_a_name_by_data_holds_of_nearly_all_top_images() -> None:
    """Word 0 is in all top images; word 1 in half of them, but so strongly that it has the larger mean; word 2 in none."""
    generator = np.random.default_rng(0)
    texts = torch.eye(4)[:3]
    images = torch.from_numpy(0.05 * generator.normal(size=(420, 4))).float()
    images[:, 3] += 1
    images[:20, 0] += 0.5
    images[:10, 1] += 1.5
    cosine = torch.nn.functional.normalize(images, dim=-1)
    z = (cosine[:20, :2].mean(0) - cosine[20:, :2].mean(0)) / cosine[20:, :2].std(0)
    assert z[1] > z[0]

    def found(n_top: int) -> Nearest:
        top = torch.arange(n_top)[None]
        return nearest(by_data(images[:n_top], top, images[n_top:], texts), 3)

    assert found(20).words[0, 0] == 0
    assert found(20).scores[0, 0] > 3 > 2 > found(20).scores[0, 1]
    # Four images more, without word 0, are a sixth of all and leave it its score; eight are more than a fifth and do not.
    assert found(24).scores[0, 0] > 3
    assert found(28).scores[0, 0] < 2


# ---- Second derivations.


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("subtract_mean", [False, True])
def test_scores_by_direction_are_cosines(texts: torch.Tensor, kind: str, subtract_mean: bool) -> None:
    decoder = torch.randn(N, E, generator=torch.Generator().manual_seed(2))
    decoder[5] = 0
    sae = sae_of(decoder)
    blocks = list(by_direction(directions(sae, kind), centred(texts) if subtract_mean else texts))
    assert [len(block) for block in blocks] == [2, 2, 2, 1]
    rows, words = decoder.numpy().astype(np.float64), texts.numpy().astype(np.float64)
    if kind == "decoder+mean":
        rows = rows / float(sae.scale) + sae.mean.numpy()
    if subtract_mean:
        words = words / np.linalg.norm(words, axis=1, keepdims=True)
        words = words - words.mean(axis=0)
    rows[5] = rows[5] if kind == "decoder+mean" else 1  # not looked at: it has no direction
    expected = cosines(words, rows)
    if kind == "decoder":
        expected[:, 5] = -np.inf
    np.testing.assert_allclose(torch.cat(blocks), expected, atol=1e-5)
    best = nearest(iter(blocks), 4)
    named = expected[0] > -np.inf
    order = np.argsort(-expected, axis=0)[:4].T
    np.testing.assert_array_equal(best.words[named], order[named])
    np.testing.assert_allclose(best.scores, np.take_along_axis(expected.T, order, 1), atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_scores_by_data_are_what_four_fifths_of_the_top_images_reach(texts: torch.Tensor) -> None:
    generator = np.random.default_rng(3)
    images, sample = generator.normal(size=(60, E)) + 1, generator.normal(size=(50, E)) + 1
    counts = generator.integers(0, 21, N)
    counts[:4] = 0, 4, 5, 20
    top = np.full((N, 20), -1)
    for latent, count in enumerate(counts):
        top[latent, :count] = generator.choice(60, count, replace=False)
    given = (torch.from_numpy(images).float(), torch.from_numpy(top), torch.from_numpy(sample).float())
    found = torch.cat(list(by_data(*given, texts))).numpy()
    usual, each = cosines(texts.numpy(), sample), cosines(texts.numpy(), images)
    for latent, count in enumerate(counts):
        for word in range(V):
            z = (each[word, top[latent, :count]] - usual[word].mean()) / usual[word].std()
            if count < LEAST_IMAGES:
                assert found[word, latent] == -np.inf
            else:  # the largest value that at least four fifths reach
                reached = max(value for value in z if np.mean(z >= value) >= 0.8)
                assert found[word, latent] == pytest.approx(reached, abs=1e-4)


def test_of_equal_words_the_first_comes_first_whatever_the_blocks() -> None:
    scores = torch.tensor([[1.0, 0], [3, 5], [2, 5], [3, 5], [3, 1]])
    for size in (1, 2, 3, 5):
        found = nearest(scores.split(size), 3)
        assert found.words.tolist() == [[1, 3, 4], [1, 2, 3]]
        assert found.scores.tolist() == [[3, 3, 3], [5, 5, 5]]
    assert nearest(iter([scores]), 9).words.shape == (2, 5)


# ---- The table.


def test_the_table_by_hand() -> None:
    """Latent 0 is named both ways, 1 by direction alone, 2 by none."""
    none = float("-inf")
    direction = Nearest(torch.tensor([[0, 1], [2, 0], [0, 1]]), torch.tensor([[0.5, 0.25], [0.75, 0.5], [none, none]]))
    data = Nearest(torch.tensor([[1, 2], [0, 1], [0, 1]]), torch.tensor([[2.0, 1.5], [none, none], [none, none]]))
    rows = names_table(WORDS, direction, data, True, Valid(score=1, margin=0.5)).to_pylist()
    assert rows[0] == {
        "latent": 0, "name": "green", "score": 2, "runner_up": "blue", "runner_up_score": 1.5, "margin": 0.5, "valid": True,
        "by_data": True, "words": ["green", "blue"], "scores": [2, 1.5], "direction_name": "red", "direction_score": 0.5,
        "direction_margin": 0.25, "data_name": "green", "data_score": 2, "data_margin": 0.5,
    }  # fmt: skip
    assert (rows[1]["name"], rows[1]["margin"], rows[1]["data_name"], rows[1]["by_data"]) == ("blue", 0.25, None, False)
    assert {key for key, value in rows[2].items() if value is not None} == {"latent", "valid", "by_data"}
    assert [row["valid"] for row in rows] == [True, False, False]
    by_direction = names_table(WORDS, direction, data, False, Valid(score=0.5)).to_pylist()
    assert [row["name"] for row in by_direction] == ["red", "blue", None]
    assert [row["data_name"] for row in by_direction] == ["green", None, None]
    assert [row["valid"] for row in by_direction] == [True, True, False]


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (Valid(), [True, True, True]),
        (Valid(score=0.42), [True, True, False]),
        (Valid(ratio=2.0), [True, False, True]),  # nothing is twice a runner-up that points away
        (Valid(margin=0.3), [False, False, True]),
        (Valid(score=0.42, ratio=2.0), [True, False, False]),
    ],
)
def test_what_is_valid(least: Valid, expected: list[bool]) -> None:
    scores = torch.tensor([[0.5, 0.25], [0.5, 0.26], [0.25, -0.125]])
    table = names_table(WORDS, Nearest(torch.tensor([[0, 1]] * 3), scores), None, False, least)
    assert table["valid"].to_pylist() == expected
    assert table.schema == schema.NAMES


def test_look_up_both_ways() -> None:
    words = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 2, 3], [4, 5, 6]])
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.0], [0.95, 0.1, 0.0], [-torch.inf] * 3])
    names = names_table(WORDS, Nearest(words, scores), None, False, Valid(margin=0.3))
    found = latents_of(names, "Red").to_pydict()
    assert found["latent"] == [2, 0, 1]
    assert found["place"] == [0, 0, 1]
    assert found["score"] == pytest.approx([0.95, 0.9, 0.7])
    assert found["valid"] == [True, True, False]
    assert latents_of(names, "a night sky").num_rows == 0
    assert names["words"][1].as_py() == ["green", "red", "blue"]


# ---- MSAE's files.


@pytest.mark.usefixtures("small_blocks")
def test_a_concept_interpreter_is_read_as_it_was_written(tmp_path: Path, texts: torch.Tensor) -> None:
    """As MSAE makes it: cosines with decoder + mean, float32 [vocabulary, latents], named by the arg max over axis 0."""
    sae = sae_of(torch.randn(N, E, generator=torch.Generator().manual_seed(5)))
    towards = directions(sae, "decoder+mean")
    scores = cosines(texts.numpy(), towards.numpy()).astype(np.float32)
    path = str(tmp_path / "Concept_Interpreter_a_b.npy")
    np.save(path, scores)
    found = nearest(open_interpreter(path, V, N), 3)
    np.testing.assert_array_equal(found.words[:, 0], scores.argmax(axis=0))
    np.testing.assert_array_equal(found.scores[:, 0], scores.max(axis=0))
    ours = nearest(by_direction(towards, texts), 3)
    np.testing.assert_array_equal(found.words, ours.words)
    np.testing.assert_allclose(found.scores, ours.scores, atol=1e-5)


def test_an_interpreter_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path) -> None:
    def complaint(content: np.ndarray | bytes) -> str:
        path = tmp_path / "matrix.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(ValueError, match=r"matrix\.npy") as caught:
            nearest(open_interpreter(str(path), V, N), 2)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(path))
        return str(caught.value)

    fits = np.zeros((V, N), np.float32)
    assert "is 24 x 7: a row for each word is needed, and the vocabulary has 7" in complaint(fits.T)
    assert "found float64 (7, 24)" in complaint(fits.astype(np.float64))
    assert "found float32 (168,)" in complaint(fits.flatten())
    assert "is no .npy file of numbers" in complaint(fits.tobytes())
    assert "is no .npy file of numbers" in complaint(np.array([None]))
    fits[3, 3] = np.nan
    assert "not finite" in complaint(fits)
    with pytest.raises(ValueError, match="no such file"):
        open_interpreter(str(tmp_path / "nowhere.npy"), V, N)


def test_a_direction_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="'encoder': must be one of decoder, decoder\\+mean"):
        directions(sae_of(torch.ones(2, 3)), "encoder")


def test_the_schema_is_of_plain_types() -> None:
    assert len(set(schema.NAMES.names)) == len(schema.NAMES)
    assert not any(isinstance(field.type, pa.ExtensionType) for field in schema.NAMES)

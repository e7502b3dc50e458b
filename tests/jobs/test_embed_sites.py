"""Vectors inside the tower, written to train on: transformers' hidden states, the drawn tokens, and the way to an SAE."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import CLIPVisionModelWithProjection

from jobs import commands, embed, explain, measure, train, verify
from saecore import schema
from saecore.hub import DEMO_CLIP
from saecore.pipeline.config import restored
from saecore.pipeline.stages import Embed, drawn_tokens
from saecore.query.tables import Tables
from saecore.runs.commits import Commit
from saecore.runs.files import open_dataset
from saecore.runs.record import read_record
from saecore.runs.run import Run
from saecore.sae.checkpoints import load_sae
from saecore.towers.loading import load_tower
from saecore.training.embeddings import open_embeddings
from tests.conftest import N_SCENES
from tests.helpers.mistakes import mistake
from tests.helpers.towers import SIGLIP_SHAPES, hidden_state, random_siglip

SITE, LAYER, DRAWN, GRID, WIDTH = "layer3.residual:patches", 3, 5, 8, 128


def arguments(shards: Path, out: Path, *more: str, site: str = SITE) -> list[str]:
    return ["--images", str(shards), "--clip", "demo", "--site", site, "--out", str(out), *more]


def rows(run: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = open_dataset(str(run), "images").to_table().sort_by("image_id").to_pylist()
    return listed


@pytest.fixture(scope="module")
def drawn(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "run"
    more = ["--local", "--tokens-per-image", str(DRAWN), "--chunk-size", "8"]
    assert embed.main(arguments(shards, out, *more)) == 0
    return out


def hidden_states(run: Path, images: int) -> dict[int, np.ndarray]:
    """transformers' tokens (N, D) after the layer, of some images."""
    model, tower, states = CLIPVisionModelWithProjection.from_pretrained(DEMO_CLIP).eval(), load_tower("demo"), {}
    ids = [row["image_id"] for row in rows(run)[:images]]
    for raw in Tables(str(run), read_record(str(run))).originals(ids):
        for row in raw.to_pylist():
            states[row["image_id"]] = hidden_state(model, tower, row["data"], LAYER)
    return states


def test_vectors_are_transformers_hidden_states_at_the_drawn_tokens(drawn: Path) -> None:
    states = hidden_states(drawn, 6)
    table = open_dataset(str(drawn), "images").to_table()
    assert table.schema.remove_metadata() == schema.TOKEN_IMAGES
    assert (table.schema.metadata[b"site"], table.schema.metadata[b"width"]) == (SITE.encode(), b"128")
    for row in rows(drawn)[:6]:
        vectors = np.array(row["embedding"], np.float32).reshape(DRAWN, WIDTH)
        np.testing.assert_allclose(vectors, states[row["image_id"]][1:][row["tokens"]], rtol=1e-5, atol=1e-5)
    tokens = {tuple(row["tokens"]) for row in rows(drawn)}
    assert len(tokens) > N_SCENES // 2, "each image has a draw of its own"
    assert all(len(set(one)) == DRAWN and sorted(one) == list(one) for one in tokens)
    seen = np.bincount(np.array(list(tokens)).ravel(), minlength=GRID**2)
    assert seen.max() < 15, "no patch is drawn far more often than others"


@pytest.mark.parametrize(("site", "first", "n"), [("layer3.residual:all", 0, 65), ("layer3.residual:cls", 0, 1)])
def test_all_tokens_and_cls(site: str, first: int, n: int, shards: Path, tmp_path: Path) -> None:
    assert embed.main(arguments(shards, tmp_path / "run", "--local", "--limit", "6", site=site)) == 0
    states = hidden_states(tmp_path / "run", 6)
    for row in rows(tmp_path / "run"):
        vectors = np.array(row["embedding"], np.float32).reshape(n, WIDTH)
        np.testing.assert_allclose(vectors, states[row["image_id"]][first : first + n], rtol=1e-5, atol=1e-5)
        assert "tokens" not in row or row["tokens"] == list(range(n))


def test_draws_depend_on_seed_and_image_alone(ray_session: None, drawn: Path, shards: Path, tmp_path: Path) -> None:
    """On Ray, in other batches."""
    more = ["--ray", "--tokens-per-image", str(DRAWN), "--chunk-size", "8", "--batch-size", "3"]
    assert embed.main(arguments(shards, tmp_path / "ray", *more)) == 0
    for one, other in zip(rows(drawn), rows(tmp_path / "ray"), strict=True):
        assert one["tokens"] == other["tokens"]
        np.testing.assert_allclose(one["embedding"], other["embedding"], rtol=1e-4, atol=1e-4)
    assert drawn_tokens(0, 7, 64, 5).tolist() == drawn_tokens(0, 7, 64, 5).tolist()
    assert drawn_tokens(0, 7, 64, 5).tolist() != drawn_tokens(1, 7, 64, 5).tolist()
    assert drawn_tokens(0, 7, 64, 64).tolist() == list(range(64))


def test_draws_do_not_depend_on_chunks_batches_or_an_end_in_the_middle(
    drawn: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = Run.write_chunk, tmp_path / "run"
    given = arguments(
        shards, out, "--local", "--tokens-per-image", str(DRAWN), "--chunk-size", "7", "--batch-size", "3"
    )

    def stop_at_4(self: Run, chunk_id: int, *rest: Any) -> Commit:
        if chunk_id == 4:
            raise KeyboardInterrupt
        return whole(self, chunk_id, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_chunk", stop_at_4)
        assert embed.main(given) == 130
    assert len(list((out / "images").iterdir())) == 4
    assert embed.main(given) == 0
    for one, other in zip(rows(drawn), rows(out), strict=True):
        assert (one["image_id"], one["tokens"]) == (other["image_id"], other["tokens"])
        np.testing.assert_allclose(one["embedding"], other["embedding"], rtol=1e-5, atol=1e-5)


def test_the_stage_never_holds_the_tokens_of_a_whole_chunk(drawn: Path) -> None:
    """Of a batch, all tokens are there; of the chunk, only those that are drawn."""
    config = restored("embed", json.loads((drawn / "run.json").read_text())["config"])
    stage, at_once = Embed(dataclasses.replace(config, batch_size=3)), list[int]()
    infer = stage.infer

    class Counting:
        tower = infer.tower

        def in_batches(self, pixels: np.ndarray, batch_size: int) -> Any:
            at_once.append(len(pixels))
            return infer.in_batches(pixels, batch_size)

    stage.infer = Counting()  # type: ignore[assignment]
    side = infer.tower.preprocess.size[0]
    row = {"uri": "u", "key": "k", "pixels": bytes(3 * side * side)}
    decoded = pa.Table.from_pylist([{"image_id": i, **row} for i in range(7)], schema=schema.DECODED)
    assert stage(decoded)["tokens"].to_pylist() == [drawn_tokens(0, i, GRID**2, DRAWN).tolist() for i in range(7)]
    assert at_once == [3, 3, 1]
    assert stage(decoded.slice(0, 0)).schema == schema.TOKEN_IMAGES


def test_the_summary_counts_vectors_and_the_next_command_can_be_given(
    drawn: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--local", "--tokens-per-image", str(DRAWN), "--chunk-size", "8"]
    assert embed.main(arguments(shards, drawn, *given)) == 0
    said = capsys.readouterr().out
    assert f"vectors       {DRAWN * N_SCENES} vectors of {SITE}, 128 numbers each: 5 of each of 48 images\n" in said
    assert "memory map" not in said
    assert f"site of the vectors: `{SITE}`" in (drawn / "README.md").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("next ")]
    words = shlex.split(line.partition("#")[0].replace("LATENTS", "512"))
    told = commands.parse(train.Arguments, words[words.index("--embeddings") :], "train")
    assert (told.embeddings, told.recipe.latents) == (str(drawn), 512)
    assert embed.main(arguments(shards, drawn.parent / "none", "--dry-run", site="layer3.residual:all")) == 0
    assert "with CLIP demo, 128 numbers per vector of layer3.residual:all, 65 per image" in capsys.readouterr().out


def test_another_draw_is_another_run(drawn: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--local", "--chunk-size", "8"]
    for more in (["--tokens-per-image", "6"], ["--tokens-per-image", str(DRAWN), "--seed", "1"], []):
        said = mistake(embed.main, arguments(shards, drawn, *same, *more), capsys)
        assert "--out" in said
    config = restored("embed", json.loads((drawn / "run.json").read_text())["config"])
    assert (getattr(config, "site", ""), getattr(config, "tokens_per_image", 0)) == (SITE, DRAWN)


def test_a_run_of_vectors_is_sound(drawn: Path) -> None:
    assert verify.main([str(drawn)]) == 0


def test_from_vectors_to_an_sae_to_a_run(
    drawn: Path, local_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_embeddings(str(drawn))
    assert (source.site, source.width, int(source.block_rows.sum())) == (SITE, WIDTH, DRAWN * N_SCENES)
    read = np.concatenate([source.read(block) for block in range(len(source.block_rows))])
    expected = np.concatenate([np.array(row["embedding"], np.float32).reshape(-1, WIDTH) for row in rows(drawn)])
    np.testing.assert_array_equal(np.sort(read.ravel()), np.sort(expected.ravel()))
    sae = str(tmp_path / "sae")
    how = ["--latents", "32", "--k", "4", "--batch-size", "64", "--epochs", "20", "--rate", "1e-2"]
    assert train.main(["--embeddings", str(drawn), "--out", sae, *how]) == 0
    assert "--pool max, mean or sum" in capsys.readouterr().out
    config = load_sae(sae).config
    assert (config.site, config.model, config.n_inputs) == (SITE, "demo", WIDTH)
    assert measure.main(["--sae", sae, "--embeddings", str(drawn), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["fvu"] < 0.8
    assert explain.main(["--images", str(shards), "--clip", "demo", "--sae", sae, "--pool", "max", "--limit", "8",
                         "--out", str(tmp_path / "run"), "--local", "--allow-poor-fit"]) == 0  # fmt: skip
    capsys.readouterr()
    said = mistake(measure.main, ["--sae", sae, "--embeddings", str(local_run)], capsys)
    assert f"reads {SITE} of demo, inside the tower; this takes" in said
    said = mistake(measure.main, ["--sae", "demo", "--embeddings", str(drawn)], capsys)
    assert f"it reads embedding of demo, and these are vectors of {SITE}" in said
    words = ["--texts", "nowhere"]
    said = mistake(measure.main, ["--sae", sae, "--embeddings", str(drawn), *words], capsys)
    assert f"--texts nowhere: words have no place in vectors of {SITE}" in said


@pytest.mark.parametrize(
    ("site", "more", "said"),
    [
        (
            "layer3.mlp:patches",
            [],
            "--site layer3.mlp:patches: vectors are written of the embedding, and of the residual",
        ),
        ("layer3", [], "--site layer3: vectors are written of the embedding, and of the residual"),
        ("layer3.residual", [], "--site layer3.residual: vectors are written of the embedding, and of the residual"),
        ("layer3.residual:cls:l2", [], "is trained with normalise constant_norm"),
        ("embedding:l2", [], "is trained with normalise constant_norm"),
        ("layer3.residual:patches:mean", [], "the vectors of tokens are written one by one, and no means"),
        ("layer9.residual:cls", [], "--site layer9.residual:cls, which the model demo does not have"),
        (SITE, ["--tokens-per-image", "65"], "--tokens-per-image 65: an image has 64 there"),
        ("layer3.residual:cls", ["--tokens-per-image", "2"], "has one vector for each image"),
        ("embedding", ["--tokens-per-image", "2"], "has one vector for each image"),
        (SITE, ["--tokens-per-image", "-1"], "--tokens-per-image -1: must be at least 0"),
        (SITE, ["--tokens-per-image", "2", "--seed", str(2**63)], f"--seed {2**63}: must be at most {2**63 - 1}"),
        (SITE, ["--seed", "1"], "--seed 1: seeds the draw of --tokens-per-image, which is not given"),
        (SITE, ["--dataset", "x"], "--dataset x: is part of the name of a memory map, and vectors inside the tower"),
        (SITE, ["--split", "val"], "--split val: is part of the name of a memory map, and vectors inside the tower"),
        ("nowhere", [], "'nowhere' is no site"),
    ],
)
def test_what_cannot_be_written_is_refused(
    site: str, more: list[str], said: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in mistake(embed.main, arguments(shards, tmp_path / "run", *more, site=site), capsys)
    assert not (tmp_path / "run").exists()


def test_a_siglip_has_patches_and_no_cls(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import SiglipImageProcessor

    model, _ = random_siglip(**SIGLIP_SHAPES[0])
    model.save_pretrained(tmp_path / "siglip")
    size = {"height": 32, "width": 32}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "siglip")
    given = ["--images", str(shards), "--clip", str(tmp_path / "siglip"), "--limit", "4", "--local"]
    out = ["--out", str(tmp_path / "run")]
    said = mistake(embed.main, [*given, *out, "--site", "layer1.residual:cls"], capsys)
    assert "its image tower has no CLS token" in said
    assert embed.main([*given, *out, "--site", "layer1.residual:patches"]) == 0
    assert {len(row["embedding"]) for row in rows(tmp_path / "run")} == {16 * 32}

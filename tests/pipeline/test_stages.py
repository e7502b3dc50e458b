"""Stages return exactly the declared schema for 0, 1 and n rows of any kind, and do not change their input."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from saecore import schema
from saecore.demo import drawing, scenes
from saecore.images.decode import decode_image
from saecore.pipeline.config import ExplainConfig
from saecore.pipeline.inference import Inference, Inferred
from saecore.pipeline.stages import Decode, Explain
from saecore.relevance.explain import explain_latents

CONFIG = ExplainConfig(clip="demo", sae="demo", k=5, batch_size=4, embeddings=True)


@pytest.fixture(scope="module")
def explain() -> Explain:
    return Explain(CONFIG)


@pytest.fixture(scope="module")
def decode(explain: Explain) -> Decode:
    return Decode(explain.infer.tower.preprocess)


def raw(*data: bytes | None) -> pa.Table:
    """RAW rows; None stands for an image that could not be read."""
    rows = [
        {
            "image_id": index,
            "uri": "memory",
            "key": f"{index}.jpg",
            "error": "missing-file" if content is None else None,
            "error_detail": "gone" if content is None else None,
            "data": content,
        }
        for index, content in enumerate(data)
    ]
    return pa.Table.from_pylist(rows, schema=schema.RAW)


def scene(index: int) -> bytes:
    return drawing.jpeg(scenes.scene_at(scenes.SEED_EVALUATION, index), 96)


@pytest.mark.parametrize(
    "content", [[], [scene(0)], [b"<html>"], [scene(i) for i in range(9)], [None, scene(0), b"", scene(1)]]
)
def test_schemas_hold_for_any_rows(content: list[bytes | None], decode: Decode, explain: Explain) -> None:
    table = raw(*content)
    before = table.to_pylist()
    decoded = decode(table)
    explained = explain(decoded)
    assert decoded.schema == schema.DECODED
    assert explained.schema == schema.explained_schema(64)
    explained.validate(full=True)
    assert table.to_pylist() == before
    assert explained["image_id"].to_pylist() == list(range(len(content)))
    good = [row is not None and row.startswith(b"\xff\xd8") for row in content]
    for row, shown in zip(explained.to_pylist(), good, strict=True):
        assert (row["error"] is None) == shown
        assert [row[name] is not None for name in ("l0", "cosine", "fvu", "embedding", "activations", "maps")] == [
            shown
        ] * 6
        assert len(row["maps"] or []) == len(row["activations"] or []) == (5 if shown else 0)
    flat = schema.unnest(explained, "maps")
    assert flat.schema == schema.maps_schema(64)
    assert flat["image_id"].to_pylist() == [i for i, shown in enumerate(good) if shown for _ in range(5)]
    assert schema.unnest(explained, "activations").schema == schema.ACTIVATIONS


def test_batches_for_which_a_gpu_lacks_memory_are_halved(
    decode: Decode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    explain, suffices, tried = Explain(CONFIG), 3, list[int]()
    decoded = decode(raw(*map(scene, range(7))))
    assert isinstance(explain.infer, Inference)
    expected, infer = explain(decoded), explain.infer._infer

    def scarce(pixels: torch.Tensor) -> Inferred:
        tried.append(len(pixels))
        if len(pixels) > suffices:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return infer(pixels)

    monkeypatch.setattr(explain.infer, "_infer", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = explain(decoded)
    assert tried == [4, 2, 2, 2, 1]
    assert capsys.readouterr().err == "the GPU's memory does not suffice for 4 images at once: 2 from now on\n"
    ours, theirs = (schema.unnest(table, "activations").to_pandas() for table in (found, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    tried.clear()
    explain(decoded)
    assert tried == [2, 2, 2, 1]  # it is not tried again
    suffices = 0
    with pytest.raises(torch.OutOfMemoryError):
        explain(decoded)


def test_rows_say_what_the_models_computed(decode: Decode, explain: Explain) -> None:
    """Compares every written number with the models called by hand on that one image."""
    explained = explain(decode(raw(scene(0), b"", scene(1))))
    for index, row in ((0, explained.slice(0, 1).to_pylist()[0]), (1, explained.slice(2, 1).to_pylist()[0])):
        pixels = torch.from_numpy(decode_image(scene(index), explain.infer.tower.preprocess).pixels.copy())[None]
        with torch.inference_mode():
            embedding = explain.infer.tower.embed(pixels)
            code, reconstruction = explain.infer.sae.encode_sparse(embedding), explain.infer.sae.reconstruct(embedding)
            maps = explain_latents(explain.infer.tower, explain.infer.sae, pixels, code.latents[:, :5])["contrib"]
        np.testing.assert_allclose(row["embedding"], embedding[0], rtol=1e-4, atol=1e-4)
        assert row["l0"] == int((code.activations > 0).sum())
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(embedding, reconstruction)), abs=1e-5)
        fvu = (embedding - reconstruction).square().sum() / (embedding - explain.infer.sae.mean).square().sum()
        assert row["fvu"] == pytest.approx(float(fvu), rel=1e-3)
        assert row["completeness"] < 1e-5
        assert [kept["latent"] for kept in row["activations"]] == code.latents[0, :5].tolist()
        assert [kept["rank"] for kept in row["activations"]] == list(range(5))
        for rank, (activation, stored) in enumerate(zip(row["activations"], row["maps"], strict=True)):
            assert activation["activation"] == pytest.approx(float(code.activations[0, rank]), rel=1e-4)
            assert activation["pre_activation"] == pytest.approx(float(code.pre_activations[0, rank]), rel=1e-4)
            assert (stored["latent"], stored["target"]) == (activation["latent"], None)
            assert stored["pre_activation"] == pytest.approx(activation["pre_activation"], rel=1e-4, abs=1e-4)
            decoded = np.frombuffer(stored["map"], np.int8) * stored["scale"]
            # 8 bits: at most half a step off, and the step is 1/127 of the strongest patch.
            np.testing.assert_allclose(decoded, maps.relevance[0, rank], atol=0.51 * stored["scale"])
            assert stored["remainder"] == pytest.approx(float(maps.remainder[0, rank]), rel=1e-4, abs=1e-4)
            assert 0 <= stored["sink_share"] <= 1


def test_embeddings_are_written_only_where_asked_for(decode: Decode) -> None:
    plain = Explain(dataclasses.replace(CONFIG, embeddings=False))(decode(raw(scene(0))))
    assert plain["embedding"].to_pylist() == [None]
    assert plain.schema == schema.explained_schema(64)


def test_a_map_of_nothing_is_zero(explain: Explain) -> None:
    """A latent that no patch contributes to has scale 0 and decodes to 0, not to NaN."""
    tower = explain.infer.tower
    values = [layer.self_attn.v_proj for layer in tower.vision.encoder.layers]
    before = [(layer.weight.clone(), layer.bias.clone()) for layer in values]
    try:
        for layer in values:
            layer.weight.zero_()
            layer.bias.zero_()
        rows = explain.infer(np.zeros((1, *tower.preprocess.size, 3), np.uint8))
    finally:
        for layer, (weight, bias) in zip(values, before, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    assert (rows.scale == 0).all()
    assert (rows.map == 0).all()
    assert (rows.sink_share == 0).all()

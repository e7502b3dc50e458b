"""What scores come to, on tables whose truth is planted: means, comparisons case by case, and the sentences."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from saecore import schema
from saecore.judging import verdict
from saecore.judging.verdict import OTHER_ROWS, SHAPLEY, TRAINED, UNTRAINED, Verdict
from saecore.judging.wording import curves_svg, tables_of
from saecore.runs.files import MANIFEST, parquet_bytes

IMAGES, LATENTS = 60, 4

LEVEL = {"contrib": 3.0, "contrib_grad": 3.05, "dense": 1.0, "attention": 1.5, "random": 0.0, SHAPLEY: 4.0}


TEXT, COSINE = "text: a cat", 0.01
"""A target whose values are a hundredth of those of latents, and whose best method is another."""


def write(folder: Path, level: dict[str, float], images: int = IMAGES, noise: float = 0.5) -> str:
    """A run's tables: SRG of each method is its level, plus what the case has for all methods, plus noise of its own."""
    drawn = np.random.default_rng(4)
    rows, curves = list[dict[str, object]](), list[dict[str, object]]()
    for image in range(images):
        common = drawn.normal(0, 2, LATENTS)
        for latent in range(LATENTS):
            case: dict[str, object] = {"image_id": image, "latent": latent, "target": None}
            for method, mean in level.items():
                score = {"srg": mean + common[latent] + drawn.normal(0, noise)}
                if method not in ("random", SHAPLEY):
                    score["srg_of_another"] = score["srg"] if method == "attention" else 0.2 + drawn.normal(0, noise)
                for model, share in ((TRAINED, 1.0), (OTHER_ROWS, 0.5), (UNTRAINED, 0.1)):
                    if model == TRAINED or method != SHAPLEY:
                        rows += [
                            {**case, "model": model, "method": method, "metric": metric, "value": share * value}
                            for metric, value in score.items()
                        ]
                both = {"mif": [4.0, 0.0, -1.0], "lif": [4.0, 4.0 + mean, -1.0]}
                curves.append({**case, "model": TRAINED, "method": method, "way": "drop", **both})
        for method, mean in level.items():
            case = {"image_id": image, "latent": None, "target": TEXT}
            case |= {"model": TRAINED, "method": method}
            rows.append({**case, "metric": "srg", "value": COSINE * (5 - mean + drawn.normal(0, noise))})
            curves.append({**case, "way": "drop", "mif": [9.0, 9.0, 9.0], "lif": [9.0, 9.0, 9.0]})
    files = []
    for name, table in {"faithfulness": (rows, schema.FAITHFULNESS), "curves": (curves, schema.CURVES)}.items():
        (folder / name).mkdir(parents=True)
        path = f"{name}/chunk-00000000.parquet"
        (folder / path).write_bytes(parquet_bytes(pa.Table.from_pylist(*table[:1], schema=table[1]), 4096))
        files.append({"chunk_id": 0, "table": name, "path": path, "rows": len(table[0]), "bytes": 0, "sha256": ""})
    (folder / "manifest.parquet").write_bytes(parquet_bytes(pa.Table.from_pylist(files, schema=MANIFEST), 4096))
    return str(folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    folder = write(tmp_path_factory.mktemp("planted") / "run", LEVEL)
    return verdict.judged(folder, ["contrib", "contrib_grad", "dense", "attention"])


def test_means_and_differences_are_those_that_were_planted(found: Verdict) -> None:
    assert (found.images, found.cases) == (IMAGES, IMAGES * LATENTS)
    assert found.methods == ["contrib", "contrib_grad", "dense", "attention", SHAPLEY, "random"]
    for method, level in LEVEL.items():
        mean = found.mean(method, "srg")
        assert mean is not None
        assert mean.low < mean.value < mean.high
        assert mean.value == pytest.approx(level, abs=0.6), "what all methods share moves them together"
    apart = {one.other: one.mean for one in found.apart if one.kind == "latent"}
    assert apart.keys() == LEVEL.keys() - {"contrib"}
    for other, mean in apart.items():
        assert mean.value == pytest.approx(LEVEL["contrib"] - LEVEL[other], abs=0.15), "paired: what is shared cancels"
        assert mean.high - mean.low < 0.3
    assert found.mean("contrib", "srg", OTHER_ROWS) is not None
    assert found.mean("contrib", "no such metric") is None


def test_sentences_say_what_the_intervals_allow(found: Verdict) -> None:
    said = " ".join(found.sentences)
    assert found.sentences[0].startswith("contrib beats attention: SRG +1.")
    assert found.sentences[0].endswith("n = 60 images, 240 targets.")
    assert "contrib beats random: SRG +3.0" in said
    assert "contrib knows its target" in said
    assert "contrib and contrib_grad cannot be told apart" in said
    assert "contrib beats dense" in said
    assert "of the SRG of 4." in said
    assert "intervals say little" not in said


def test_targets_of_another_unit_have_means_of_their_own(found: Verdict) -> None:
    assert found.kinds == ["latent", "text"]
    mean = found.mean("contrib", "srg", kind="text")
    assert mean is not None
    assert mean.value == pytest.approx(COSINE * 2, abs=COSINE * 0.3)
    (of_dense,) = (one.mean for one in found.apart if (one.kind, one.other) == ("text", "dense"))
    assert of_dense.high < 0
    assert any(one.startswith("Of texts: dense beats contrib: SRG +0.0") for one in found.sentences)
    assert found.sentences[0].startswith("contrib beats attention")


def test_a_verdict_that_is_bad_is_said_too(tmp_path: Path) -> None:
    worse = verdict.judged(write(tmp_path / "worse", {"attention": 3.0, "random": 4.0}, images=12), ["attention"])
    assert worse.sentences[0].startswith("random beats attention: SRG +")
    assert any("attention is not shown to know its target" in one for one in worse.sentences)
    assert worse.sentences[-1].startswith("These are 12 images")


def test_a_verdict_is_read_as_it_was_written(found: Verdict, tmp_path: Path) -> None:
    assert verdict.read(str(tmp_path)) is None
    verdict.write(str(tmp_path), found)
    assert verdict.read(str(tmp_path)) == found
    assert json.loads((tmp_path / "verdict.json").read_text())["images"] == IMAGES


def test_tables_have_what_was_measured_and_nothing_else(found: Verdict) -> None:
    first, second, of_texts = tables_of(found)
    assert of_texts.question == "Of texts: does removing what a map shows remove the target?"
    assert of_texts.columns == ["SRG"]
    assert first.columns == ["SRG", "random rows", "untrained tower"]
    assert second.columns == ["SRG", "by another's"]
    rows = dict(first.rows)
    assert rows.keys() == LEVEL.keys()
    assert rows[SHAPLEY][1:] == ["", ""]
    mean = found.mean("contrib", "srg")
    assert mean is not None
    assert rows["contrib"][0] == f"{mean.value:.2f} ± {(mean.high - mean.low) / 2:.2f}"


def test_curves_are_drawn_where_they_are(found: Verdict) -> None:
    (course,) = (one for one in found.courses if one.method == "contrib")
    assert course.mif == pytest.approx([4.0, 0.0, -1.0])
    assert course.lif == pytest.approx([4.0, 7.0, -1.0])
    drawing = curves_svg(found)
    assert drawing.count("<polyline") == 2 * len(LEVEL)
    assert all(f">{method}</text>" in drawing for method in LEVEL)
    assert curves_svg(found._replace(courses=[])) == ""

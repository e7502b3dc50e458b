"""The demo's maps before the judge: who is faithful, by how much at least, and what cannot be."""

from pathlib import Path

import pytest

from jobs import evaluate, explain
from saecore.judging.verdict import SHAPLEY, Verdict, read

METHODS = ("removal", "contrib", "contrib_grad", "dense")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def verdict(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Verdict:
    run = tmp_path_factory.mktemp("demo") / "run"
    given = ["--images", str(shards), "--clip", "demo", "--sae", "demo", "--k", "6", "--limit", "20", "--local"]
    assert explain.main([*given, "--method", ",".join(METHODS), "--out", str(run)]) == 0
    judge = ["--latents", "6", "--shapley-subsets", "640", "--checks", "none"]
    assert evaluate.main(["--run", str(run), *judge]) == 0
    found = read(str(run / "evaluation"))
    assert found is not None
    return found


def test_a_map_of_a_target_beats_what_knows_none(verdict: Verdict) -> None:
    srg = {row.method: row.mean for row in verdict.rows if row.metric == "srg"}
    for method in ("removal", "contrib", "contrib_grad"):
        for other in ("attention", "dense", "centre", "edges", "random"):
            assert srg[method].low > srg[other].high, (method, other)
    assert srg["random"].low < 0 < srg["random"].high


def test_the_head_tells_what_removal_does(verdict: Verdict) -> None:
    """By fewer subsets than the documentation's figures, so the agreement is lower."""
    above = {one.other: one.mean for one in verdict.apart if one.method == "removal"}
    assert min(above["contrib"].low, above["contrib_grad"].low) > 0
    agreement = {name: verdict.mean(name, "shapley") for name in METHODS}
    ranks = {name: mean.value for name, mean in agreement.items() if mean is not None}
    assert ranks["removal"] > 0.5
    assert all(ranks["removal"] > 0.1 + rank for name, rank in ranks.items() if name != "removal")
    sampled, predicted = (verdict.mean(name, "srg") for name in (SHAPLEY, "removal"))
    assert sampled is not None
    assert predicted is not None
    assert predicted.value > 0.95 * sampled.value


def test_a_latent_s_own_map_serves_it_better_than_another_s(verdict: Verdict) -> None:
    for method in ("removal", "contrib", "contrib_grad"):
        own, swapped = (verdict.mean(method, metric) for metric in ("srg", "srg_of_another"))
        assert own is not None
        assert swapped is not None
        assert own.low > swapped.high
    alike = verdict.mean("attention", "alike")
    assert alike is not None
    assert alike.value > 0.999

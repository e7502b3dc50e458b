"""The demo's maps under removal: who is faithful, by how much at least, and what cannot be."""

import numpy as np
import pytest

from benchmarks import faithful
from saecore.pipeline.models import load_models

pytestmark = pytest.mark.slow

GIVEN = faithful.Arguments(scenes=24, shapley=4, latents=6, method="contrib,contrib_grad,dense,attention", batch=12)


@pytest.fixture(scope="module")
def scores() -> faithful.Scores:
    return faithful.measure(*load_models("demo", "demo"), GIVEN)


def test_the_default_is_more_faithful_than_what_knows_no_target(scores: faithful.Scores) -> None:
    for other in ("attention", "dense", "centre", "edges", "random"):
        assert scores.above("contrib", other).low > 0, other
    random, shapley, contrib = (scores.mean(name, "SRG") for name in ("random", "Shapley values", "contrib"))
    assert random is not None
    assert random.low < 0 < random.high
    assert shapley is not None
    assert contrib is not None
    assert shapley.value > 0.9 * contrib.value


def test_a_latent_s_own_map_serves_it_better_than_another_s(scores: faithful.Scores) -> None:
    for method in ("contrib", "contrib_grad", "occlusion"):
        own, swapped = scores.mean(method, "SRG"), scores.mean(method, "of another's")
        assert own is not None
        assert swapped is not None
        assert own.low > swapped.high
    attention, alike = (scores.mean("attention", score) for score in ("of another's", "alike"))
    assert attention is not None
    assert attention.value == pytest.approx(np.concatenate(scores.held["attention"]["SRG"]).mean(), abs=0.05)
    assert alike is not None
    assert alike.value > 0.999


def test_the_table(scores: faithful.Scores) -> None:
    lines = faithful.markdown(scores).splitlines()
    assert lines[0].split("|")[2].strip() == "SRG"
    assert len(lines) == 2 + len(scores.held)
    assert scores.mean("occlusion", "occlusion") is None

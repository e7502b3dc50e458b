"""The head of removal: sums that hold for any weights, its folder, whom it belongs to, and whether it learns."""

import io
import json
from pathlib import Path

import pytest
import torch

from saecore.pipeline.models import load_fitting_head, load_models
from saecore.relevance.agreement import rank_correlation
from saecore.relevance.explain import explain_latents
from saecore.relevance.maps import completeness_error
from saecore.removal.distillation import Distillation, draw, held_out
from saecore.removal.head import Head, config_for, contributions
from saecore.removal.recipe import Recipe
from saecore.removal.saved import CONFIG_FILE, digest_of, load_head, save_head
from saecore.towers.stopped import stopped_at
from tests.helpers.towers import SHAPES, random_head, random_pixels, random_sae, random_siglip, random_tower

RECIPE = Recipe(steps=500, images_per_step=16, subsets=8, width=32, blocks=1, reuse=3, rate=3e-3)


@pytest.mark.parametrize("layer", [None, 1])
def test_maps_add_up_for_any_weights_and_depend_on_nothing_but_their_image(layer: int | None) -> None:
    _, whole = random_tower(**SHAPES[0])
    tower = whole if layer is None else stopped_at(whole, layer)
    sae, pixels, head = random_sae(tower.n_outputs), random_pixels(tower, 3), random_head(tower)
    latents = torch.arange(12).expand(3, -1)
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, latents, ("removal",), head=head)["removal"]
        pre = sae.pre_activations(tower.embed(pixels)).gather(1, latents)
        alone = explain_latents(tower, sae, pixels[1:2], latents[:1, 4:5], ("removal",), head=head)["removal"]
    assert completeness_error(maps, pre).max() < 1e-5
    torch.testing.assert_close(alone.relevance[0, 0], maps.relevance[1, 4], rtol=1e-4, atol=1e-4)
    assert maps.relevance.std(0).mean() > 0.01


def test_its_first_guess_holds_the_maps_of_contrib() -> None:
    _, tower = random_tower(**SHAPES[0])
    sae, pixels, latents = random_sae(), random_pixels(tower, 2), torch.arange(12).expand(2, -1)
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, latents)["contrib"]
        embedding, trace = tower(pixels)
        w, _ = sae.read_outs(latents, embedding)
        c = contributions(tower, trace, torch.eye(tower.n_outputs))[:, 1:]
    torch.testing.assert_close(w @ c.mT, maps.relevance, rtol=1e-4, atol=1e-4)


def test_a_saved_head_is_the_same_and_belongs_to_its_tower_and_site(tmp_path: Path) -> None:
    _, tower = random_tower(**SHAPES[0])
    head = random_head(tower).half().float()  # as a folder holds it
    save_head(head, str(tmp_path))
    loaded = load_fitting_head(str(tmp_path), ("removal",), tower)
    assert loaded is not None
    assert digest_of(loaded) == digest_of(head)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in head.state_dict().items())
    _, other = random_tower(**SHAPES[0], seed=1)
    with pytest.raises(
        ValueError, match=f"head {tmp_path}: it was trained on the model .* they do not belong together"
    ):
        load_fitting_head(str(tmp_path), ("removal",), other)
    with pytest.raises(ValueError, match=r"trained for embedding, and the SAE reads layer1.residual:cls"):
        load_fitting_head(str(tmp_path), ("removal",), stopped_at(tower, 1))
    with pytest.raises(ValueError, match="method removal: needs a head"):
        load_fitting_head("", ("removal",), tower)
    with pytest.raises(ValueError, match="no token but its patches"):
        config_for(random_siglip(32, 8, 32, 4, 3, "gelu")[1], 32, 1)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"width": 64}, "expected shape"),
        ({"width": 40}, "a multiple of 32"),
        ({"blocks": 10**9}, "blocks is 1000000000, expected a whole number"),
        ({"format": "x"}, "does not describe a head of removal"),
        ({"more": 1}, "expected the fields"),
        ({"site": 3}, "site is 3, expected a text"),
    ],
)
def test_a_folder_that_claims_something_else_is_refused(
    changed: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    _, tower = random_tower(**SHAPES[0])
    save_head(random_head(tower), str(tmp_path))
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | changed
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint):
        load_head(str(tmp_path))


def test_subsets_come_in_pairs_by_the_kernel_s_sizes() -> None:
    drawn = draw(4, 20, 400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.members[:, ::2] + drawn.members[:, 1::2], torch.ones(4, 200, 20))
    assert all(
        torch.equal(drawn.members[:, i].sum(-1), torch.full((4,), 1.0 * k.shape[1])) for i, k in enumerate(drawn.kept)
    )
    sizes = drawn.members[0].sum(-1)
    kernel = torch.tensor([1 / (k * (20 - k)) for k in range(1, 20)])
    share = torch.stack([(sizes == k).float().mean() for k in range(1, 20)])
    torch.testing.assert_close(share, kernel / kernel.sum(), rtol=0, atol=0.01)


def test_it_learns_what_removing_patches_does_and_goes_on_where_it_was() -> None:
    """Half as far from Shapley values as its first guess, on images that it has not seen; and the same if it was stopped."""
    _, tower = random_tower(**SHAPES[0])
    pixels, unseen = random_pixels(tower, 200), random_pixels(tower, 6, seed=9)

    def begun() -> Distillation:
        torch.manual_seed(0)
        course = Distillation(Head(config_for(tower, RECIPE.width, RECIPE.blocks)), tower, pixels, RECIPE)
        course.begin()
        return course

    course = begun()
    before = held_out(course.head, tower, unseen, 1500)
    while course.done < 40:
        course.step()
    other, state = begun(), as_read(course.state())
    while course.done < RECIPE.steps:
        course.step()
    after = held_out(course.head, tower, unseen, 1500)
    assert after.error < 0.5 * before.error
    ranks = [float(rank_correlation(one.predicted, one.sampled).nanmean()) for one in (before, after)]
    assert ranks[1] > ranks[0] + 0.2
    other.load(state)
    while other.done < RECIPE.steps:
        other.step()
    for name, tensor in course.head.state_dict().items():
        assert torch.equal(tensor, other.head.state_dict()[name]), name


def as_read(state: dict[str, object]) -> dict[str, object]:
    """As it comes back from a file."""
    sink = io.BytesIO()
    torch.save(state, sink)
    loaded: dict[str, object] = torch.load(io.BytesIO(sink.getvalue()), weights_only=True)
    return loaded


def test_the_demo_has_one() -> None:
    tower, _ = load_models("demo", "demo")
    assert load_fitting_head("demo", ("removal",), tower) is not None

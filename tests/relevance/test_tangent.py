"""The check of `contrib_grad`'s gradient agrees with autograd, and a wrong gradient fails it though its terms add up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saecore.methods import Options
from saecore.pipeline.inference import Inference
from saecore.relevance import tangent
from saecore.relevance.explain import explain_latents
from saecore.relevance.maps import completeness_error
from saecore.sae.model import SAE
from saecore.towers import cls_path
from saecore.towers.tower import ImageTower
from tests.helpers.derivations import replayed
from tests.helpers.towers import SHAPES, SIGLIP_SHAPES, random_pixels, random_sae, random_siglip, random_tower


def errors(tower: ImageTower, sae: SAE, **options: Any) -> tuple[float, float]:
    """The worst error of the sum, and the worst error that the check of the gradient sees."""
    pixels, latents = random_pixels(tower, 3), torch.arange(20).expand(3, -1)
    with torch.inference_mode():
        maps = explain_latents(tower, sae, pixels, latents, ("contrib_grad",), Options(**options))["contrib_grad"]
        pre = sae.pre_activations(tower.embed(pixels)).gather(1, latents)
    assert maps.gradient_error is not None
    of_sum = completeness_error(maps._replace(gradient_error=None), pre).max()
    assert completeness_error(maps, pre).max() >= maps.gradient_error.max() / pre.abs().max().clamp(min=1)
    return float(of_sum), float(maps.gradient_error.max())


@pytest.mark.parametrize("norm", ["frozen", "exact"])
@pytest.mark.parametrize("layers", [0, 1])
def test_backwards_and_forwards_agree(norm: str, layers: int) -> None:
    for shape in SHAPES:
        of_sum, of_gradient = errors(random_tower(**shape)[1], random_sae(), norm=norm, layers=layers)
        assert max(of_sum, of_gradient) < 1e-5, shape
    for shape in SIGLIP_SHAPES:
        of_sum, of_gradient = errors(random_siglip(**shape)[1], random_sae(n_inputs=shape["width"]), norm=norm)
        assert max(of_sum, of_gradient) < 2e-5, shape


def test_the_derivative_is_that_of_autograd() -> None:
    """Of the whole CLS path in float64, summed with the same signs."""
    _, tower = random_tower()
    sae, pixels, latents = random_sae(), random_pixels(tower, 2), torch.tensor([[3, 5], [7, 9]])
    D = replayed(tower, sae, pixels, latents, exact=True)
    with torch.inference_mode():
        _, trace = tower(pixels, keys=True)
        direction = tower.pull_back(sae.read_outs(latents)[0], trace.query_final, exact=True).direction
        derivative = tangent.derivative(tower, trace, direction, len(D))
    s = tangent.signs(len(D), tower.n_heads, trace.values[0].shape[1])
    assert s.unique().tolist() == [-1, 1]
    expected = sum(
        (A[:, None] * G * signs).sum((2, 3)) for A, G, signs in zip(trace.query_attention, D, s, strict=True)
    )
    torch.testing.assert_close(derivative.double(), expected, rtol=1e-4, atol=1e-5)


def forgets_the_activation(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, inner: torch.ones_like(inner, dtype=torch.float32)


def forgets_the_norm(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda norm, x, g: g * norm.weight


def forgets_the_query(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(layer: Any, passing: Any, inside: Any) -> Any:
        return right(layer, passing._replace(keys=torch.zeros_like(passing.keys)), inside)

    return wrong


def forgets_all_below(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, passing, inside: inside.G_y


WRONG = {
    "slope": forgets_the_activation,
    "_norm_vjp": forgets_the_norm,
    "before_layer": forgets_the_query,
    "attention": forgets_all_below,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_adds_up_and_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tower = random_tower()
    part = {"attention": "before_layer"}.get(name, name)
    monkeypatch.setattr(cls_path, part, WRONG[name](getattr(cls_path, part)))
    of_sum, of_gradient = errors(tower, random_sae())
    assert of_sum < 1e-5, "the sum is no judge of a gradient"
    assert of_gradient > 0.01


def test_a_job_s_figure_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tower = random_tower()
    infer = Inference(tower, random_sae(), 4, ("contrib", "contrib_grad"), "cpu")
    pixels = random_pixels(tower, 2).numpy()
    assert infer(pixels).completeness.max() < 1e-5
    monkeypatch.setattr(cls_path, "slope", forgets_the_activation(cls_path.slope))
    assert infer(pixels).completeness.max() > 0.01

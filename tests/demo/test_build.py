"""A few steps of training the embedded CLIP: it learns, resumes as if nothing had been, and saves what can be loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from saecore.demo import build, drawing, scenes
from saecore.demo.build import ClipBuild, ClipTraining, contrast
from saecore.demo.figures import image_embeddings
from saecore.demo.lessons import make_batch, normalise, photo
from saecore.towers.loading import load_tower

TOY = ClipBuild(batch=16, rate=3e-3, lessons=4)


def batches(training: ClipTraining, n: int) -> list[Any]:
    return [make_batch(training.tokenizer, start, TOY.batch, 0.0) for start in range(0, n * TOY.batch, TOY.batch)]


def test_a_few_steps_on_one_batch_reduce_every_loss() -> None:
    training = ClipTraining(TOY)
    training.scenes = 5_000  # past the warm-up
    (batch,) = batches(training, 1)
    first, *_, last = (training.step(batch, 0.0) for _ in range(12))
    assert sum(last) < sum(first) / 2
    assert all(after < before for before, after in zip(first, last, strict=True)), (first, last)


def test_stopped_and_resumed_equals_unbroken_bit_for_bit(tmp_path: Path) -> None:
    unbroken, stopped = ClipTraining(TOY), ClipTraining(TOY)
    given = batches(unbroken, 4)
    expected = [unbroken.step(batch, number / 4) for number, batch in enumerate(given)]
    for number, batch in enumerate(given[:2]):
        stopped.step(batch, number / 4)
    torch.save(stopped.state(), tmp_path / "clip.pt")
    torch.manual_seed(1)
    resumed = ClipTraining(TOY)
    resumed.restore(torch.load(tmp_path / "clip.pt", weights_only=True))
    assert [resumed.step(batch, number / 4) for number, batch in enumerate(given) if number >= 2] == expected[2:]
    assert (resumed.scenes, resumed.level) == (64, unbroken.level)
    for one, other in zip(resumed.weights, unbroken.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_lessons_grow_harder_when_they_are_passed() -> None:
    """A mark of 0 is passed by every batch, one above 1 by none."""
    for mark, level in ((0.0, 0.5), (1.1, 0.0)):
        training = ClipTraining(ClipBuild(batch=8, lessons=4, pass_mark=mark))
        for batch in batches(training, 2):
            training.step(batch, 0.0)
        assert training.level == level


@pytest.mark.parametrize(
    ("progress", "seen", "rate"), [(0.0, 4_992, 1.0), (0.0, 484, 0.1), (0.75, 5_000, 0.5), (1.0, 5_000, 0.01)]
)
def test_the_learning_rate_warms_up_and_decays_over_the_second_half(progress: float, seen: int, rate: float) -> None:
    training = ClipTraining(TOY)
    training.scenes = seen
    training.step(batches(training, 1)[0], progress)
    assert [group["lr"] for group in training.optimiser.param_groups] == pytest.approx([rate * TOY.rate] * 2, rel=2e-3)


def test_contrast_by_hand() -> None:
    """Three pairs; the first two images share a text that is true of both, so neither is the other's negative."""
    image, text = torch.eye(3), torch.eye(3)
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    # Each of the first two has one negative, the third two: softmax of (s, 0) and of (s, 0, 0) with s = 2.
    two, three = np.log(1 + np.exp(-2)), np.log(1 + 2 * np.exp(-2))
    assert contrast(image, text, torch.tensor(2.0), same).item() == pytest.approx((two + two + three) / 3)
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    assert contrast(image, text, torch.tensor(2.0), nothing).item() == pytest.approx(three)


def test_patches_begin_whitened() -> None:
    """Their 128 strongest directions begin at equal size, rotated at random: half the identity, over all scenes' patches."""
    torch.manual_seed(0)
    model = build.make_clip(build.make_tokenizer())
    build.whiten(model)
    drawn = [drawing.render(scene, 64) for scene in scenes.scenes_of(scenes.SEED_SAE, 400)]
    with torch.no_grad():
        seen = model.vision_model.embeddings.patch_embedding(normalise(np.stack(drawn))).flatten(2).transpose(1, 2)
    spread = torch.linalg.eigvalsh(seen.flatten(0, 1).T.cov()).sqrt()
    assert spread.max() < 0.5 + 1e-3
    assert spread.median() > 0.1


@pytest.mark.slow
def test_the_command_saves_what_can_be_loaded_and_is_done_when_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For three seconds; the saved folder is a CLIP for `transformers` and for the library, and they agree."""
    threads = torch.get_num_threads()
    config = ClipBuild(minutes=0.05, batch=8, threads=threads, checkpoint=tmp_path / "clip.pt", out=tmp_path / "clip")
    build.train_clip(config)
    assert "written to" in capsys.readouterr().out
    model = CLIPModel.from_pretrained(config.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    assert tokenizer.eos_token_id == model.config.text_config.eos_token_id
    state = torch.load(config.checkpoint, weights_only=True)
    torch.testing.assert_close(state["model"], dict(model.state_dict()))
    assert AutoImageProcessor.from_pretrained(config.out).size["shortest_edge"] == 64
    pixels = photo(scenes.scene_at(scenes.SEED_DEMO, 3))[None]
    with torch.no_grad():
        expected = image_embeddings(model, normalise(pixels))
    torch.testing.assert_close(
        load_tower(str(config.out)).embed(torch.from_numpy(pixels)), expected, rtol=1e-4, atol=1e-4
    )
    steps: list[Callable[..., Any]] = []
    monkeypatch.setattr(ClipTraining, "step", lambda *given: steps.append(given))
    build.train_clip(config)
    assert not steps

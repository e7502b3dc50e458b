"""Training: a planted dictionary is found, a stopped training goes on exactly, workers of Ray Train come to the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import train
from saecore.sae.checkpoints import load_sae
from saecore.training.loop import Course, Silence, Training, make_plan
from saecore.training.recipe import Recipe
from saecore.training.survey import Survey
from saecore.training.trainer import Trainer, Worker
from tests.helpers.mistakes import mistake

D, ATOMS, ACTIVE, ROWS = 64, 96, 3, 30_000


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small products: a second thread only waits, and costs ten times the time where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Embeddings that are sums of 3 of 96 unit atoms in 64 dimensions, far from the origin; and the atoms."""
    generator = np.random.default_rng(0)
    atoms = generator.normal(size=(ATOMS, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((ROWS, ATOMS))
    active = np.argsort(generator.random(codes.shape), axis=1)[:, :ACTIVE]
    codes[np.arange(ROWS)[:, None], active] = generator.uniform(0.5, 1.5, active.shape)
    path = tmp_path_factory.mktemp("planted") / f"planted_{ROWS}_{D}.npy"
    (codes @ atoms + 3 * generator.normal(size=D)).astype(np.float32).tofile(path)
    return path, atoms


def run(path: Path, out: Path, **choices: Any) -> dict[str, Any]:
    """Train in process; the record."""
    recipe = Recipe(**{"latents": ATOMS, "k": ACTIVE, "rate": 3e-3, "batch_size": 512, "epochs": 16.0, **choices})
    recipe.check()
    plan = make_plan(recipe, str(path), "embedding", str(out), Course(evaluations=2))
    record = Training(plan, Worker()).run(Silence(), {})
    assert record is not None
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "l0"),
    [
        ({"architecture": "topk"}, ACTIVE),
        ({"architecture": "topk", "dead": "resample"}, ACTIVE),
        ({"architecture": "topk", "pre_bias": "median", "centre": False, "ema": 0.99}, ACTIVE),
        ({"architecture": "batchtopk"}, ACTIVE),
        ({"architecture": "jumprelu"}, ACTIVE),
        ({"architecture": "matryoshka", "nested": (3, 6, 12, 24)}, ACTIVE),
        ({"architecture": "matryoshka", "nested": (3, 6, 12, 24), "weighting": "reverse"}, ACTIVE),
        ({"architecture": "matryoshka-prefixes", "nested": (48, 96)}, ACTIVE),
        ({"architecture": "relu", "sparsity": 0.1}, None),
    ],
    ids=lambda value: "-".join(f"{v}" for v in value.values()) if isinstance(value, dict) else "",
)
def test_a_planted_dictionary_is_found(
    planted: tuple[Path, np.ndarray], tmp_path: Path, choices: dict[str, Any], l0: float | None
) -> None:
    """Mean over atoms of the largest cosine with a latent's decoder row: 0.36 for random rows."""
    path, atoms = planted
    record = run(path, tmp_path, **choices)
    sae = load_sae(str(tmp_path))
    found = torch.nn.functional.normalize(sae.atoms, dim=-1).numpy()
    cosine = (atoms @ found.T).max(axis=1).mean()
    print(f"{choices}: mean maximal cosine {cosine:.3f}, {record['figures']}")
    assert cosine >= 0.95
    if l0 is not None:
        assert record["figures"]["l0"] == pytest.approx(l0, rel=0.1)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_sae(str(out)).state_dict())


class StopAfter(Silence):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, done: int, total: int, figures: dict[str, Any] | None) -> None:
        self.left -= 1

    def stop(self) -> bool:
        return self.left <= 0


@pytest.mark.parametrize(
    "choices",
    [
        {"architecture": "topk", "dead_after": 2048, "ema": 0.9, "schedule": "cosine", "warmup": 10},
        {"architecture": "jumprelu", "dead_after": 2048, "dead": "resample"},
        {"architecture": "matryoshka-prefixes"},
    ],
    ids=lambda choices: choices["architecture"],
)
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(
    planted: tuple[Path, np.ndarray], tmp_path: Path, choices: dict[str, Any]
) -> None:
    recipe = Recipe(latents=ATOMS, k=ACTIVE, rate=3e-3, batch_size=1024, epochs=2.5, **choices)
    whole, broken = (
        make_plan(recipe, str(planted[0]), "embedding", str(tmp_path / name), Course(evaluations=3))
        for name in ("whole", "broken")
    )
    assert Training(whole, Worker()).run(Silence(), {}) is not None
    for _ in range(3):  # 65 steps in all, so once within an epoch, once after its end
        assert Training(broken, Worker()).run(StopAfter(20), {}) is None
    assert Training(broken, Worker()).run(Silence(), {}) is not None
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [
        pq.read_table(tmp_path / name / "metrics.parquet").drop(["seconds"]).to_pylist() for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]


def test_a_folder_with_another_training_is_refused(planted: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    recipe = Recipe(latents=ATOMS, k=ACTIVE, batch_size=1024, epochs=0.2)
    Training(make_plan(recipe, str(planted[0]), "embedding", str(tmp_path), Course(evaluations=1)), Worker()).run(
        Silence(), {}
    )
    other = Recipe(latents=ATOMS, k=ACTIVE + 1, batch_size=1024, epochs=0.2)
    with pytest.raises(ValueError, match="k was 3, now 4"):
        make_plan(other, str(planted[0]), "embedding", str(tmp_path), Course(evaluations=1))
    # Before `clip_norm` had this name, checkpoints called it `clip`.
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["parts"]["recipe"]["clip"] = state["parts"]["recipe"].pop("clip_norm")
    torch.save(state, tmp_path / "checkpoint.pt")
    make_plan(recipe, str(planted[0]), "embedding", str(tmp_path), Course(evaluations=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds other files and no training"):
        make_plan(recipe, str(planted[0]), "embedding", str(tmp_path / "mine"), Course())


def test_dead_latents_come_back() -> None:
    """Latents that never fire, fire again by either remedy, and by none without."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4096, 16, generator=generator).numpy()
    seen = Survey(len(rows), rows.mean(0), 1.0, np.zeros(0, np.int64), rows[:8], rows[:1024], False)
    alive = {}
    for remedy in ("aux", "resample", "none"):
        trainer = Trainer(Recipe(latents=64, k=4, rate=3e-3, dead=remedy, dead_after=1024), 16, seen, Worker())
        with torch.no_grad():
            # Never among the 4 strongest, yet positive for most images: aux reaches them.
            trainer.sae.encoder.T[:8] *= 0.01
            trainer.sae.latent_bias[:8] = 0.02
        for step in range(200):
            trainer.train(rows[step * 256 % 4096 :][:256], 200)
        alive[remedy] = int((~trainer.dead[:8]).sum())
    assert alive["none"] == 0
    assert alive["aux"] >= 6
    assert alive["resample"] >= 6


def arguments(path: Path, out: Path, *more: str) -> list[str]:
    fixed = [
        "--latents",
        "96",
        "--k",
        "3",
        "--batch-size",
        "1024",
        "--rate",
        "3e-3",
        "--epochs",
        "1",
        "--evaluations",
        "2",
    ]
    return ["--embeddings", str(path), "--out", str(out), *fixed, *more]


@pytest.mark.usefixtures("ray_session")
def test_ray_train_comes_to_the_same(
    planted: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One worker: the same bits. Two: the same up to the order of sums."""
    assert train.main(arguments(planted[0], tmp_path / "here")) == 0
    assert "held out" in capsys.readouterr().out
    for workers in (1, 2):
        assert train.main(arguments(planted[0], tmp_path / f"{workers}", "--workers", f"{workers}")) == 0
        assert "CKNNA" in capsys.readouterr().out
    here, one, two = (weights(tmp_path / name) for name in ("here", "1", "2"))
    for name in here:
        assert torch.equal(one[name], here[name]), name
        torch.testing.assert_close(two[name], here[name], rtol=1e-3, atol=1e-3)


def test_the_command_leaves_what_it_says(
    planted: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(planted[0], tmp_path / "sae")) == 0
    assert "Use it: --sae" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "sae").iterdir()}
    assert names >= {"sae.safetensors", "config.json", "README.md", "metrics.csv", "metrics.parquet", "training.json"}
    assert (tmp_path / "sae" / "training.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "sae" / "training.json").read_text())
    assert record["recipe"]["latents"] == 96
    assert record["figures"]["fvu"] < 0.8
    assert train.main(arguments(planted[0], tmp_path / "sae")) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--k", "97"], "--k 97: there are only 96 latents"),
        (["--architecture", "gated"], "--architecture gated: must be one of relu, topk"),
        (["--batch-size", "40000"], "--batch-size 40000: there are 27,000 embeddings to train on"),
        (["--embeddings", "nowhere.npy"], "nowhere.npy: no such file"),
        (["--penalty", "l0"], "--penalty l0 needs thresholds that learn, which only the architecture jumprelu has"),
        (["--clip-norm", "-1"], "--clip-norm -1.0: must be at least 0"),
        (["--nested", "3", "5"], "has no nested levels"),
        (["--held-out", "0"], "--held-out 0: of 30,000 embeddings at least one must be held out"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    planted: tuple[Path, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    complaint: str,
) -> None:
    sentence = mistake(train.main, arguments(planted[0], tmp_path / "out", *more), capsys)
    assert sentence.startswith(more[0])
    assert complaint in sentence
    assert not (tmp_path / "out" / "sae.safetensors").exists()

"""What a large SAE takes in memory, bounded by arithmetic, in processes of their own: nothing else raises their peak."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saecore.sae.model import SAE, SAEConfig

ROOT = Path(__file__).parents[2]

LATENTS = 65_536
SLACK = 64 << 20
"""Workspaces of matrix products, and the rows among which latents are chosen at once."""

ENCODE = """
import torch
from benchmarks.query import peak_rss
from saecore.sae.model import SAE, SAEConfig
torch.manual_seed(0)
sae = SAE(SAEConfig(n_inputs=16, n_latents={latents}, **{choices})).requires_grad_(False)
sae.encoder.normal_()
sae.latent_bias.fill_(-20)
if sae.threshold is not None: sae.threshold.fill_(0.5)
x = torch.randn({batch}, 16)
with torch.inference_mode():
    sae.encode_sparse(x[:1], at_least=64)
    before = peak_rss()
    code = sae.encode_sparse(x, at_least=64)
assert code.latents.shape[1] < 1000
print(peak_rss() - before)
"""

LOAD = """
from benchmarks.query import peak_rss
from saecore.sae.checkpoints import load_sae
load_sae("demo")
before = peak_rss()
sae = load_sae({folder!r})
sae.sha256()
print(peak_rss() - before)
"""


def growth(code: str) -> int:
    """By how many bytes the peak of a process grows in that code."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    "choices",
    [
        {"architecture": "topk", "k": 64, "output": "absolute", "by_magnitude": True},
        {"architecture": "relu"},
        {"architecture": "batchtopk"},
        {"architecture": "jumprelu"},
    ],
    ids=lambda choices: choices["architecture"],
)
def test_encoding_holds_the_pre_activations_of_a_batch_once(choices: dict[str, object]) -> None:
    """Copies made by masks took 3.3 times the pre-activations, and those of magnitudes 2 times."""
    dense = 512 * LATENTS * 4
    assert growth(ENCODE.format(latents=LATENTS, choices=choices, batch=512)) < dense + SLACK


def test_loading_and_hashing_hold_one_tensor_twice_at_most(tmp_path: Path) -> None:
    """Encoder and decoder are of one size, so 1.5 times the weights; all at once took 2.5 times."""
    sae = SAE(SAEConfig(n_inputs=512, n_latents=LATENTS, k=64)).requires_grad_(False)
    for tensor in (sae.encoder.T, sae.atoms):
        tensor.copy_(torch.randn(64, 512).repeat(LATENTS // 64, 1))
    sae.save(tmp_path)
    weights = (2 * 512 * LATENTS + LATENTS) * 4
    assert growth(LOAD.format(folder=str(tmp_path))) < 1.5 * weights + SLACK

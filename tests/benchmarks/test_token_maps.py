"""What an SAE of patch tokens costs: the command at the demo's shape."""

import re
import sys

import pytest

from benchmarks import token_maps


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "demo", "--layer", "3", "--latents", "256", "--fires", "6", "--rounds", "2", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["token_maps", *small])
    assert token_maps.main() == 0
    said = capsys.readouterr().out
    ways = re.findall(r"^\| (\w[^|]*?) +\|", said, re.MULTILINE)
    of_max = ["SAE, max", "activation, max", "attention, max", "contrib, max", "contrib_grad, max"]
    assert ways == ["forward", *of_max, "SAE, mean", "activation, mean", "attention, mean", "contrib, mean"]

"""What an SRG costs: the command at the demo's shape."""

import re
import sys

import pytest

from benchmarks import judging


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--shape", "demo", "--latents", "3", "--n-latents", "80", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["judging", *small])
    assert judging.main() == 0
    said = capsys.readouterr().out
    assert re.findall(r"^\| (\w[^|]*?) +\|", said, re.MULTILINE) == ["whole", "bare", "SRG"]
    ratio = float(re.findall(r"SRG / bare forwards = (\d+\.\d+)", said)[0])
    assert 0.5 < ratio < 10
    forwards = float(re.findall(r"one image and latent: (\d+\.\d+) forwards", said)[0])
    assert 1 < forwards < 60

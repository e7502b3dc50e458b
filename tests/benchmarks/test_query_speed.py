"""benchmarks query: a small run from writing to removing it, and the arithmetic of its last lines by hand."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import query
from benchmarks.__main__ import main


@pytest.mark.slow
def test_questions_to_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", "1000", "--latents", "64", "--k", "4", "--side", "2", "--rounds", "2"]
    assert main(["query", *small, "--folder", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1,024 images, 4,096 rows of 64 latents, maps of 2 x 2"
    rows = {line[:26].strip(): line[26:].split() for line in lines}
    for step in ("write the run", "index", "count", "index a tenth more"):
        _, _, peak, unit = rows[step]
        assert unit == "GB"
        assert 0.02 < float(peak) < 2
    sizes = {name: int(rows[name][0]) for name in ("images", "activations", "maps", "by_latent", "top_images")}
    assert all(sizes.values())
    assert abs(int(rows["a run with maps"][0]) - sum(sizes[name] for name in ("images", "activations", "maps"))) <= 2
    assert abs(int(rows["a run without maps"][0]) - sizes["images"] - sizes["activations"]) <= 2
    assert rows["activations"][1:] == ["32"]  # 4 latents of 4 + 4 bytes
    assert rows["maps"][1:] == ["64"]  # 4 maps of 2 x 2 floats
    # what the aims are held against is what the tables say; how fast this machine is, is no test's business
    taken = {line[:34].strip(): re.findall(r"([\d,.]+) \(", line[34:]) for line in lines}
    question = f"top {query.TOP} of a latent with maps"
    without, indexed, _ = taken[question]
    assert lines[-4].startswith(f"{question}, with an index: {indexed} ms, aim 50: ")
    assert lines[-3].startswith(f"{question}, without an index: {without} ms, aim 2,000: ")
    assert lines[-2] == f"4,096 rows by latent in {rows['index'][2]} GB, aim 4: yes"


def test_aims_and_far_sizes_by_hand() -> None:
    question = f"top {query.TOP} of a latent with maps"
    figures: dict[str, Any] = {
        "rows": 32_000,
        "steps": {"index": {"seconds": 3.0, "peak_bytes": 4e9}, "count": {"seconds": 0.6}},
        "bytes": {"images": 20_000, "activations": 280_000, "maps": 1_700_000, "by_latent": 300_000, "top_images": 2e9},
        "milliseconds": {"without an index": {question: (2000.1, 3000.0)}, "with an index": {question: (49.9, 51.0)}},
    }
    within, beyond, memory = query.verdicts(figures)
    assert within == "top 100 of a latent with maps, with an index: 49.9 ms, aim 50: yes"
    assert beyond == "top 100 of a latent with maps, without an index: 2,000.1 ms, aim 2,000: NO"
    assert memory == "32,000 rows by latent in 4.00 GB, aim 4: yes"
    # of 100,000 times as many images: 2,000 bytes each, 300 without maps; 300 each by latent, and 2 GB that do not grow; 3.6 s
    each = {name: size / 1000 for name, size in figures["bytes"].items()}
    (told,) = query.far(figures, each, 2000.0, query.Sizes(1000, 6144, 32, 7))
    assert told.endswith("200 GB with maps, 30 GB without; the index 32 GB in 100.0 hours")

"""A collection that means harm, or is only as the web is: every file gets its row, and nothing else happens."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import explain, index, report
from saecore.images.decode import ImageError, decode_image
from saecore.images.preprocess import Preprocess, Resize
from saecore.storage import read_parquet
from tests.helpers import hostile
from tests.test_layout import ROOT

CLIP = Preprocess.from_config({"size": 224, "crop_size": 224})
CORPUS = hostile.corpus()
VISIBLE = [name for name in hostile.NAMES if not name.startswith("..\\")]
"""What begins with a dot is hidden in a tar, as in a folder; a Parquet file hides nothing."""


def test_there_are_many_kinds() -> None:
    assert len(CORPUS) >= 60
    reasons = {reason for _, expected in CORPUS.values() for reason in expected}
    assert reasons == {None, "empty", "not-an-image", "truncated", "corrupt", "unsupported", "too-large"}


@pytest.mark.parametrize("resize", get_args(Resize))
@pytest.mark.parametrize("name", CORPUS)
def test_a_file_becomes_pixels_or_a_reason(name: str, resize: Resize) -> None:
    data, expected = CORPUS[name]
    outcome, detail = None, ""
    try:
        assert decode_image(data, CLIP, resize=resize).pixels.shape == (224, 224, 3)
    except ImageError as error:
        outcome, detail = error.reason, error.detail
    assert outcome in expected
    assert bool(detail) == (outcome is not None)


@pytest.mark.slow
def test_mutations_of_real_files_are_decoded_or_refused() -> None:
    """In a process of their own, which a decoder could take down."""
    said = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile", "20000"], cwd=ROOT, capture_output=True, timeout=300
    )
    assert said.returncode == 0, said.stderr[-2000:]
    seen = json.loads(said.stdout)
    outcomes = seen["outcomes"]
    assert sum(outcomes.values()) == 20_000
    assert outcomes["decoded"] > 4000
    assert outcomes.keys() >= {"corrupt", "truncated", "not-an-image", "too-large", "too-complex", "empty"}
    assert "no detail" not in outcomes
    assert seen["slowest"] < hostile.SLOWEST
    assert seen["megabytes"] < 200  # of a million pixels, several copies at four bytes each


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> tuple[Any, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, io.BytesIO(data)


def collection(folder: Path) -> int:
    """The corpus as loose files, in a tar and in a Parquet file, the hostile names in both; returns how many images."""
    loose = folder / "loose"
    loose.mkdir(parents=True)
    for name, (data, _) in CORPUS.items():
        (loose / name).write_bytes(data)
    picture = CORPUS["palette.png"][0]
    named = [(name, picture) for name in hostile.NAMES]
    members = [(name, data) for name, (data, _) in CORPUS.items()] + named
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for link, kind in (("soft.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            tar.addfile(*member(link, kind=kind, target="/etc/passwd"))
        for device, kind in (
            ("tty.jpg", tarfile.CHRTYPE),
            ("disk.jpg", tarfile.BLKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            tar.addfile(*member(device, kind=kind))
        tar.addfile(*member("folder.jpg", kind=tarfile.DIRTYPE))
        for name, data in members:
            tar.addfile(*member(name, data))
    with tarfile.open(folder / "b.tar.gz", "w:gz") as tar:
        tar.addfile(*member("bomb.bin", bytes(200 << 20)))  # 200 kB compressed, and no image
        tar.addfile(*member("after.jpg", picture))
    table = pa.table({"key": [name for name, _ in members], "image": [data for _, data in members]})
    pq.write_table(
        pa.concat_tables([table, pa.table({"key": ["null"], "image": pa.array([None], pa.binary())})]),
        folder / "c.parquet",
    )
    return 3 * len(CORPUS) + len(hostile.NAMES) + len(VISIBLE) + 2


@pytest.mark.slow
def test_a_hostile_collection_from_end_to_end(tmp_path: Path) -> None:
    """One row an image, nothing outside the run, and pages in which every name is text."""
    images, run = tmp_path / "images", tmp_path / "run"
    n_images = collection(images)
    before = set(tmp_path.parent.rglob("*"))
    given = ["--images", str(images), "--clip", "demo", "--sae", "demo", "--out", str(run), "--local"]
    # With the default, two images of one row are resized to 82 million pixels: seconds.
    how = ["--chunk-size", "64", "--max-pixels", str(10**7)]
    assert explain.main([*given, *how]) == 0
    assert index.main(["--run", str(run)]) == 0
    assert report.main(["--run", str(run)]) == 0
    made = set(tmp_path.parent.rglob("*")) - before
    assert all(path == run or run in path.parents for path in made)
    rows = pa.concat_tables(read_parquet(str(path)) for path in sorted((run / "images").glob("*.parquet"))).to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows}) == n_images
    for row in rows:
        name = Path(row["key"]).name
        if name in CORPUS:
            assert row["error"] in CORPUS[name][1]
    keys = [row["key"] for row in rows if row["uri"].endswith("a.tar")]
    assert keys[len(CORPUS) :] == VISIBLE
    assert [row["error"] for row in rows if row["uri"].endswith("b.tar.gz")] == [None]
    assert [row["error"] for row in rows if row["key"] == "null"] == ["no-data"]
    pages = "".join(path.read_text() for path in run.rglob("*.html"))
    assert "alert(1)" in pages  # as text
    assert "<script>alert" not in pages
    assert "<img src=x" not in pages

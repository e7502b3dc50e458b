"""Shards, a run, its index, its names and its pages on a server that speaks S3 (moto): the same content as on a disk."""

import shlex
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer

from jobs import explain, index, name, query, report
from saecore.images.listing import list_shards
from saecore.query import results
from saecore.storage import filesystem_of
from saecore.upkeep import holder, lock
from saecore.upkeep.lease import Claim, Folder, HeldError, Times
from tests.conftest import command

pytestmark = pytest.mark.slow

LOOSE = ("x #1+%20.jpg", "ü & ö.jpg")
"""Names that need escaping."""


@pytest.fixture(scope="module")
def settings() -> Iterator[str]:
    """Of an address: those of a server that holds one empty bucket, `bucket`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        yield f"?endpoint_override={host}:{port}&scheme=http"
    server.stop()


@pytest.fixture(scope="module")
def album(shards: Path, settings: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard and two loose files; the same lies in the bucket as `album`."""
    folder = tmp_path_factory.mktemp("album")
    shard = min(shards.glob("*.tar"))
    (folder / shard.name).write_bytes(shard.read_bytes())
    (folder / "photos").mkdir()
    with tarfile.open(shard) as tar:
        pictures = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        for member, called in zip(pictures, LOOSE, strict=False):
            file = tar.extractfile(member)
            assert file is not None
            (folder / "photos" / called).write_bytes(file.read())
    filesystem, _ = filesystem_of(f"s3://bucket{settings}")
    pyarrow.fs.copy_files(str(folder), "bucket/album", destination_filesystem=filesystem)
    return folder


def named_next(said: str) -> list[tuple[str, list[str]]]:
    """The commands that jobs.explain names at its end: each one's job and arguments."""
    lines = [shlex.split(line, comments=True) for line in said.partition("\nNext:\n")[2].splitlines() if line]
    assert [line[1:3] for line in lines] == [["-m", f"jobs.{job}"] for job in ("index", "name", "report")]
    return [(line[2].removeprefix("jobs."), line[3:]) for line in lines]


def test_a_run_from_shards_to_pages(
    album: Path, settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there, here = f"s3://bucket/run{settings}", str(tmp_path / "run")
    for images, out in ((f"s3://bucket/album/{settings}", there), (str(album), here)):
        assert explain.main(command(images, out, "--local")) == 0
        for job, given in named_next(capsys.readouterr().out):
            assert {"index": index, "name": name, "report": report}[job].main(given) == 0
    assert (tmp_path / "report" / "index.html").exists()
    assert (tmp_path / "run" / "report" / "index.html").exists()
    assert tables(there) == tables(here)
    shown = results.open(there).sql("SELECT key FROM images WHERE error IS NULL ORDER BY image_id")
    assert shown["key"].to_pylist()[:2] == [f"photos/{called}" for called in LOOSE]
    assert explain.main(command(f"s3://bucket/album/{settings}", there, "--local")) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert query.main(["top", there, "53", "--n", "3"]) == 0
    assert report.main(["--run", there, "--out", str(tmp_path / "pages")]) == 0
    assert "18 images, 18 pictures" in capsys.readouterr().out


def test_one_writer_at_a_time(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims lie next to the run; a lease of another machine that is not renewed ends, by the store's own times."""
    uri, times, said = f"s3://bucket/locked{settings}", Times(lease=3.0, renew=1.0, poll=0.2), list[str]()
    with lock.alone(uri, "relmap explain", said.append, times):
        with (
            pytest.raises(HeldError, match="is in use: relmap explain on "),
            lock.alone(uri, "next", said.append, times),
        ):
            pass
        monkeypatch.setattr(holder, "_machine", lambda: "another machine")
        with pytest.raises(HeldError), lock.alone(uri, "next", said.append, times):
            pass
        assert len(said) == 1, "the holder's next sign of life was waited for"
        assert len(Folder(uri).seen()) == 1
    assert Folder(uri).seen() == {}
    Folder(uri).write(Claim("dead", holder.Holder("gpu-7", 1, "relmap explain", 0.0, "gpu-7", ""), held=True))
    with lock.alone(uri, "next", said.append, times) as held:
        held.check()
        assert [one.claim.holder.command for one in Folder(uri).seen().values()] == ["next"]
    assert "relmap explain on gpu-7, process 1" in said[-1]


def tables(uri: str) -> dict[str, pa.Table]:
    """All of a run but where its images lie."""
    run = results.open(uri)
    asked = {
        "images": "SELECT * EXCLUDE uri FROM images ORDER BY image_id",
        "activations": "SELECT * FROM activations ORDER BY image_id, rank",
        "maps": "SELECT * FROM maps ORDER BY image_id, latent",
        "latents": "SELECT * FROM latents ORDER BY latent",
    }
    answers = {table: run.sql(text) for table, text in asked.items()}
    assert all(table.num_rows for table in answers.values())
    return answers | {"top": run.top_images(53, 5, maps=True).drop_columns("uri")}


@pytest.mark.parametrize(
    ("path", "base", "members"),
    [
        ("album/photos", "album/photos", list(LOOSE)),
        ("album/photos/", "album/photos/", list(LOOSE)),
        ("album/photos/x #1+%20.jpg", "album/photos", ["x #1+%20.jpg"]),
        ("album/*/ü*.jpg", "album", ["photos/ü & ö.jpg"]),
    ],
)
def test_loose_files(album: Path, settings: str, path: str, base: str, members: list[str]) -> None:
    (shard,) = list_shards([f"s3://bucket/{path}{settings}"])
    assert (shard.uri, shard.kind, shard.members) == (f"s3://bucket/{base}{settings}", "folder", members)
    filesystem, folder = filesystem_of(shard.uri)
    for member in members:
        with filesystem.open_input_file(f"{folder}/{member}") as file:
            assert file.read() == next(album.glob(f"photos/{member.rpartition('/')[2]}")).read_bytes()

"""Shards, a run, its index, its names and its pages on a server that speaks S3 (moto): the same content as on a disk."""

import io
import itertools
import re
import shlex
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from jobs import explain, index, name, query, report
from saecore import patience, stores
from saecore.images.listing import list_shards
from saecore.query import results
from saecore.storage import Place, filesystem_of, read_bytes
from saecore.upkeep import holder, lock
from saecore.upkeep.lease import Claim, Folder, HeldError, Times
from tests.conftest import command
from tests.helpers.faulty import Asked, Faulty, before, each_once
from tests.helpers.mistakes import mistake

pytestmark = pytest.mark.slow

SECRET = "wJalrXUtnFEMI7MDENG"

LOOSE = ("x #1+%20.jpg", "ü & ö.jpg")
"""Names that need escaping."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Host and port of a server that holds one empty bucket, `bucket`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def settings(server: str) -> str:
    """Of an address on that server."""
    return f"?endpoint_override={server}&scheme=http"


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


@pytest.fixture
def faulty(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """A server in front, which fails as it is told. Every fault is seen: the client does not ask again by itself."""
    monkeypatch.setattr(stores, "S3_ATTEMPTS", 1)
    monkeypatch.setattr(stores, "S3_SECONDS", 1.0)
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(patience, "LINE_SECONDS", 0.0)
    with before(server) as front:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{front.host}")
        yield front
    patience._down.forget()


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
    assert SECRET not in "".join(held(there, tmp_path))


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


def held(run: str, *folders: Path) -> list[str]:
    """All that a run on the server and some local folders hold, as text: of Parquet files the values and the metadata."""
    contents = [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]
    place = Place(run)
    contents += [place.open(info.path).read() for info in place.entries(below=True) if info.is_file]
    tables = [pq.read_table(io.BytesIO(data)) for data in contents if data[:4] == b"PAR1"]
    assert len(tables) > 10
    texts = [f"{table.to_pylist()} {table.schema.metadata}" for table in tables]
    return texts + [data.decode(errors="replace") for data in contents]


def tables(uri: str, indexed: bool = True) -> dict[str, pa.Table]:
    """All of a run but where its images lie; a run without index and names has no table `latents`."""
    run = results.open(uri)
    asked = {
        "images": "SELECT * EXCLUDE uri FROM images ORDER BY image_id",
        "activations": "SELECT * FROM activations ORDER BY image_id, rank",
        "maps": "SELECT * FROM maps ORDER BY image_id, latent",
        "latents": "SELECT * FROM latents ORDER BY latent",
    }
    answers = {table: run.sql(text) for table, text in asked.items() if indexed or table != "latents"}
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


@pytest.fixture(scope="module")
def at_home(album: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pa.Table]:
    """The tables of a run over the album on a disk."""
    here = str(tmp_path_factory.mktemp("home") / "run")
    assert explain.main(command(str(album), here, "--local")) == 0
    answers = tables(here, indexed=False)
    assert answers["images"].num_rows == 18
    return answers


FAULTS = ("slow-down", "error", "cut", "drop", "half", "slow")


def test_whatever_is_asked_fails_once(
    album: Path, at_home: dict[str, pa.Table], faulty: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    """Every request of a run, from the listing to the manifest: the rows are those of a disk, and the log says each retry."""
    once = each_once(FAULTS)
    silent = iter([True])

    def fault(asked: Asked) -> str | None:
        if any(earlier.path.startswith("/bucket/faulty/manifest") for earlier in faulty.asked[:-1]):
            return None  # what a complete run is asked is not asked again by us
        if asked.path.endswith(".tar") and asked.range and next(silent, False):
            return "silence"
        return once(asked)

    faulty.fault = fault
    assert explain.main(command("s3://bucket/album", "s3://bucket/faulty", "--local")) == 0
    faulty.fault = lambda _: None
    assert tables("s3://bucket/faulty", indexed=False) == at_home
    assert faulty.injected.keys() == {*FAULTS, "silence"}
    said = [record.getMessage() for record in caplog.records if record.name == patience.__name__]
    # curl itself asks again where a connection breaks that was kept from before, so breaks are not counted here.
    for kind, told in (
        ("slow-down", r"SLOW_DOWN|SERVICE_UNAVAILABLE|HTTP status 503"),
        ("error", r"INTERNAL_FAILURE|HTTP status 500"),
        ("silence", "curlCode: 28"),
    ):
        assert len([line for line in said if re.search(told, line)]) == faulty.injected[kind]
    assert all(line.startswith("s3://bucket/") and "; asking again in " in line for line in said)


class Midway:
    """A fault for whatever is written after `n_commits` chunks are committed."""

    def __init__(self, kind: str, n_commits: int) -> None:
        self.kind, self.left = kind, n_commits

    def __call__(self, asked: Asked) -> str | None:
        writes = asked.method in ("PUT", "POST")
        if writes and self.left <= 0:
            return self.kind
        self.left -= writes and "/commits/" in asked.path
        return None


@pytest.mark.parametrize(("kind", "why"), [("error", "INTERNAL_FAILURE"), ("refused", "ACCESS_DENIED")])
def test_a_store_that_goes_down_or_refuses_midway(
    kind: str,
    why: str,
    album: Path,
    at_home: dict[str, pa.Table],
    faulty: Faulty,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = f"s3://bucket/{kind}"
    faulty.fault = Midway(kind, 2)
    assert explain.main(command("s3://bucket/album", there, "--local")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {there}/")
    assert " cannot be written: " in said
    assert f" AWS Error {why} " in said
    assert said.endswith("; the same command resumes from here\n")
    assert said.count("\n") == 1
    assert ("asked 5 times in " in said) == (kind == "error")
    patience._down.forget()
    faulty.fault = lambda _: None
    assert explain.main(command("s3://bucket/album", there, "--local")) == 0
    assert "resuming: 10 of 18 images are done" in capsys.readouterr().out
    assert tables(there, indexed=False) == at_home


def test_a_store_that_is_down_before_work_begins(
    album: Path, faulty: Faulty, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no mistake: the same command may be called again. A refusal is one."""
    run = str(tmp_path / "run")
    for argv, what in (
        (command("s3://bucket/album", run, "--local"), "s3://bucket/album cannot be read: "),
        (command(str(album), "s3://bucket/new", "--local"), "s3://bucket/new cannot be read: "),
    ):
        patience._down.forget()
        faulty.fault = lambda _: "slow-down"
        assert explain.main(argv) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {what}")
        assert said.endswith(" s); the same command starts again\n")
        faulty.fault = lambda _: "refused"
        assert "ACCESS_DENIED" in mistake(explain.main, argv, capsys)
    assert not Path(run).exists()


@pytest.mark.parametrize("where", ["--local", "--ray"])
def test_a_store_that_refuses_midway_as_a_person_sees_it(
    where: str, album: Path, at_home: dict[str, pa.Table], faulty: Faulty
) -> None:
    """A worker's sentence reaches the terminal, and run.log on the store says what the job itself has asked again."""
    there = f"s3://bucket/{where}"
    faulty.fault = Midway("refused", 1)
    words = [sys.executable, "-m", "jobs.explain", *command("s3://bucket/album", there)]
    ended = subprocess.run([*words, where], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.startswith(f"error: {there}/")
    assert re.fullmatch(
        r"error: .* cannot be written: .*ACCESS_DENIED.*; the same command resumes from here\n", ended.stderr
    )
    many, attempts = itertools.count(), 3  # those of pyarrow's client in a process of its own
    faulty.fault = lambda asked: "error" if asked.path.endswith("/plan.parquet") and next(many) < attempts else None
    ended = subprocess.run([*words, "--local"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "resuming: " in ended.stdout
    # Another process, with another number of threads, rounds the last bit otherwise.
    exact = {"images": ["image_id", "key", "error"], "activations": ["image_id", "rank", "latent"]}
    found = tables(there, indexed=False)
    for table, columns in exact.items():
        assert found[table].select(columns) == at_home[table].select(columns)
    values, expected = (each["activations"]["activation"].to_numpy() for each in (found, at_home))
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
    log = read_bytes(f"{there}/run.log").decode()
    assert f"{there}/plan.parquet: " in log
    assert "; asking again in " in log
    assert SECRET not in log + ended.stdout

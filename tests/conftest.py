"""What several tests need: one Ray for the session, and a finished run over the demo's scenes."""

import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.fs
import pytest

# Before huggingface_hub reads it: no test asks the network, and a name that is nobody's model is told at once.
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers.utils.logging

from saecore import storage
from tests.helpers import disks

transformers.utils.logging.set_verbosity_error()

N_SCENES = 48
"""Scenes of the shared small run: 3 shards of 16, in 6 chunks of 8."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks follow from what a test asks for: a fixture, or the flag of a job among its parameters."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "ray_session" in fixtures or any(isinstance(value, str) and value == "--ray" for value in parameters):
            item.add_marker("ray")
        if "chromium" in fixtures:
            item.add_marker("browser")
        if "demo_run" in fixtures:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A real Ray on this machine, started once: it takes seconds."""
    import ray

    from jobs import cluster

    cluster.connect(replicas=2)
    cluster.taken = False  # a job that is interrupted must not end it for the tests that follow
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_replica_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on Ray, let go of what it holds.

    A job that ended by an exception is a cycle of traceback and frames. In it is the executor of Ray Data with its replicas:
    they hold CPUs that the next test waits for, until Python happens to collect garbage.
    """
    yield
    if request.node.get_closest_marker("ray"):
        gc.collect()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tar shards of drawn scenes."""
    from saecore.demo import writing

    folder = tmp_path_factory.mktemp("scenes")
    writing.write_shards(folder, N_SCENES, 3)
    return folder


@pytest.fixture(scope="session")
def local_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run over `shards`, made in process: what every other way of running is compared with."""
    from jobs import explain

    out = tmp_path_factory.mktemp("runs") / "local"
    assert explain.main(command(shards, out, "--local")) == 0
    return out


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` explains, without Ray: all 512 scenes, with embeddings. Tests may name its latents, and nothing else."""
    from jobs import explain

    out = tmp_path_factory.mktemp("demo") / "run"
    assert explain.main(["--demo", "--out", str(out), "--local"]) == 0
    return out


@pytest.fixture(scope="session")
def album_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `tests.helpers.album`, with names."""
    from tests.helpers import album

    run = album.write(tmp_path_factory.mktemp("album"))
    album.name(run)
    return run


@pytest.fixture(scope="session")
def explorer(album_run: Path) -> Iterator[str]:
    """Address of `jobs.report --serve` over that run, in a process of its own, ended by Ctrl-C."""
    words = ["-m", "jobs.report", "--run", str(album_run), "--serve", "--port", "0"]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        address = re.search(r"(http://127\.0\.0\.1:\d+)/index\.html", said)
        assert address is not None, said
        yield address[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of few megabytes, to be filled (`tests.helpers.disks`)."""
    with disks.mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that s3://bucket stands for: another pyarrow filesystem than the local one."""

    def filesystem_of(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
        assert uri.startswith("s3://bucket/"), uri
        return bucket, f"{folder}/{uri.removeprefix('s3://bucket/')}"

    folder = tmp_path / "bucket"
    folder.mkdir()
    # fsspec's makes folders as files need them, as an object store seems to.
    bucket = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("file", auto_mkdir=True)))
    monkeypatch.setattr(storage, "filesystem_of", filesystem_of)
    return folder


def command(images: Path | str, out: Path | str, *more: str) -> list[str]:
    """The arguments of a small run with the embedded models."""
    fixed = ["--clip", "demo", "--sae", "demo", "--chunk-size", "8", "--keep-embeddings"]
    return ["--images", str(images), "--out", str(out), *fixed, *more]

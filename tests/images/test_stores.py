"""Images on a web server and in a data set of the Hub, both on loopback: the same rows as on a disk, or a sentence."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from saecore import patience
from saecore.images.chunks import plan_chunks, read_chunk
from saecore.images.listing import list_shards
from saecore.storage import ReadError, check_writable
from tests.conftest import N_SCENES
from tests.helpers.faulty import before, each_once, running
from tests.helpers.served import Served


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar, and a Parquet file of its images one level down."""
    folder = tmp_path_factory.mktemp("served")
    shard = min(shards.glob("*.tar"))
    (folder / "a b.tar").write_bytes(shard.read_bytes())
    (folder / "deep").mkdir()
    pa.parquet.write_table(
        rows([str(shard)]).select(["key", "data"]), folder / "deep" / "all.parquet", row_group_size=2
    )
    return folder


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The folder on a server."""
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    with running(Served(folder)) as server:
        yield server
    patience._down.forget()


@pytest.fixture
def hub(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The same as a data set of the Hub."""
    import huggingface_hub

    for name, value in (("ENDPOINT", ""), ("HUGGINGFACE_CO_URL_TEMPLATE", "/{repo_id}/resolve/{revision}/{filename}")):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", f"http://{served.host}{value}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_plantedtoken")
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield served
    huggingface_hub.HfFileSystem.clear_instance_cache()


def rows(paths: list[str]) -> pa.Table:
    """All images below some paths, in chunks of 4, without their addresses."""
    plan = plan_chunks(list_shards(paths), chunk_size=4)
    return pa.concat_tables([table for chunk in plan.to_pylist() for table in read_chunk(chunk)]).drop_columns("uri")


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_files_of_a_web_server(folder: Path, served: Served, knows_ranges: bool) -> None:
    """A Parquet file is read from its end, a tar from the place of each chunk; a server may know no ranges."""
    served.knows_ranges = knows_ranges
    names = ["a%20b.tar", "deep/all.parquet"]
    there = rows([f"http://{served.host}/{name}" for name in names])
    assert there == rows([str(folder / "a b.tar"), str(folder / "deep" / "all.parquet")])
    assert there["error"].null_count == there.num_rows == 2 * N_SCENES // 3


def test_a_web_server_that_fails_once_for_each_thing(folder: Path, served: Served) -> None:
    with before(served.host) as faulty:
        faulty.fault = each_once(("slow-down", "cut", "drop"))
        assert rows([f"http://{faulty.host}/a%20b.tar"]) == rows([str(folder / "a b.tar")])
        assert faulty.injected.total() >= 3


def test_what_is_gone_and_what_is_down(served: Served) -> None:
    """A file that is gone when it is listed is a mistake. Later, the server may only be out of order: no row is written."""
    with pytest.raises(ValueError, match=r"gone\.tar: no such file"):
        list_shards([f"http://{served.host}/gone.tar"])
    with pytest.raises(ValueError, match="a web server does not list its files: name each of them"):
        list_shards([f"http://{served.host}/*.tar"])
    with pytest.raises(ValueError, match="can be read only"):
        check_writable(f"http://{served.host}/run")
    with before(served.host) as faulty:
        chunks = plan_chunks(list_shards([f"http://{faulty.host}/a%20b.tar"]), chunk_size=4).to_pylist()
        for kind, told in (("error", r"HTTP Error 500.*\(asked 5 times in \d+ s\)"), ("refused", "HTTP Error 403")):
            faulty.fault = lambda _, kind=kind: kind  # type: ignore[misc]
            with pytest.raises(ReadError, match=told):
                list(read_chunk(chunks[1]))


def test_a_data_set_of_the_hub(folder: Path, hub: Served) -> None:
    here = rows([str(folder)])
    for path in ("owner/name", "owner/name@v1", "owner/name/"):
        assert rows([f"hf://datasets/{path}"]) == here
    assert rows(["hf://datasets/owner/name/*.tar"]) == rows([str(folder / "a b.tar")])
    assert rows(["hf://datasets/owner/name@v1/deep"]) == rows([str(folder / "deep")])
    assert "Bearer hf_plantedtoken" in hub.tokens
    for path, told in (
        ("datasets/owner/name/gone.tar", "no such file"),
        ("datasets/owner/other", "no such file"),
        ("owner/name", "hf://datasets/OWNER/NAME/PATH"),
    ):
        with pytest.raises(ValueError, match=told):
            list_shards([f"hf://{path}"])
    with pytest.raises(ValueError, match="can be read only"):
        check_writable("hf://datasets/owner/name/run")

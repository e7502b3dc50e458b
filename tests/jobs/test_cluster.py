"""A cluster that does not answer is told at once; a small collection runs in this process, whatever the choice the same run."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import cluster, collection, embed, explain, index, train
from jobs.pool import Pool
from saecore.images.listing import list_shards
from tests.conftest import N_SCENES, command
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import assert_same_rows


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that accepts, and says what the test's parameter says, or nothing."""
    said: bytes = getattr(request, "param", b"")
    with socket.create_server(("", 0)) as server:
        held = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                if said:
                    connection.sendall(said)

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], argv: list[str]) -> str:
    """The one sentence of a mistake, told within 15 s."""
    began = time.monotonic()
    said = mistake(main, argv, capsys)
    assert time.monotonic() - began < 15
    assert said.startswith("RAY_ADDRESS=")
    return said


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("127.0.0.1:1", "no cluster answers there"),
        ("ray://127.0.0.1:1", "no cluster answers there"),
        ("http://127.0.0.1:8265", "is a dashboard's"),
        ("nonsense", "Invalid address format"),
        ("127.0.0.1:port", "no cluster answers there"),
        ("no-such-host.invalid:6379", "no cluster answers there"),
    ],
)
def test_a_dead_cluster_is_told_before_anything_is_loaded(
    address: str,
    complaint: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert complaint in refusal(capsys, explain.main, command(shards, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("listener", "complaint"),
    [(b"", "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no Ray cluster; a cluster's port is 6379 by default")],
    indirect=["listener"],
    ids=["silent", "web"],
)
def test_a_server_that_is_no_cluster(
    listener: int,
    complaint: str,
    shards: Path,
    local_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert 2 * cluster.ANSWER_SECONDS < 15
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener}")
    images = ["--images", str(shards), "--clip", "demo", "--out", str(tmp_path / "run")]
    trained = ["--embeddings", str(local_run), "--latents", "96", "--workers", "1", "--out", str(tmp_path / "sae")]
    for main, argv in ((explain.main, command(shards, tmp_path / "run")), (embed.main, images), (train.main, trained)):
        assert complaint in refusal(capsys, main, argv)
    assert list(tmp_path.iterdir()) == []


def test_an_index_on_a_dead_cluster(
    local_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not this process has a Ray of its own."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    again = ["--run", str(local_run), "--segments", "2", "--rebuild"]
    assert "no cluster answers there" in refusal(capsys, index.main, again)


@pytest.mark.usefixtures("ray_session")
def test_a_living_cluster_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    cluster.check_answers()


# ---- In this process, or on Ray.


def chosen(monkeypatch: pytest.MonkeyPatch, shards: Path, *flags: str) -> Pool:
    """The pool of a command, with a Ray that takes no time to start."""
    on_ray = Pool(2, "cpu", 1.0, 0.0, 1, on_ray=True)
    monkeypatch.setattr(cluster, "make_pool", lambda wishes, wait_minutes: on_ray)
    monkeypatch.setattr(cluster, "nodes", list)
    arguments = collection.Arguments(
        out=str(shards / "no run"),
        images=(str(shards),),
        local="--local" in flags,
        ray="--ray" in flags,
        replicas=2 if "--replicas" in flags else 0,
        limit=20 if "--limit" in flags else 0,
    )
    return collection.make_pool(arguments, collection.Inputs(arguments, arguments.images), 150528)


def test_few_images_stay_in_this_process_unless_told_otherwise(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = chosen(monkeypatch, shards)
    assert not pool.on_ray
    assert pool.why.startswith(f"in this process: {N_SCENES} images")
    assert "--ray" in pool.why
    for flag in ("--ray", "--replicas"):
        assert chosen(monkeypatch, shards, flag).on_ray
        assert chosen(monkeypatch, shards, flag).why == ""
    assert chosen(monkeypatch, shards, "--local").why == ""
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        assert chosen(monkeypatch, shards).on_ray
        assert not chosen(monkeypatch, shards, "--local").on_ray
    monkeypatch.setattr(collection, "SMALL_IMAGES", N_SCENES - 1)
    pool = chosen(monkeypatch, shards)
    assert pool.on_ray
    assert pool.why.startswith("on Ray: ")
    assert "--local" in pool.why
    assert not chosen(monkeypatch, shards, "--limit").on_ray


def test_many_bytes_go_on_ray_without_a_plan(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plan may take long; a limit of few images needs only the first shards'."""
    monkeypatch.setattr(collection, "SMALL_BYTES", sum(shard.bytes for shard in list_shards([str(shards)])) - 1)
    assert not chosen(monkeypatch, shards, "--limit").on_ray
    monkeypatch.setattr(collection, "plan_chunks", lambda *given: pytest.fail("the plan was made"))
    assert chosen(monkeypatch, shards).on_ray


def test_the_choice_is_said_and_changes_no_row(
    ray_session: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    local_run: Path,
    tmp_path: Path,
) -> None:
    for name, small in (("here", N_SCENES), ("ray", N_SCENES - 1)):
        monkeypatch.setattr(collection, "SMALL_IMAGES", small)
        assert explain.main(command(shards, tmp_path / name)) == 0
        assert len(re.findall(r"^(in this process|on Ray): .*--(local|ray)", capsys.readouterr().out, re.M)) == 1
        assert_same_rows(tmp_path / name, local_run)
        record, expected = (json.loads((run / "run.json").read_text()) for run in (tmp_path / name, local_run))
        assert record["fingerprint"] == expected["fingerprint"]
    assert explain.main(command(shards, tmp_path / "here")) == 0
    assert "in this process" not in capsys.readouterr().out  # it is complete


@pytest.mark.parametrize(
    "flags", [["--local", "--ray"], ["--local", "--replicas", "2"], ["--local", "--gpus-per-replica", "1"]]
)
def test_flags_that_contradict_each_other(
    flags: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available() and "--gpus-per-replica" in flags:
        pytest.skip("there is a GPU here")
    assert flags[1] in mistake(explain.main, command(shards, tmp_path / "run", *flags), capsys)

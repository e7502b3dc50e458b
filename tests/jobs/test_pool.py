"""How replicas are laid over the nodes of a cluster, and that no command starts Ray before its arguments are checked."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster, collection, embed, explain, index, train
from jobs.pool import LackError, Node, Pool, Wishes, crowded, decode_memory, divided
from tests.conftest import command
from tests.helpers.mistakes import mistake

ONE = [Node(16)]
"""A machine of 16 CPUs."""


@pytest.mark.parametrize(
    ("wishes", "nodes", "pool"),
    [
        # (replicas, GPUs of each, least), nodes of (CPUs, GPUs), (replicas, device, CPUs each, GPUs each, threads)
        ((0, -1), [Node(16, 4)], (4, "cuda", 1, 1, 0)),
        ((2, -1), [Node(16, 4)], (2, "cuda", 1, 1, 0)),
        ((0, 0.5), [Node(16, 2)], (4, "cuda", 1, 0.5, 0)),
        ((0, 0.3), [Node(16, 1)], (3, "cuda", 1, 0.3, 0)),
        ((0, 2), [Node(16, 5)], (2, "cuda", 1, 2, 0)),
        ((0, 0.1), [Node(16, 1)], (10, "cuda", 1, 0.1, 0)),
        ((0, 0.6), [Node(16, 2)], (2, "cuda", 1, 0.6, 0)),  # not 3: no GPU has room for a second
        ((4, 0.4), [Node(16, 2)], (4, "cuda", 1, 0.4, 0)),
        ((0, 2), [Node(16, 3), Node(16, 3)], (2, "cuda", 1, 2, 0)),  # not 3: none lies on two nodes
        ((0, -1), [Node(8), Node(8), Node(4, 2), Node(8, 1)], (3, "cuda", 1, 1, 0)),
        ((0, -1), [Node(32), Node(2, 8)], (2, "cuda", 1, 1, 0)),  # a CPU for each on the node of its GPU
        ((8, 1, 2), [Node(8), Node(4, 2)], (8, "cuda", 1, 1, 0)),  # the others come with their nodes
        ((8, -1, 1), [Node(4, 1)], (8, "cuda", 1, 1, 0)),
        ((0, 0), [Node(16, 4)], (1, "cpu", 14, 0, 16)),
        ((0, -1), ONE, (1, "cpu", 14, 0, 16)),
        ((3, -1), ONE, (3, "cpu", 4, 0, 5)),
        ((0, -1), [Node(2)], (1, "cpu", 1, 0, 2)),
        ((0, -1), [Node(8)] * 64, (64, "cpu", 7, 0, 8)),
        ((16, -1), [Node(8)] * 64, (16, "cpu", 7, 0, 8)),
        ((128, -1), [Node(8)] * 64, (128, "cpu", 3, 0, 4)),
        ((0, -1), [Node(1), Node(8), Node(8)], (2, "cpu", 7, 0, 8)),  # a head that only schedules
        ((0, -1), [Node(4), Node(64)], (1, "cpu", 56, 0, 64)),
        ((0, -1), [Node(1), Node(1)], (1, "cpu", 1, 0, 2)),
    ],
)
def test_a_cluster_is_divided(wishes: tuple[Any, ...], nodes: list[Node], pool: tuple[Any, ...]) -> None:
    made = divided(Wishes(*wishes), nodes)
    assert made[:5] == pool
    assert made.on_ray


@pytest.mark.parametrize(
    ("wishes", "nodes", "sentence"),
    [
        ((0, 1), ONE, "1 replicas of 1 GPUs need more than the 0 GPUs of this cluster, which carry 0"),
        ((3, -1), [Node(16, 2)], "3 replicas of 1 GPUs need more than the 2 GPUs"),
        ((3, 0.6), [Node(16, 2)], "3 replicas of 0.6 GPUs need more than the 2 GPUs of this cluster, which carry 2"),
        ((0, 2), [Node(16, 1)], "1 replicas of 2 GPUs need more than the 1 GPUs"),
        ((3, 2), [Node(16, 3), Node(16, 3)], "than the 6 GPUs of this cluster on 2 nodes, which carry 2"),
        ((3, -1), [Node(16), Node(2, 4)], "take a CPU each on the node of their GPU, and the CPUs there suffice for 2"),
        ((0, -1), [Node(4, 4)], "4 replicas of 1 CPUs leave none of the cluster's 4 CPUs"),
        ((2, -1), [Node(2)], "2 replicas of 1 CPUs leave none of the cluster's 2 CPUs"),
        ((8, 1, 3), [Node(8, 2)], "3 replicas of 1 GPUs need more than the 2 GPUs"),
    ],
)
def test_what_a_cluster_does_not_carry(wishes: tuple[Any, ...], nodes: list[Node], sentence: str) -> None:
    with pytest.raises(LackError, match=sentence):
        divided(Wishes(*wishes), nodes)


def placed(pool: Pool, nodes: list[Node]) -> bool:
    """Whether Ray could place all replicas and a task of one CPU besides, one after the other: GPU by GPU, node by node."""
    cpus = [float(node.cpus) for node in nodes]
    gpus = [[1.0] * int(node.gpus) for node in nodes]
    for _ in range(pool.replicas):
        for place, free in enumerate(gpus):
            share = pool.gpus_per_replica
            fit = [gpu for gpu, left in enumerate(free) if left >= min(share, 1) - 1e-9]
            needed = int(max(share, 1)) if share else 0
            if cpus[place] >= pool.cpus_per_replica and len(fit) >= needed:
                cpus[place] -= pool.cpus_per_replica
                for gpu in fit[:needed]:
                    free[gpu] -= min(share, 1)
                break
        else:
            return False
    return any(left >= 1 for left in cpus)


def test_what_is_divided_can_be_placed() -> None:
    """Also that no more fits, where the user leaves the number open: one replica more could not be placed."""
    chance, made = random.Random(0), 0
    for _ in range(400):
        nodes = [
            Node(chance.choice([1, 2, 4, 8, 48]), chance.choice([0, 0, 1, 3, 8])) for _ in range(chance.randint(1, 5))
        ]
        wishes = Wishes(chance.choice([0, 0, 1, 3, 7]), chance.choice([-1, 0, 0.25, 0.34, 0.5, 0.7, 1, 2, 3]))
        try:
            pool = divided(wishes, nodes)
        except LackError:
            continue
        made += 1
        assert placed(pool, nodes), (wishes, nodes, pool)
        if not wishes.replicas and pool.gpus_per_replica:
            assert not placed(pool._replace(replicas=pool.replicas + 1), nodes), (wishes, nodes, pool)
    assert made > 200


@pytest.mark.parametrize(
    ("nodes", "chunk_size", "sentence"),
    [
        ([Node(8, object_store=4 * 512 * 150528)], 512, ""),  # 512 images at 224: 77 MB
        ([Node(8, object_store=4 * 512 * 150528 - 1)], 512, "77 MB, and the object store of a node has 308 MB"),
        ([Node(8, object_store=4 * 512 * 150528 - 1)], 512, "--chunk-size 511 fits, or a store of 0.3 GB"),
        ([Node(8, object_store=10**10), Node(1, object_store=10**8)], 512, "has 100 MB"),
        ([Node(8, object_store=10**10), Node(0, object_store=10**8)], 512, ""),  # a head on which nothing runs
        ([Node(8)], 10**6, ""),  # nothing is known
    ],
)
def test_chunks_that_are_too_large_for_a_store(nodes: list[Node], chunk_size: int, sentence: str) -> None:
    said = crowded(nodes, chunk_size, image_bytes=150528)
    assert sentence in said
    assert bool(said) == bool(sentence)


@pytest.mark.parametrize(
    ("nodes", "images", "mib"),
    [
        ([], 512, 512),
        ([Node(4, memory=16 << 30)], 512, 512),
        ([Node(4, memory=16 << 30)], 4096, 64 + 2 * 588),  # 147 KiB an image at 224
        ([Node(4, memory=16 << 30), Node(2, memory=1 << 30), Node(0, memory=1 << 20)], 4096, 1024),
    ],
)
def test_memory_asked_for_to_decode_a_chunk(nodes: list[Node], images: int, mib: int) -> None:
    assert decode_memory(nodes, images, image_bytes=150528) == mib << 20


# ---- What is told before Ray starts.

MISTAKES = {
    "--gpus-per-replica 1.5": "--gpus-per-replica 1.5: above 1, Ray gives whole GPUs only",
    "--gpus-per-replica -2": "--gpus-per-replica -2: must be at least 0",
    "--replicas 2 --min-replicas 3": "--min-replicas 3: is more than --replicas 2",
    "--min-replicas -1": "--min-replicas -1: must be at least 0",
    "--wait-minutes -1": "--wait-minutes -1",
    "--gpus-per-replica 0 --replicas 4 --min-replicas 2": "is for replicas with GPUs",
    "--k 99": "--k 99",
    "--clip nowhere/model": "--clip nowhere/model",
    "--images nowhere": "--images nowhere",
    "--method magic": "--method",
}
"""Flags of explain -> what is said of them."""


def test_no_mistake_starts_ray(
    shards: Path,
    local_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command that uses Ray, with what it can only know after it has loaded something."""
    monkeypatch.setattr(cluster, "connect", lambda replicas: pytest.fail("Ray was asked for"))
    (tmp_path / "file").write_text("in the way")
    images, out = ["--images", str(shards), "--clip", "demo", "--ray"], str(local_run)
    columns = ["--image-column", "nothing", "--images", str(next(local_run.glob("images/*.parquet")))]
    told: list[tuple[Callable[[list[str]], int], list[str], str]] = [
        (explain.main, command(shards, local_run, "--ray", "--k", "3"), "k was"),
        (explain.main, command(shards, local_run, "--ray", "--limit", "3"), "limit was"),
        (explain.main, command(shards, tmp_path / "run", "--ray", *columns), "--image-column nothing"),
        (explain.main, command(shards, tmp_path / "file", "--ray"), "--out"),
        (embed.main, [*images, "--out", out], "holds an 'explain' run"),
        (index.main, ["--run", str(tmp_path), "--segments", "2"], "run"),
        (index.main, ["--run", out, "--segments", "2", "--rebuild", "--scratch", str(tmp_path / "file")], "--scratch"),
        (
            train.main,
            ["--embeddings", str(tmp_path), "--latents", "96", "--workers", "2", "--out", str(tmp_path / "sae")],
            "--embeddings",
        ),
    ]
    for main, argv, sentence in told:
        assert sentence in mistake(main, argv, capsys), argv
    for flags, sentence in MISTAKES.items():
        assert sentence in mistake(explain.main, command(shards, tmp_path / "run", "--ray", *flags.split()), capsys)
    assert not (tmp_path / "run").exists()


# ---- Nodes that come on demand.


def test_only_a_cluster_at_an_address_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started here grows by no node, so what does not fit is refused at once."""
    monkeypatch.setattr(cluster, "connect", lambda replicas: None)
    monkeypatch.setattr(cluster, "nodes", lambda: ONE)
    monkeypatch.setattr(cluster, "awaited", lambda wishes, minutes, lack: pytest.fail("waited"))
    for address, minutes in ((None, 10.0), ("local", 10.0), ("127.0.0.1:6379", 0.0)):
        monkeypatch.setenv("RAY_ADDRESS", address or "")
        with pytest.raises(LackError, match="the 0 GPUs"):
            cluster.make_pool(Wishes(4, 1), minutes)
    waited = []
    monkeypatch.setattr(cluster, "awaited", lambda *given: waited.append(given))
    cluster.make_pool(Wishes(4, 1), 3.0)
    [(wishes, minutes, lack)] = waited
    assert (wishes, minutes) == (Wishes(4, 1), 3.0)
    assert str(lack).startswith("4 replicas of 1 GPUs need more")


@pytest.mark.usefixtures("ray_session")
def test_nodes_are_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The request goes to a real Ray, the nodes are told here: one look later there are two, and then four."""
    from ray.util import placement_group_table

    looks, wanted = itertools.count(), []

    def nodes() -> list[Node]:
        wanted.append([group for group in placement_group_table().values() if group["state"] == "PENDING"])
        return [Node(8)] + [Node(4, 2)] * min(next(looks) // 2, 2)

    monkeypatch.setattr(cluster, "nodes", nodes)
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.05)
    lack = LackError("4 replicas of 1 GPUs need more")
    assert cluster.awaited(Wishes(4, 1), 1.0, lack).replicas == 4
    assert list(wanted[-1][-1]["bundles"].values()) == [{"CPU": 1.0, "GPU": 1.0}] * 4
    said = capsys.readouterr().out
    assert "waiting for nodes, 1 minutes at most (--wait-minutes): 4 replicas of 1 GPUs need more\nnodes came" in said
    monkeypatch.setattr(cluster, "nodes", lambda: ONE)
    with pytest.raises(LackError, match=r"need more; no nodes for them came in 0\.005 minutes"):
        cluster.awaited(Wishes(4, 1), 0.005, lack)
    states = {group["state"] for group in placement_group_table().values()}
    assert states == {"REMOVED"}  # nothing is asked for any more


def test_the_wishes_of_a_command(shards: Path) -> None:
    arguments = collection.Arguments(out=str(shards / "no run"), replicas=8, gpus_per_replica=0.5, min_replicas=2)
    assert collection.wishes(arguments) == Wishes(8, 0.5, 2)

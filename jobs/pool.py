"""Where replicas run: from a list of nodes and the user's wishes to a pool. Arithmetic only, and no Ray.

A replica runs on one node, and one on a share of a GPU on one GPU. So what counts is how many replicas each node has room for:

    GPUs    floor(GPUs of the node / share), or for a share below 1 the GPUs times floor(1 / share);
            at most one for each CPU of the node, since a replica takes one CPU to feed its GPU
    CPUs    floor(CPUs for replicas / CPUs of a replica), where an eighth of the node's CPUs, at least one, is for tasks

Left out: what other jobs on the cluster hold, and where Ray puts the tasks that read and decode (jobs/cluster.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

GPU_DEVICE = "cuda"
"""The device of a replica that has a share of a GPU. Tests whose nodes only pretend to have GPUs set another."""


DEVICES = ("cpu", "cuda")
"""All devices that a replica may get."""


CHUNKS_IN_STORE = 4
"""Chunks for which a node's object store needs room: one that is decoded, one that waits, two at a replica."""


DECODE_MEMORY = 512 << 20
"""Bytes of memory that are asked for to decode a chunk, at least: more than 512 images at 224 take."""


class Node(NamedTuple):
    """What one machine of a cluster offers."""

    cpus: int
    gpus: float = 0.0
    memory: int = 0
    """Bytes that Ray gives out to tasks."""
    object_store: int = 0
    """Bytes of its object store, through which chunks travel; 0 if that is not known."""


class Wishes(NamedTuple):
    """What the user asks for."""

    replicas: int = 0
    """0 is as many as the GPUs carry, or one for each node if there is no GPU."""
    gpus_per_replica: float = -1.0
    """-1 is one GPU if there are GPUs, else none."""
    least: int = 0
    """Replicas with which the work may begin, where the others come with nodes that are started on demand; 0 is all."""

    def check(self) -> None:
        """ValueError for what contradicts itself; it begins with the name of the argument."""
        share = self.gpus_per_replica
        if share > 1 and share != int(share):
            raise ValueError(f"gpus_per_replica {share:g}: above 1, Ray gives whole GPUs only")
        if share < 0 and share != -1:
            raise ValueError(f"gpus_per_replica {share:g}: must be at least 0, or -1 for one GPU if there are GPUs")
        if self.least > self.replicas:
            raise ValueError(f"min_replicas {self.least}: is more than --replicas {self.replicas}")
        if self.least and share == 0:
            raise ValueError(f"min_replicas {self.least}: is for replicas with GPUs; omit it, or --gpus-per-replica 0")


class LackError(ValueError):
    """A cluster that is too small as it is now."""


class Pool(NamedTuple):
    """Where the replicas run."""

    replicas: int
    device: str
    """`cpu` or `cuda`."""
    cpus_per_replica: float
    gpus_per_replica: float
    threads: int
    """CPU threads of one replica's forward; 0 leaves PyTorch's choice."""
    on_ray: bool
    why: str = ""
    """A line that says where the replicas run and how to choose otherwise; empty if the user chose."""


def crowded(nodes: Sequence[Node], chunk_size: int, image_bytes: int) -> str:
    """A sentence if the pixels of a chunk are too large for the object store of a node; empty if they are not.

    Ray Data holds back tasks so that what they have made takes half of all stores together. But it lets each step work on a
    chunk whatever its size, so what counts is how many chunks the smallest store holds.
    """
    stores = [node.object_store for node in nodes if node.cpus and node.object_store]
    least, chunk = min(stores, default=0), chunk_size * image_bytes
    if not stores or chunk * CHUNKS_IN_STORE <= least:
        return ""
    fits, needed = max(1, least // CHUNKS_IN_STORE // image_bytes), CHUNKS_IN_STORE * chunk
    return (
        f"the pixels of a chunk take {chunk / 1e6:,.0f} MB, and the object store of a node has {least / 1e6:,.0f} MB: Ray "
        f"would keep chunks on the disk; a new run with --chunk-size {fits} fits, or a store of {needed / 1e9:.1f} GB"
    )


def decode_memory(nodes: Sequence[Node], images: int, image_bytes: int) -> int:
    """Bytes of memory to ask for where a chunk of so many images is decoded; never more than a node has.

    64 MiB are encoded images, and pixels are held in two copies. A large image takes more, but only one at a time on each
    machine (`saecore.images.turns`).
    """
    needed = max(DECODE_MEMORY, (64 << 20) + 2 * images * image_bytes)
    return min([needed, *(node.memory for node in nodes if node.cpus and node.memory)])


def divided(wishes: Wishes, nodes: Sequence[Node]) -> Pool:
    """As many replicas as the GPUs carry, or one on each node where there are no GPUs, unless told; `LackError` if they do
    not fit, or no CPU is left to read and decode."""
    share = share_of(wishes, nodes)
    pool = on_gpus(wishes, share, nodes) if share else on_cpus(wishes.replicas, nodes)
    cpus = sum(node.cpus for node in nodes)
    begins = wishes.least or pool.replicas
    if begins * pool.cpus_per_replica + 1 > cpus:
        raise LackError(
            f"{begins} replicas of {pool.cpus_per_replica:g} CPUs leave none of the cluster's {cpus} CPUs to read images"
        )
    return pool


def share_of(wishes: Wishes, nodes: Sequence[Node]) -> float:
    """GPUs of one replica; 0 if it runs on CPUs."""
    if wishes.gpus_per_replica >= 0:
        return wishes.gpus_per_replica
    return 1.0 if wishes.least or any(node.gpus >= 1 for node in nodes) else 0.0


def on_gpus(wishes: Wishes, share: float, nodes: Sequence[Node]) -> Pool:
    """Replicas with a share of a GPU each."""
    most = sum(min(room(share, node.gpus), node.cpus) for node in nodes)
    replicas = wishes.replicas or max(most, 1)
    begins = wishes.least or replicas
    if begins > most:
        gpus = sum(node.gpus for node in nodes)
        carried = sum(room(share, node.gpus) for node in nodes)
        if begins > carried:
            split = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
            raise LackError(
                f"{begins} replicas of {share:g} GPUs need more than the {gpus:g} GPUs of this cluster{split}, "
                f"which carry {carried}"
            )
        raise LackError(
            f"{begins} replicas of {share:g} GPUs take a CPU each on the node of their GPU, "
            f"and the CPUs there suffice for {most}"
        )
    return Pool(replicas, GPU_DEVICE, 1.0, share, 0, True)


def room(share: float, gpus: float) -> int:
    """How many replicas with a share of a GPU fit on a node of so many GPUs; a share below 1 lies on one GPU."""
    # Rounded, since shares are no exact binary fractions.
    return int(gpus) * int(round(1 / share, 6)) if share < 1 else int(gpus / share)


def on_cpus(replicas: int, nodes: Sequence[Node]) -> Pool:
    """Replicas without a GPU.

    One for each node unless told: the threads of one forward share one copy of the models, and a second copy would take memory.
    On unequal nodes, a replica is as large as makes the replicas hold the most CPUs; smaller nodes then only read and decode.
    """
    # An eighth of the CPUs, at least one, is left to read and decode: a guess, not a measurement.
    free = [max(0, node.cpus - max(1, node.cpus // 8)) for node in nodes]
    if not replicas:
        sizes = sorted({cpus for cpus in free if cpus} or {1})
        each = max(sizes, key=lambda size: (size * sum(cpus >= size for cpus in free), size))
        replicas = max(1, sum(cpus >= each for cpus in free))
    else:
        fitting = (
            size for size in range(max(free, default=0), 0, -1) if sum(cpus // size for cpus in free) >= replicas
        )
        each = next(fitting, 1)
    hosts = [(node.cpus, cpus // each) for node, cpus in zip(nodes, free, strict=True) if cpus >= each]
    hosts = hosts or [(sum(node.cpus for node in nodes), replicas)]
    # Also the CPUs that are left for tasks: most of the time, none of them works.
    threads = min(max(1, cpus // min(rooms, replicas)) for cpus, rooms in hosts)
    return Pool(replicas, "cpu", float(each), 0.0, threads, True)

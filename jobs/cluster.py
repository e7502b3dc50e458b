"""Ray around a job: the cluster that it joins or starts, the pool of replicas, the record of images that end their worker."""

import logging
import os
import socket
from typing import Any, NamedTuple

from saecore.pipeline.isolation import Suspects, Work

from . import signals

ANSWER_SECONDS = 5.0
"""Seconds to wait for a connection, and again for a greeting, before a cluster counts as gone. Ray waits for two minutes."""

CLIENT = "ray://"
"""Prefix of the address of a cluster that is joined from outside."""

SETTINGS = b"\x04"
"""The type of the frame with which HTTP/2 begins."""


taken = False
"""Whether `connect` has joined or started Ray for this process."""


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


def here(gpus_per_replica: float) -> Pool:
    """One replica in this process. ValueError if a GPU is asked for and there is none."""
    import torch

    if gpus_per_replica > 0 and not torch.cuda.is_available():
        raise ValueError(f"--gpus-per-replica {gpus_per_replica:g}: there is no GPU on this machine")
    return Pool(1, "cuda" if torch.cuda.is_available() and gpus_per_replica else "cpu", 0.0, 0.0, 0, False)


def make_pool(replicas: int, gpus_per_replica: float) -> Pool:
    """Replicas on Ray, which is joined or started. ValueError if they do not fit."""
    connect(replicas or 1)
    import ray

    resources = ray.cluster_resources()
    return divided(replicas, gpus_per_replica, int(resources.get("CPU", 0)), resources.get("GPU", 0.0))


def divided(replicas: int, gpus_per_replica: float, cpus: int, gpus: float) -> Pool:
    """A cluster of so many CPUs and GPUs as a pool: as many replicas as the GPUs carry, or one on the CPU, unless told.

    ValueError if the GPUs do not suffice, or no CPU is left to read, decode and write. Left out: on which nodes they are.
    """
    share = gpus_per_replica if gpus_per_replica >= 0 else (1.0 if gpus else 0.0)
    if share:
        # A replica with a share of a GPU cannot have parts of two; rounded, since shares are no exact binary fractions.
        most = int(gpus) * int(round(1 / share, 6)) if share < 1 else int(gpus / share)
        wanted = replicas or most
        if not 1 <= wanted <= most:
            raise ValueError(
                f"{max(wanted, 1)} replicas of {share:g} GPUs need more than the {gpus:g} GPUs of this cluster"
            )
        cpus_each, threads, device = 1.0, 0, "cuda"
    else:
        wanted = replicas or 1
        # An eighth of the CPUs, at least one, is left to read, decode and write: a guess, not a measurement.
        cpus_each = float(max(1, (cpus - max(1, cpus // 8)) // wanted))
        threads, device = max(1, cpus // wanted), "cpu"
    if wanted * cpus_each + 1 > cpus:
        raise ValueError(
            f"{wanted} replicas of {cpus_each:g} CPUs leave none of the cluster's {cpus} CPUs to read images"
        )
    return Pool(wanted, device, cpus_each, share, threads, True)


def connect(replicas: int) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS, set by `ray job submit`), or start Ray on this machine.

    ValueError, within seconds, if there is no such cluster. A process that uses Ray already goes on with its Ray.
    """
    global taken
    import ray

    if ray.is_initialized():
        return
    check_answers()
    # Ray 2.60 warns of a coming default for GPU visibility in tasks without GPUs; ours is that coming default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    with signals.kept():
        if address := asked_for():
            try:
                ray.init(address=address, **quiet)
            except (
                OSError,
                RuntimeError,
                SystemExit,
            ) as error:  # SystemExit: the cluster's first processes stay silent
                raise ValueError(f"RAY_ADDRESS={address} cannot be joined: {' '.join(str(error).split())}") from error
        else:
            # A replica holds a CPU for its whole life: on a machine of one core the tasks would wait for ever.
            cpus = max(os.cpu_count() or 1, replicas + 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    taken = True


def leave() -> None:
    """Leave the cluster that `connect` joined, or end the Ray that `connect` started. A Ray that was there before goes on."""
    global taken
    if taken:
        import ray

        ray.shutdown()
        taken = False


def asked_for() -> str:
    """The cluster that RAY_ADDRESS names; "" if Ray, where it is needed, is started on this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def check_answers() -> None:
    """ValueError if RAY_ADDRESS is set and nothing that may be a Ray cluster answers there; takes at most 10 s.

    Ray speaks gRPC, whose servers greet with a SETTINGS frame of HTTP/2 (RFC 9113, section 3.4) before they know who asks.
    """
    address = asked_for()
    if not address:
        return
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS={address} is a dashboard's, for `ray job submit`: a job joins a cluster at HOST:6379; unset it to "
            "start Ray on this machine"
        )
    from ray._private.services import canonicalize_bootstrap_address  # what Ray will really connect to

    try:
        place = address[len(CLIENT) :] if address.startswith(CLIENT) else canonicalize_bootstrap_address(address)
        host, _, port = place.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            greeting = b"" if encrypted() else _greeting(connection)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: no cluster answers there ({' '.join(str(error).split())}); unset it to start Ray on this "
            "machine"
        ) from error
    if not encrypted() and greeting[3:4] != SETTINGS:
        raise ValueError(
            f"RAY_ADDRESS={address}: what answers there is no Ray cluster; a cluster's port is 6379 by default"
        )


def encrypted() -> bool:
    """Whether Ray greets only after a TLS handshake; `check_answers` then only asks whether somebody listens."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _greeting(connection: socket.socket) -> bytes:
    """The head of the first frame that an HTTP/2 server sends; fewer bytes if the server ends the connection."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5))
    head = b""
    while len(head) < 9 and (more := connection.recv(9 - len(head))):
        head += more
    return head


class RemoteSuspects:
    """The `Witness` that workers on Ray talk to: a `saecore.pipeline.isolation.Suspects` in an actor of its own."""

    def __init__(self) -> None:
        import ray

        # num_cpus=0: the actor only counts, and must never wait for a CPU.
        self._actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Suspects).remote()

    def begin(self, step: str, chunk_id: int, n_images: int) -> Work:
        """See `Suspects.begin`."""
        return _answer(self._actor.begin.remote(step, chunk_id, n_images))

    def enter(self, step: str, chunk_id: int, start: int, end: int) -> None:
        """See `Suspects.enter`. Waits for the answer: the entry must be noted before the worker can die of the image."""
        _answer(self._actor.enter.remote(step, chunk_id, start, end))

    def done(self, step: str, chunk_id: int) -> None:
        """See `Suspects.done`."""
        _answer(self._actor.done.remote(step, chunk_id))


def _answer(reference: Any) -> Any:
    import ray

    return ray.get(reference)

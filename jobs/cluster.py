"""Ray around a job: joining or starting it, asking what its nodes offer, the record of images that end their worker.

From the top: the pool of a job; joining and leaving; the record. Left out: how replicas are laid over nodes (`jobs.pool`).
"""

import contextlib
import logging
import os
import socket
import time
from typing import Any

from saecore.pipeline.isolation import Suspects, Work

from . import head, signals
from .pool import LackError, Node, Pool, Wishes, divided, share_of

ANSWER_SECONDS = 5.0
"""Seconds to wait for a connection, and again for a greeting, before a cluster counts as gone. Ray waits for two minutes."""

LOOK_SECONDS = 1.0
"""Seconds between two looks at which nodes have come."""

CLIENT = "ray://"
"""Prefix of the address of a cluster that is joined from outside."""

SETTINGS = b"\x04"
"""The type of the frame with which HTTP/2 begins."""


taken = False
"""Whether `connect` has joined or started Ray for this process."""


def here(gpus_per_replica: float) -> Pool:
    """One replica in this process. ValueError if a GPU is asked for and there is none."""
    import torch

    if gpus_per_replica > 0 and not torch.cuda.is_available():
        raise ValueError(f"--gpus-per-replica {gpus_per_replica:g}: there is no GPU on this machine")
    return Pool(1, "cuda" if torch.cuda.is_available() and gpus_per_replica else "cpu", 0.0, 0.0, 0, False)


def make_pool(wishes: Wishes, wait_minutes: float) -> Pool:
    """Replicas on Ray, which is joined or started. ValueError if they do not fit.

    A cluster at an address may start nodes on demand, so what it lacks is asked for and waited for.
    """
    connect(wishes.replicas or 1)
    try:
        return divided(wishes, nodes())
    except LackError as lack:
        if not (asked_for() and wait_minutes):
            raise
        return awaited(wishes, wait_minutes, lack)


def nodes() -> list[Node]:
    """What each living node of the cluster offers."""
    import ray

    offers = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        Node(
            int(offer.get("CPU", 0)),
            offer.get("GPU", 0.0),
            int(offer.get("memory", 0)),
            int(offer.get("object_store_memory", 0)),
        )
        for offer in offers
    ]


def awaited(wishes: Wishes, minutes: float, lack: LackError) -> Pool:
    """The pool once the nodes for it have come; `LackError` if they have not within so many minutes.

    A placement group says to the cluster's autoscaler what is needed. It ends with this process, however that ends, where a
    standing request (`ray.autoscaler.sdk.request_resources`) would keep nodes running for nobody.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    print(f"waiting for nodes, {minutes:g} minutes at most (--wait-minutes): {lack}", flush=True)
    share = share_of(wishes, nodes())
    bundle = {"CPU": 1.0} | ({"GPU": share} if share else {})
    began, request = time.monotonic(), placement_group([bundle] * (wishes.least or wishes.replicas or 1))
    try:
        while time.monotonic() - began < 60 * minutes:
            time.sleep(LOOK_SECONDS)
            with contextlib.suppress(LackError):
                pool = divided(wishes, nodes())
                print(f"nodes came after {time.monotonic() - began:.0f} s", flush=True)
                return pool
    finally:
        remove_placement_group(request)
    raise LackError(f"{lack}; no nodes for them came in {minutes:g} minutes")


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
            head.watch()
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

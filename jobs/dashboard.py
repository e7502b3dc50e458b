"""The dashboard of a Ray cluster, which takes jobs: find it, follow a job there, stop it.

The talking is Ray's `JobSubmissionClient`. Here is what it leaves open: a limit on waiting, one sentence for what a user can
mend, the token where the cluster asks for one, a log that survives a lost connection, and the exit code of a job.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import json
import logging
import os
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from . import exits

ANSWER_SECONDS = 10.0
"""Seconds to wait for a dashboard to answer. Ray's client would wait for as long as the system does, which is minutes."""

NODE_ATTEMPTS = 3
"""How often a cluster is asked for its nodes."""

SILENT_SECONDS = 60.0
"""Seconds without a line after which the log is asked for anew: a connection may be dead without an end. Progress lines of
commands are 10 seconds apart."""

LOST_SECONDS = 600.0
"""Seconds without any answer after which following a job is given up. A dashboard that is started again is back within them."""

STOP_SECONDS = 60
"""Seconds that a job which is stopped has for ending in good order. Ray kills it after 3 seconds if nothing else is said."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts to reach a dashboard again, at most; the first pause is one second."""

PORT = 8265
"""Ray's default."""


class LostError(Exception):
    """A job can no longer be followed; str() says why, as the end of a sentence."""


def address_of(given: str) -> str:
    """The dashboard's address: as given, or of the environment as `ray job submit` reads it, or this machine's own.

    ValueError for an address at which only jobs themselves can join a cluster.
    """
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    told = [(f"{name}=", os.environ[name]) for name in names if os.environ.get(name)]
    source, address = ("--address ", given) if given else (*told, ("", "local"))[0]
    if address in ("auto", "local"):
        return f"http://127.0.0.1:{PORT}"
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"{source}{address}: jobs are taken by a cluster's dashboard; write http://HOST:{PORT}")
    try:
        if not urlsplit(address).hostname or urlsplit(address).port == 0:
            raise ValueError("it names no host")
    except ValueError as error:
        raise ValueError(f"{source}{without_secrets(address)} is no address ({error})") from error
    return address.rstrip("/")


def without_secrets(address: str) -> str:
    """An address without a user's name and password, and without a query."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


# ---- Find the cluster.


def connect(address: str) -> Any:
    """A `JobSubmissionClient` of the cluster, which has answered; ValueError, in one sentence, if there is none.

    Where the cluster asks for a token, Ray finds it in the places that it documents. To be called before Ray is imported, since
    Ray reads its settings once.
    """
    if importlib.util.find_spec("aiohttp") is None:
        version = importlib.metadata.version("ray")
        raise ValueError(f"Ray is installed without its job client: pip install 'ray[default]=={version}'")
    headers = _headers()
    os.environ["RAY_AUTH_MODE"] = "token" if asks_for_token(address, headers) else "disabled"
    # Ray's client prefers these variables to the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.WARNING)  # the client reports each of its steps
    shown = without_secrets(address)
    try:
        return JobSubmissionClient(address, headers=headers)
    except RayError as error:  # an AuthenticationError, which older versions do not have
        if "Authentication failed" in str(error):  # Ray's words for status 403
            raise ValueError(
                f"{shown} refuses the token of {token_place()}; `ray get-auth-token` on the cluster's head prints the right one"
            ) from error
        raise ValueError(
            f"{shown} asks for a token, and {token_place()} holds none; `ray get-auth-token` on the cluster's head prints it, "
            "and ~/.ray/auth_token or RAY_AUTH_TOKEN is where it belongs on this machine"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{shown} takes no jobs: {reason(error)}") from error


def asks_for_token(address: str, headers: dict[str, str]) -> bool:
    """Whether a cluster answers only to those who know its token; ValueError if no cluster answers within `ANSWER_SECONDS`."""
    import requests  # what Ray's client uses: one way to certificates and proxies for both

    shown = without_secrets(address)
    try:
        answer = requests.get(f"{address}/api/version", headers=headers, timeout=ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shown}: no cluster answers there ({reason(error)}); --address takes the address of its dashboard, "
            f"http://HOST:{PORT}"
        ) from error
    if answer.status_code in (401, 403):
        return True
    with contextlib.suppress(ValueError, TypeError):
        if answer.ok and "ray_version" in answer.json():
            return False
    raise ValueError(
        f"{shown}: what answers there is no dashboard of Ray (status {answer.status_code}); its port is {PORT} by default"
    )


def token_place() -> str:
    """Where Ray looks for the token, in its order. Never the token itself."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return "the file of RAY_AUTH_TOKEN_PATH" if os.environ.get("RAY_AUTH_TOKEN_PATH") else "~/.ray/auth_token"


def _headers() -> dict[str, str]:
    """Further headers, which a proxy before the cluster may want, as `ray job submit` takes them."""
    given = os.environ.get("RAY_JOB_HEADERS", "{}")
    try:
        return {str(name): str(value) for name, value in json.loads(given).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError('RAY_JOB_HEADERS is no JSON object like {"NAME": "VALUE"}') from error


def reason(error: BaseException) -> str:
    """What the system says, in a few words: sentences of `requests` hold objects of Python."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if "Timeout" in type(error).__name__:
        return f"no answer in {ANSWER_SECONDS:g} s"
    return " ".join(str(error).split())[:300]


def is_here(address: str) -> bool:
    """Whether all nodes of the cluster are this machine, so that paths mean the same there.

    The dashboard's address does not tell: a port that is forwarded makes a cluster far away answer on this machine.
    """
    for _ in range(NODE_ATTEMPTS):
        if nodes := _node_ips(address):
            return all(map(_is_own, nodes))
        time.sleep(1)  # a head that has just started knows of no node, and a busy one answers late
    return False


def _node_ips(address: str) -> set[str]:
    """The addresses of the dashboard and of all nodes; empty if they are not known."""
    from ray.util.state import list_nodes

    try:
        host = urlsplit(address).hostname or ""
        ours = {str(place[4][0]) for place in socket.getaddrinfo(host, None)}
        nodes = list_nodes(
            address=address,
            filters=[("state", "=", "ALIVE")],
            limit=10_000,
            timeout=int(ANSWER_SECONDS),
            raise_on_missing_output=False,
        )
    except Exception:  # an older Ray, a proxy that lets only the jobs' addresses through: nothing is known
        return set()
    return ours | {node.node_ip for node in nodes} if nodes else set()


def _is_own(ip: str) -> bool:
    """Whether an IP address belongs to this machine: only then can a socket be bound to it."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(ip.partition("%")[0]).version == 6 else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except (OSError, ValueError):
        return False
    return True


# ---- Follow a job, stop it.


class Log:
    """A job's log, each character of it printed once."""

    def __init__(self) -> None:
        self.printed = 0
        """Characters so far."""

    def add(self, text: str, position: int = 0) -> None:
        """Print what is new in a piece of the log that begins at a position."""
        sys.stdout.write(text[max(0, self.printed - position) :])
        sys.stdout.flush()
        self.printed = max(self.printed, position + len(text))

    async def show(self, client: Any, job: str) -> None:
        """Print what is new until the server ends the log, which it does with the job. The server starts at the beginning."""
        position = 0
        async with contextlib.aclosing(client.tail_job_logs(job)) as stream:
            while (text := await asyncio.wait_for(anext(stream, None), SILENT_SECONDS)) is not None:
                self.add(text, position)
                position += len(text)


def follow(client: Any, job: str, patience: float = LOST_SECONDS, first_pause: float = 1.0) -> int:
    """Print a job's log until the job ends; its exit code. `LostError` if the cluster is silent for so long, or forgot the job.

    Where the connection over which a log comes line by line is lost, or a proxy does not let it through, the whole log is asked
    for. `first_pause` seconds lie between the first two attempts.
    """
    import aiohttp

    log, pause, answered = Log(), first_pause, time.monotonic()
    while True:
        before, is_whole = log.printed, False
        with contextlib.suppress(OSError, RuntimeError, asyncio.TimeoutError, aiohttp.ClientError):
            asyncio.run(log.show(client, job))
            is_whole = True
        if is_whole or log.printed > before:
            pause, answered = first_pause, time.monotonic()
        try:
            details = client.get_job_info(job)  # before the log: of a job that has ended, the log is then complete
            if not is_whole:
                log.add(client.get_job_logs(job))
        except (OSError, RuntimeError) as error:
            if forgotten := unknown(error):
                raise LostError(forgotten) from error
            if time.monotonic() - answered > patience:
                raise LostError(f"the cluster has not answered for {patience:g} s ({reason(error)})") from error
            print(f"no answer ({reason(error)}); asking again in {pause:g} s", file=sys.stderr, flush=True)
        else:
            answered = time.monotonic()
            if details.status.is_terminal():
                return exit_code(details)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def exit_code(details: Any) -> int:
    """The exit code of a job that has ended: the command's own; 143 if the job was stopped, 1 if the command never ran."""
    if details.status.value == "SUCCEEDED":
        return exits.COMPLETE
    if details.status.value == "STOPPED":
        print("the job was stopped", file=sys.stderr)
        return exits.TERMINATED
    if details.driver_exit_code is None:
        print(f"failed: {' '.join((details.message or 'Ray does not say why').split())}", file=sys.stderr)
        return exits.FAULT
    code = int(details.driver_exit_code)
    return code if code >= 0 else 128 - code


def stop(client: Any, job: str) -> bool:
    """Ask a job to end, and wait until it has; False if it had ended before. ValueError if there is no such job."""
    try:
        if not client.stop_job(job):
            return False
        deadline = time.monotonic() + STOP_SECONDS + ANSWER_SECONDS
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{job} cannot be stopped: {unknown(error) or reason(error)}") from error
    return True


def check_known(client: Any, job: str) -> None:
    """ValueError if the cluster knows no such job."""
    try:
        client.get_job_info(job)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{job} cannot be followed: {unknown(error) or reason(error)}") from error


def unknown(error: BaseException) -> str:
    """The end of a sentence if a cluster answers that there is no such job; nothing else."""
    return "the cluster knows no such job" if "404" in str(error) else ""

"""A command that is taken to a real cluster of one machine, which asks for a token: what arrives and what comes back.

The cluster is `ray start --head` with a home, ports and a folder of its own. Nothing of it is shared with other tests.
"""

import contextlib
import dataclasses
import http.server
import importlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import jobs.__main__ as relmap
from jobs import dashboard, order, origin, submit
from tests.conftest import command
from tests.helpers.mistakes import mistake
from tests.jobs.test_jobs import assert_same_rows, descendants
from tests.test_layout import ROOT

TOKEN = "5ec9e7" * 10
SECRET = "a-value-that-nobody-may-read"


class Head(NamedTuple):
    """A cluster, and the environment in which its user types commands."""

    address: str
    env: dict[str, str]
    folder: Path

    def submit(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`relmap submit` in a process of its own."""
        line = [sys.executable, "-m", "jobs.submit", "--address", self.address, *words]
        env = self.env | more
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` as its documentation has it: with a token, which lies in the user's home."""
    folder = Path(tempfile.mkdtemp(prefix="relmap-", dir="/tmp"))  # short: sockets lie in it
    (folder / "home" / ".ray").mkdir(parents=True)
    (folder / "home" / ".ray" / "auth_token").write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RELMAP_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = kept | {"HOME": str(folder / "home"), "PATH": path, "OMP_NUM_THREADS": "1"}
    ports = free_ports(5)
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    words = [word for name, port in zip(names, ports, strict=True) for word in (f"--{name}", str(port))]
    line = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", str(folder / "ray"), *words]
    line += [
        "--num-cpus",
        "2",
        "--object-store-memory",
        "200000000",
        "--min-worker-port",
        "0",
        "--max-worker-port",
        "0",
    ]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(line, env=env, stdout=said, stderr=said, cwd=folder)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        deadline = time.monotonic() + 60
        while not answers(address):
            assert process.poll() is None, (folder / "said").read_text()
            assert time.monotonic() < deadline, (folder / "said").read_text()
            time.sleep(0.1)
        yield Head(address, env, folder)
    finally:
        # Asked politely, they take half a minute.
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@pytest.mark.slow
@pytest.mark.ray
class TestOnACluster:
    def test_a_run_arrives(self, head: Head, shards: Path, local_run: Path, tmp_path: Path) -> None:
        """The rows of a run on this machine; the commit, which no worker can ask git for; a record; nothing secret anywhere."""
        out = tmp_path / "run"
        inner = command(os.path.relpath(shards, ROOT), out)  # a relative path, which means nothing in the job's folder
        job = head.submit("--env", "MY_SECRET", "OTHER=plain", "--", "explain", *inner, MY_SECRET=SECRET)
        assert job.returncode == 0, job.stdout + job.stderr
        assert "48 of 48 images" in job.stdout
        assert_same_rows(out, local_run)
        assert json.loads((out / "run.json").read_text())["git_commit"] == origin.git_commit()
        (file,) = (out / "submissions").iterdir()
        record = json.loads(file.read_text())
        assert record["address"] == head.address
        assert record["git_commit"] == origin.git_commit()
        assert record["env"] == ["MY_SECRET", "OTHER"]
        assert record["config"]["out"] == str(out)
        assert file.stem == record["submission_id"]
        assert record["submission_id"] in job.stdout
        said = [
            job.stdout,
            job.stderr,
            *(path.read_bytes().decode("latin-1") for path in out.rglob("*") if path.is_file()),
        ]
        assert not any(secret in text for text in said for secret in (TOKEN, SECRET))

    def test_a_mistake_that_only_the_cluster_sees(self, head: Head, local_run: Path) -> None:
        """The job's exit code and words come back, at once or later; a job is told from one that nobody knows."""
        question = ["--", "query", "sql", str(local_run), "SELECT bananas FROM images"]
        sent = head.submit("--no-wait", "--submission-id", "mistaken", *question)
        assert sent.returncode == 0, sent.stderr
        assert f"-m jobs.submit --address {head.address} --follow mistaken\n" in sent.stdout
        followed = head.submit("--follow", "mistaken")
        assert (followed.returncode, followed.stderr) == (2, "mistaken ended with exit code 2\n")
        assert re.search(r"^error: .*bananas", followed.stdout, re.MULTILINE)
        assert head.submit("--stop", "mistaken").stdout == "mistaken had ended before\n"
        assert (
            head.submit("--stop", "nobody").stderr == "error: nobody cannot be stopped: the cluster knows no such job\n"
        )
        again = head.submit("--submission-id", "mistaken", *question)
        assert again.returncode == 2
        assert again.stderr.startswith("error: the cluster does not take the job: ")
        assert again.stderr.count("\n") == 1

    def test_ctrl_c_leaves_the_job_or_stops_it(self, head: Head, local_run: Path) -> None:
        serve = ["--", "report", "--run", str(local_run), "--serve", "--port", "0"]
        code, said = at_terminal(head, ["--submission-id", "left", *serve], "n")
        assert code == 130
        assert "stopped: left goes on without this command" in said
        code, said = at_terminal(head, ["--submission-id", "ended", *serve], "y")
        assert code == 130
        assert "stopped: ended has ended; the same command resumes its run" in said
        assert head.submit("--stop", "ended").stdout == "ended had ended before\n"
        # The first one is there still. Without a terminal nobody is asked.
        with subprocess.Popen(
            [sys.executable, "-m", "jobs.submit", "--address", head.address, "--follow", "left"],
            cwd=ROOT, env=head.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as following:  # fmt: skip
            assert following.stdout is not None
            assert following.stderr is not None
            while "index.html" not in (line := following.stdout.readline()):
                assert line
            following.send_signal(signal.SIGINT)
            assert following.wait(20) == 130
            assert following.stderr.readline() == "stopped: left goes on without this command\n"
        assert head.submit("--stop", "left").stdout == "left is stopped\n"
        assert head.submit("--follow", "left").returncode == 143

    @pytest.mark.parametrize(
        ("env", "sentence"),
        [
            ({"HOME": "/nowhere"}, "asks for a token, and ~/.ray/auth_token holds none; `ray get-auth-token` on the "),
            ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "asks for a token, and the file of RAY_AUTH_TOKEN_PATH holds none; "),
            (
                {"RAY_AUTH_TOKEN": "0123456789abcdef"},
                "refuses the token of RAY_AUTH_TOKEN; `ray get-auth-token` on the ",
            ),
        ],
    )
    def test_tokens(self, env: dict[str, str], sentence: str, head: Head) -> None:
        refused = head.submit("--", "query", "latents", "/", **env)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: {head.address} {sentence}")
        assert refused.stderr.count("\n") == 1
        assert "0123456789abcdef" not in refused.stderr


def at_terminal(head: Head, words: Sequence[str], answer: str) -> tuple[int, str]:
    """Exit code and output of `relmap submit` at a terminal, where Ctrl-C is typed once the job works, and then an answer."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "jobs.submit", "--address", head.address, *words], head.env)
    said = b""

    def until(mark: bytes) -> None:
        nonlocal said
        while mark not in said:
            more = os.read(terminal, 4096)
            assert more, said
            said += more

    try:
        until(b"index.html")
        os.write(terminal, b"\x03")
        until(b"[y/N] ")
        os.write(terminal, f"{answer}\n".encode())
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            until(b"nothing says this")
    finally:
        os.close(terminal)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.decode()


# ---- Mistakes that need no cluster.


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_JOB_HEADERS", origin.COMMIT):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nothing_set")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name a command after --, for example: python -m jobs.submit -- explain --demo --out RUN"),
        (["--", "explian"], "explian: no such command; did you mean explain?"),
        (["--", "submit", "--", "index"], "submit: name the command that is to run on the cluster"),
        (["--", "explain", "--demo", "--out", "x", "--k", "-3"], "--k -3: must be at least 0"),
        (["--", "index", "--run", "s3:/bucket/run"], "--run: s3:/bucket/run has too few slashes for an address: write "),
        (["--follow", "x", "--", "index", "--run", "x"], "--follow and --stop take no command"),
        (["--env", "A", "--", "index", "--run", "x"], "--env A: this environment has no such variable; --env A=VALUE "),
        (["--env", "1=secret", "--", "index", "--run", "x"], "--env takes NAME, or NAME=VALUE, and a name has letters, "),
        (["--address", "head:6379", "--stop", "x"], "--address head:6379: jobs are taken by a cluster's dashboard; write "),
        (["--address", "http://u:pw@h:no", "--stop", "x"], "--address http://h:no is no address ("),
        (["--address", "http://127.0.0.1:9", "--stop", "x"], "http://127.0.0.1:9: no cluster answers there (Connection "),
    ],
)  # fmt: skip
def test_mistakes(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("A", raising=False)
    said = mistake(submit.main, words, capsys)
    assert said.startswith(sentence)
    assert "secret" not in said
    assert "pw" not in said


@pytest.mark.usefixtures("nothing_set")
def test_the_environment_names_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray job submit` reads it; but what is typed goes before it."""
    assert dashboard.address_of("") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://one:1/")
    assert dashboard.address_of("") == "http://one:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://two:2")
    assert dashboard.address_of("") == "https://two:2"
    assert dashboard.address_of("http://three:3") == "http://three:3"


@pytest.mark.usefixtures("nothing_set")
def test_ray_without_its_job_client(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    said = mistake(submit.main, ["--stop", "x"], capsys)
    assert re.fullmatch(r"Ray is installed without its job client: pip install 'ray\[default\]==[\d.]+'", said)


@pytest.mark.usefixtures("nothing_set")
def test_a_server_that_is_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<p>hello</p>")

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        said = mistake(submit.main, ["--address", address, "--stop", "x"], capsys)
        server.shutdown()
    assert said == f"{address}: what answers there is no dashboard of Ray (status 200); its port is 8265 by default"


# ---- Places.


def placed(words: list[str], is_shared: bool = False) -> list[str]:
    return order.placed(submit.read(words), is_shared)


def test_places_are_looked_at_from_here(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "shards").mkdir()
    (store / "shards" / "0.tar").touch()
    models = ["--clip", "demo", "--sae", "owner/name"]
    for images in ("s3://bucket/shards", "s3://bucket/shards/0.tar", "s3://bucket/shards/*.tar"):
        words = ["explain", "--images", images, *models, "--out", "s3://bucket/run"]
        assert placed(words) == words[1:]
    for images in ("s3://bucket/shard", "s3://bucket/shard/*.tar", "s3://bucket/shards/1.tar"):
        with pytest.raises(ValueError, match=f"^--images {re.escape(images)}: there is nothing$"):
            placed(["explain", "--images", "s3://bucket/shards", images, *models, "--out", "s3://bucket/run"])
    sae = ["--clip", "demo", "--sae", "s3://bucket/sae"]
    with pytest.raises(ValueError, match=r"^--sae s3://bucket/sae: there is nothing$"):
        placed(["explain", "--images", "s3://bucket/shards", *sae, "--out", "s3://bucket/run"])
    with pytest.raises(ValueError, match=r"^--out s3://bucket/shards holds other files and no run"):
        placed(["explain", "--images", "s3://bucket/shards", *models, "--out", "s3://bucket/shards"])
    with pytest.raises(ValueError, match=r"^--images: an address holds a credential") as refused:
        placed(["explain", "--images", "s3://key:word@bucket/shards", *models, "--out", "s3://bucket/run"])
    assert "word@" not in str(refused.value)


def test_what_this_machine_may_not_ask_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(order.storage, "exists", refuse)
    assert placed(["index", "--run", "s3://bucket/run"]) == ["--run", "s3://bucket/run"]
    assert capsys.readouterr().out == "not looked at from here: s3://bucket/run: Permission denied\n"


def test_paths_are_for_clusters_that_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    given = ["explain", "--images", "photos", "--clip=demo", "--sae", "photos", "--out=run", "--site", "embedding"]
    with pytest.raises(ValueError, match=r"^--images photos is a path of this machine; .* or say --shared-disk if "):
        placed(given)
    photos = str(tmp_path / "photos")
    expected = ["--images", photos, "--clip=demo", "--sae", photos, f"--out={tmp_path}/run", "--site", "embedding"]
    assert placed(given, is_shared=True) == expected
    assert placed(["query", "top", "photos", "53"], is_shared=True) == ["top", photos, "53"]
    assert placed(["query", "top", "--json", "photos", "53"], is_shared=True) == ["top", "--json", photos, "53"]
    split = ["embed", "--images", "photos", "--clip", "demo", "--out", "run", "--split", "photos"]  # a name, no place
    assert placed(split, is_shared=True)[-4:] == ["--out", str(tmp_path / "run"), "--split", "photos"]
    with pytest.raises(ValueError, match=r"^--run nothing: there is nothing$"):
        placed(["index", "--run", "nothing"], is_shared=True)


def test_every_argument_is_known_as_a_place_or_as_none() -> None:
    """A new argument of a command that names a place would else be sent as a path that means nothing there."""
    places = {*order.READ, *order.WRITTEN, *order.MODELS}
    texts = {
        "column",
        "image_column",
        "site",
        "against_site",
        "method",
        "methods",
        "removal",
        "checks",
        "precision",
        "resize",
        "targets",
        "templates",
        "dataset",
        "pool",
        "split",
        "by",
    }
    others = {"host", "scratch", "reason"}  # an address of the network, a disk of the job's own machine, why
    for name in set(relmap.NAMES) - {"submit", "query"}:
        fields = dataclasses.fields(importlib.import_module(f"jobs.{name}").Arguments)
        assert {field.name for field in fields if field.type in (str, tuple[str, ...])} <= places | texts | others, name


def test_this_machine_is_known_by_its_addresses() -> None:
    assert dashboard._is_own("127.0.0.1")
    assert not dashboard._is_own("192.0.2.1")  # nobody's, by RFC 5737
    assert not dashboard._is_own("head")


def test_only_code_leaves_this_machine(tmp_path: Path) -> None:
    checkout, sent = tmp_path / "checkout", tmp_path / "sent"
    for file in (
        "jobs/a.py",
        "jobs/__pycache__/a.pyc",
        "saecore/demo/words.txt",
        ".env",
        "runs/r/run.json",
        ".git/config",
    ):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text("x")
    submit.copied(checkout, sent)
    assert sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()) == [
        "jobs/a.py",
        "saecore/demo/words.txt",
    ]


def test_the_commit_where_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = origin.git_commit()
    monkeypatch.setenv(origin.COMMIT, "0123abc")
    assert origin.git_commit() == here  # a checkout knows better
    monkeypatch.setattr(origin, "__file__", str(tmp_path / "origin.py"))
    assert origin.git_commit() == "0123abc"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert origin.git_commit() == "0123abc"
    monkeypatch.delenv(origin.COMMIT)
    assert origin.git_commit() is None


# ---- Follow a log over a bad line.


class Line:
    """A job's server whose connections end after so many pieces of the log, and whose answers fail as told."""

    PIECES = ("one\n", "two\nthr", "ee\n", "four\n")

    def __init__(self, lives: list[int], answers: list[Any]) -> None:
        self.lives, self.answers = lives, answers

    async def tail_job_logs(self, job: str) -> Any:
        alive = self.lives.pop(0)
        for piece in self.PIECES[:alive]:
            yield piece
        if alive < len(self.PIECES):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, code = answer
        is_terminal = status not in ("RUNNING", "PENDING")
        return SimpleNamespace(
            status=SimpleNamespace(value=status, is_terminal=lambda: is_terminal),
            driver_exit_code=code,
            message="why\nit is",
        )

    def get_job_logs(self, job: str) -> str:
        return "".join(self.PIECES)[: 9 if self.answers else None]


RUNS: tuple[str, int | None] = ("RUNNING", None)


@pytest.mark.parametrize(
    ("lives", "answers", "code"),
    [
        ([4], [("SUCCEEDED", 0)], 0),
        ([1, 2, 4], [RUNS, ConnectionError("gone"), ("FAILED", 3)], 3),
        ([0, 0, 0], [RUNS, RUNS, ("FAILED", -9)], 137),  # a proxy that lets no log through line by line
        ([2, 4], [OSError(113, "No route to host"), ("STOPPED", None)], 143),
        ([4], [("FAILED", None)], 1),
    ],
)
def test_each_character_of_a_log_is_printed_once(
    lives: list[int], answers: list[Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.follow(Line(lives, answers), "x", first_pause=0.0) == code
    assert capsys.readouterr().out == "".join(Line.PIECES)


def test_a_cluster_that_is_gone_or_forgot_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    gone = Line([1, 0, 0], [OSError(113, "No route to host")] * 3)
    with pytest.raises(dashboard.LostError, match=r"has not answered for 0 s \(No route to host\)"):
        dashboard.follow(gone, "x", patience=0.0, first_pause=0.0)
    forgot = Line([0], [RuntimeError("Request failed with status code 404: Job x does not exist.")])
    with pytest.raises(dashboard.LostError, match="the cluster knows no such job"):
        dashboard.follow(forgot, "x", first_pause=0.0)

"""Addresses on the Hugging Face Hub: a small Hub on this machine, one that never answers, and none at all."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from saecore import hub
from saecore.images.preprocess import load_preprocess
from saecore.sae.checkpoints import load_sae
from saecore.towers.loading import load_text_tower, load_tower
from tests.helpers.towers import random_sae

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOADERS: list[tuple[Callable[[str], Any], str]] = [
    (load_tower, "no/such-model"),
    (load_text_tower, "no/such-model"),
    (load_preprocess, "no/such-model"),
    (load_sae, "hf://no/such-model"),
    (load_sae, "hf://no/such-model/of-b16.pth"),
]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks: what a repository holds, and its files."""

    folder: Path
    fetched: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].split("/")
        files = {file.name: file for file in self.folder.iterdir()}
        headers = {"X-Repo-Commit": COMMIT}
        if path[1:3] != ["api", "models"]:  # /OWNER/NAME/resolve/REVISION/FILE
            file = files[path[5]]
            content = file.read_bytes()
            headers |= {"ETag": f'"{file.name}-{len(content)}"'}
            if body:
                self.fetched.append(file.name)
        elif path[4] != "model":
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            return
        elif "tree" in path:
            listed = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            content = json.dumps(listed).encode()
        else:
            names = [{"rfilename": name} for name in files]
            content = json.dumps({"id": "a/model", "modelId": "a/model", "sha": COMMIT, "siblings": names}).encode()
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with one repository, a/model, and the names of files that were fetched from it."""
    shutil.copytree(hub.DEMO_CLIP, tmp_path / "model")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "open_clip_pytorch_model.bin"):
        (tmp_path / "model" / name).write_bytes(b"the same weights again")
    Hub.folder, Hub.fetched = tmp_path / "model", []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", Hub.fetched
        server.shutdown()
        thread.join()


SCRIPT = """
import sys
from saecore.towers.loading import load_text_tower, load_tower
for address in sys.argv[1:]:
    try:
        print(load_tower(address).sha256(), load_text_tower(address).sha256())
    except ValueError as error:
        print(error)
"""


def run(tmp_path: Path, *addresses: str, **environment: str) -> list[str]:
    """Load in a process of its own: huggingface_hub reads its settings when it is imported."""
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "", **environment}
    words = [sys.executable, "-c", SCRIPT, *addresses]
    done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_model_is_fetched_once_and_then_found_without_the_hub(tmp_path: Path, served: tuple[str, list[str]]) -> None:
    endpoint, fetched = served
    expected = f"{load_tower('demo').sha256()} {load_text_tower('demo').sha256()}"
    first, nobody = run(tmp_path, "a/model", "a/nobody", HF_ENDPOINT=endpoint)
    assert first == expected
    assert nobody == ("a/nobody is no model on the Hugging Face Hub, or a private one: then log in (hf auth login)")
    # weights once, of several forms
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sorted(fetched) == sorted(files)
    cached, other = run(tmp_path, "a/model", "a/other", HF_HUB_OFFLINE="1")
    assert cached == expected
    assert "a/other is not in the local cache" in other
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    assert run(tmp_path, "a/model", **nowhere) == [expected]
    assert sorted(fetched) == sorted(files)


@pytest.mark.parametrize(("load", "address"), LOADERS)
def test_offline_it_is_told_at_once(load: Any, address: str) -> None:
    """conftest sets HF_HUB_OFFLINE."""
    started = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"no/such-model is not in the local cache.*since HF_HUB_OFFLINE is set"
    ) as caught:
        load(address)
    assert time.perf_counter() - started < 5
    assert "\n" not in str(caught.value)
    assert "give the folder of a copy" in str(caught.value)


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hangs: here the connection is accepted, and nothing comes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.5")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        for load, address in LOADERS:
            started = time.perf_counter()
            with pytest.raises(ValueError, match="is not in the local cache, and the Hugging Face Hub") as caught:
                load(address)
            assert time.perf_counter() - started < 8
            assert "did not answer within 0.5 s" in str(caught.value) or "cannot be reached" in str(caught.value)
            assert "\n" not in str(caught.value)
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.25")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *args, **options: time.sleep(2))
    with pytest.raises(ValueError, match=r"did not answer within 0\.25 s"):
        load_tower("no/such-model")


def test_addresses_that_are_neither_folders_nor_repositories(tmp_path: Path) -> None:
    random_sae().save(tmp_path / "sae")
    for address in (str(tmp_path / "none"), str(tmp_path / "sae" / "config.json"), "a/b/c", "two words", "x" * 300):
        for load in (load_tower, load_preprocess):
            with pytest.raises(ValueError, match="is no folder; a model on the Hugging Face Hub is OWNER/NAME"):
                load(address)


def test_weights_are_chosen_among_a_repositorys_files() -> None:
    settings = ["config.json", "merges.txt", "spiece.model"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "model.fp16.safetensors", "README.md"]
    assert hub.model_files([*others, "model.safetensors", *settings, *parts]) == [*settings, "model.safetensors"]
    assert sorted(hub.model_files([*others, *settings, *parts])) == sorted([*settings, *parts])
    assert hub.model_files([*others, *settings]) == [*settings, "pytorch_model.bin"]
    assert hub.model_files(settings) == settings

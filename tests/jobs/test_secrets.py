"""Credentials in addresses: refused by every command in one sentence that does not repeat them, and written nowhere."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import embed, explain, index, measure, name, query, report, run, submit, train
from saecore.query import results
from saecore.stores import check_holds_no_secret, without_secrets
from tests.helpers.mistakes import mistake

SECRET = "wJalrXUtnFEMI"

HOLDERS = [
    f"s3://AKIAIOSFODNN7:{SECRET}@bucket/x",
    f"s3://{SECRET}@bucket/x",
    f"s3://bucket/x?access_key=AKIA&secret_key={SECRET}",
    f"s3://bucket/x?region=eu-west-1&session_token={SECRET}",
    f"s3://bucket/x.tar?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature={SECRET}",
    f"s3://bucket/x?secret%5Fkey={SECRET}",
    f"s3://bucket/x?endpoint_override=name:{SECRET}@host",
    f"gs://{SECRET}@bucket/x",
    f"gs://bucket/x?access_token={SECRET}",
    f"https://name:{SECRET}@host/x.tar",
    f"https://host/x.tar?X-Amz-Signature={SECRET}",
    f"https://host/x.tar?{SECRET}",
    f"https://host/x.tar#token={SECRET}",
    f"hf://hf_{SECRET}@datasets/owner/name",
    f"hf://datasets/owner/name/x.tar?token={SECRET}",
    f"abfss://box:{SECRET}@account.dfs.core.windows.net/x",
    f"abfss://box@account.dfs.core.windows.net/x?sig={SECRET}",
]

HARMLESS = [
    "s3://bucket/x?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1",
    "s3://bucket/a?b.tar",
    "s3://bucket/user@example.org/x",
    "gs://anonymous@bucket/x",
    "hf://owner/name@main",
    "hf://datasets/owner/name@main/x.tar",
    "https://host/x.tar",
    "abfss://box@account.dfs.core.windows.net/x",
    "file:///photos/a@b?token=x",
    "photos/a@b?token=x",
]


@pytest.mark.parametrize("address", HOLDERS)
def test_an_address_that_holds_a_credential_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(ValueError, match="which would be written into the run") as told:
        check_holds_no_secret(address)
    assert SECRET not in str(told.value)
    with pytest.raises(ValueError, match="which would be written into the run") as told:
        results.open(address)
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("address", HARMLESS)
def test_an_address_that_holds_none_is_not(address: str) -> None:
    check_holds_no_secret(address)


def commands(address: str) -> list[tuple[Callable[[list[str]], int], list[str]]]:
    """Every command, given an address in every place that takes one, and where it takes none."""
    models = ["--clip", "demo", "--sae", "demo"]
    return [
        (explain.main, ["--images", address, *models, "--out", "run"]),
        (explain.main, ["--images", "photos", address, *models, "--out", "run"]),
        (explain.main, ["--images", "photos", *models, "--out", address]),
        (explain.main, [f"--out={address}", "--images", "photos", *models]),
        (explain.main, ["--images", "photos", "--clip", address, "--sae", "demo", "--out", "run"]),
        (explain.main, ["--images", "photos", "--clip", "demo", "--sae", address, "--out", "run"]),
        (explain.main, [address, "--out", "run"]),
        (explain.main, ["--no-such-flag", address, "--out", "run"]),
        (run.main, ["--images", address, *models, "--out", "run"]),
        (run.main, ["--images", "photos", *models, "--out", address]),
        (embed.main, ["--images", address, "--clip", "demo", "--out", "run"]),
        (embed.main, ["--text", address, "--clip", "demo", "--out", "run"]),
        (train.main, ["--embeddings", address, "--latents", "9", "--out", "run"]),
        (train.main, ["--embeddings", "x.npy", "--latents", "9", "--out", address]),
        (measure.main, ["--embeddings", address, "--sae", "demo"]),
        (measure.main, ["--embeddings", "x.npy", "--sae", address]),
        (name.main, ["--run", address]),
        (name.main, ["--run", "run", "--vocabulary", address]),
        (index.main, ["--run", address]),
        (report.main, ["--run", address, "--out", "pages"]),
        (report.main, ["--run", "run", "--out", address]),
        (query.main, ["top", address, "3"]),
        (query.main, [address]),
        (submit.main, ["--address", "http://127.0.0.1:9", "--", "index", "--run", address]),
    ]


@pytest.mark.parametrize("address", [HOLDERS[0], HOLDERS[2], HOLDERS[10]])
def test_every_command_refuses_it_and_makes_nothing(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for main, argv in commands(address):
        said = mistake(main, argv, capsys)
        assert "which would be written into the run" in said, argv
        assert SECRET not in said
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_say_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "short")  # a word, which texts may hold
    for text, shown in (
        (f"proxy http://name:{SECRET}1@host:8080 fails", "proxy http://..@host:8080 fails"),
        (f"'https://cdn/x.tar?Expires=1&Signature={SECRET}2' is gone", "'https://cdn/x.tar?..' is gone"),
        (f"key {SECRET} is wrong, in short", "key .. is wrong, in short"),
        ("s3://bucket/a?b.tar is gone", "s3://bucket/a?b.tar is gone"),
        (json.dumps({"who": "a@b"}), '{"who": "a@b"}'),
    ):
        assert without_secrets(text) == shown

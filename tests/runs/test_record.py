"""run.json is read whatever version wrote it, and written with the keys that it has always had."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from saecore.runs.fit import Fit
from saecore.runs.record import Record, Unread, from_document, read_record, to_document, write_record

COMPLETE: dict[str, Any] = {
    "status": "complete",
    "fingerprint": "604f",
    "parts": {"schema": 2, "dtype": "float32", "clip": "0f5f", "sae": "33fe", "embeddings": True},
    "command": "python -m jobs.explain --demo --out runs/demo",
    "config": {"clip": "demo", "sae": "saes/x", "site": "embedding", "methods": ["contrib"], "images": ["photos"]},
    "replicas": 1,
    "versions": {"python": "3.11.7"},
    "git_commit": None,
    "started": "2026-11-26T20:35:53+0000",
    "grid": [8, 8],
    "n_latents": 80,
    "sae": {"site": "embedding"},
    "session_images": 0,
    "session_seconds": {"images": 0.0},
    "images": 5,
    "refused": {},
    "rows": {"images": 5},
    "bytes": {"images": 999},
    "step_seconds": {},
    "worst_completeness_error": 0.0,
    "fit": {"judged": 5, "poor": 1},
    "lost": {"shards": 1, "first": ["a.tar"], "images": 2},
    "damaged": {"shards": 4, "first": ["b.tar", "c.tar", "d.tar"]},
}
"""As runs were written before the record had a type."""


def test_a_file_of_a_complete_run_is_read_and_written_again_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(COMPLETE | {"note": "mine"}))
    record = read_record(str(tmp_path))
    assert (record.grid, record.fit, record.n_refused) == ((8, 8), Fit(5, 1), 0)
    assert (record.lost, record.damaged) == (Unread(1, ["a.tar"], 2), Unread(4, ["b.tar", "c.tar", "d.tar"]))
    assert (record.kind, record.clip, record.sae_address) == ("explain", "demo", "saes/x")
    assert (record.sha256_of("clip"), record.sha256_of("sae"), record.dtype) == ("0f5f", "33fe", "float32")
    assert (record.methods, record.inputs, record.given_site) == (["contrib"], ["photos"], "embedding")
    assert record.keeps_embeddings
    write_record(str(tmp_path), record)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written == COMPLETE | {"note": "mine"}
    assert list(written) == [*COMPLETE, "note"]


def test_a_run_that_goes_on_does_not_say_what_is_not_known_yet() -> None:
    begun = {"status": "running", "fingerprint": "1", "parts": {"kind": "embed"}, "git_commit": "ab+", "n_outputs": 128}
    assert to_document(from_document(begun)) == begun
    ended = dataclasses.replace(from_document(begun), status="complete")
    assert to_document(ended).keys() - begun.keys() == {
        "session_images", "session_seconds", "images", "refused", "rows", "bytes", "step_seconds",
    }  # fmt: skip


def test_keys_that_older_runs_lack_have_values_that_say_nothing() -> None:
    record = from_document({"status": "complete", "parts": {"schema": 2}, "session_seconds": 2.0})
    assert record == Record(status="complete", parts={"schema": 2}, session_seconds={"images": 2.0})
    assert (record.clip, record.sae_address, record.sha256_of("clip"), record.given_site) == ("", "", "", "")
    assert (record.methods, record.inputs, record.worst_completeness_error) == ([], [], None)


@pytest.mark.parametrize("content", ["[]", "{}", '{"status": "complete"}', '{"status": "complete", "parts": []}', "3"])
def test_what_another_program_wrote_is_no_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is not what a run writes"):
        read_record(str(tmp_path))

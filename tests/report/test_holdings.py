"""What a run holds and what not: texts add to the kept latents, and pages say where there is no map, and why."""

import dataclasses
from pathlib import Path

import pytest

from jobs import explain, index, name, report
from jobs.hints import hints
from saecore.query import results
from saecore.report import captions, preview
from saecore.report.holdings import Holding, holdings, maps_in_words
from saecore.report.pages import Site
from saecore.report.views import Views
from tests.conftest import command
from tests.helpers import planted
from tests.helpers.mistakes import mistake
from tests.helpers.reading import Page, check_links


def run_of(shards: Path, out: Path, *targets: str) -> int:
    return explain.main(command(shards, out, "--local", "--limit", "8", "--targets", *targets))


def test_a_text_adds_to_the_kept_latents(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_of(shards, tmp_path / "run", "text:a red square", "concept:red") == 0
    run = results.open(str(tmp_path / "run"))
    counted = "SELECT count(DISTINCT latent) AS latents, count(*) AS maps FROM maps WHERE image_id = 0"
    assert run.sql(counted).to_pylist() == [{"latents": 12, "maps": 14}]
    assert maps_in_words(run) == "the kept latents, 1 text and 1 concept"
    assert maps_in_words(run, named=True) == "the kept latents, the text: a red square and the concept: red"
    added = hints(run)["Methods"]
    assert added.endswith(" concept:red --method contrib,contrib_grad --out NEW_FOLDER")
    assert added.count("--out") == 1  # the run's own folder is not in it any more
    capsys.readouterr()
    assert run_of(shards, tmp_path / "run", "concept:red", "kept", "text: a red square ") == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    said = mistake(lambda targets: run_of(shards, tmp_path / "run", *targets), ["text:a red square"], capsys)
    assert "targets was ['kept', 'text:a red square', 'concept:red']" in said


@pytest.mark.parametrize(
    ("targets", "methods", "shown"),
    [
        (("no-kept", "text:a red square", "concept:red"), "contrib,attention", ["text: a red square"]),
        (("latents:70,9", "text:x"), "attention,contrib", ["latent 70", "latent 9"]),
    ],
)
def test_a_preview_puts_on_one_scale_what_has_one_unit(
    shards: Path, tmp_path: Path, targets: tuple[str, ...], methods: str, shown: list[str]
) -> None:
    """One method's maps, of latents or of texts, and what their colours mean."""
    out = tmp_path / "run"
    assert (
        explain.main(command(shards, out, "--local", "--limit", "8", "--method", methods, "--targets", *targets)) == 0
    )
    first = preview.examples(results.open(str(out)), 1, 3)[0]
    assert first.targets == shown
    assert len(first.maps) == len(shown)
    assert first.meaning == captions.meaning(methods.partition(",")[0], shown[0].partition(":")[0].partition(" ")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "held"),
    [
        (("no-kept", "text:a red square", "concept:red"), "1 text and 1 concept"),
        (("latents:3",), "latent 3"),
        (("latents:70,9", "text:x"), "latents 70 and 9 and 1 text"),
    ],
)
def test_a_cell_without_a_map_says_so(shards: Path, tmp_path: Path, targets: tuple[str, ...], held: str) -> None:
    out = tmp_path / "run"
    assert run_of(shards, out, *targets) == 0
    assert (out / "preview.png").exists()
    for job in (index, name, report):
        assert job.main(["--run", str(out)]) == 0
    check_links(out / "report")
    words = f"no map: this run holds maps of {held} only"
    run = results.open(str(out))
    for image_id, kept in (
        run.sql("SELECT image_id, count(*) FROM activations GROUP BY ALL").to_pandas().values.tolist()
    ):
        page = Page(out / "report" / "images" / f"{image_id}.html")
        mapped = run.sql("SELECT count(*) AS n FROM maps WHERE image_id = ?", image_id)["n"].to_pylist()[0]
        both = """SELECT count(*) AS n FROM maps JOIN activations USING (image_id, latent) WHERE image_id = ?"""
        assert page.text.count(words) == kept - run.sql(both, image_id)["n"].to_pylist()[0]
        assert len([one for one in page.elements["button"] if one.get("class") == "map"]) == mapped
    firing = [path for path in (out / "report" / "latents").iterdir() if path.stem not in ("3", "9", "70")]
    for path in firing:
        page = Page(path)
        assert page.text.count(words) == len([one for one in page.elements["img"] if one["alt"]])
        assert "controls" not in [form.get("id") for form in page.elements["form"]]
    missing = Page(out / "report" / "index.html").text
    assert "maps of the kept latents" in missing
    assert f"--targets kept {targets[0]}" in missing or targets[0] == "no-kept"


def test_what_is_missing_and_what_would_add_it(tmp_path: Path) -> None:
    run = results.open(planted.write(tmp_path / "run"))
    held = {one.what: one for one in holdings(run)}
    assert held["Maps of"] == Holding("Maps of", "the kept latents and the text: x", "")
    assert held["Methods"].held == "contrib and chefer"
    assert held["Methods"].complete == ("contrib", "chefer", "contrib_grad")
    assert hints(run) == {
        "Methods": "python -m planted --method contrib,chefer,contrib_grad --out NEW_FOLDER",
        "Embeddings": "python -m planted --keep-embeddings --out NEW_FOLDER",
        "Names": f"python -m jobs.name --run {tmp_path / 'run'}",
        "Index": f"python -m jobs.index --run {tmp_path / 'run'}",
        "Judgement": f"python -m jobs.evaluate --run {tmp_path / 'run'}",
        "explorer": f"python -m jobs.report --run {tmp_path / 'run'} --serve",
    }
    bare = results.open(planted.write(tmp_path / "bare", methods=()))
    assert maps_in_words(bare) == "nothing"
    assert index.main(["--run", str(tmp_path / "run")]) == 0
    indexed = results.open(str(tmp_path / "run"))
    assert {one.what: one for one in holdings(indexed)}["Index"] == Holding("Index", "by latent", "")
    assert "Index" not in hints(indexed)


def test_a_command_of_an_older_run_has_the_flags_of_today(tmp_path: Path) -> None:
    run = results.open(planted.write(tmp_path / "run"))
    old = "python -m jobs.explain --images x --embeddings --method contrib chefer --out runs/x"
    run.record = dataclasses.replace(run.record, command=old)
    again = "python -m jobs.explain --images x --keep-embeddings --method contrib,chefer,contrib_grad --out NEW_FOLDER"
    assert hints(run)["Methods"] == again


def test_pages_without_hints_name_no_command(tmp_path: Path) -> None:
    views = Views(results.open(planted.write(tmp_path / "run")))
    for page in (Site(views).overview(), Site(views).latent_list([0], {}), Site(views).target(0)):
        assert "--" not in page.replace("<!--", "").replace("-->", "")
        assert "<code>" not in page
    assert "not held: words for what each latent is" in Site(views).overview()
    assert "added by <code>do this</code>" in Site(views, hints={"Names": "do this"}).overview()
    assert "For every latent and every image: <code>all</code>" in Site(views, hints={"explorer": "all"}).overview()

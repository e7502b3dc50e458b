"""A report as files: the numbers of the tables, names as text, links that lead somewhere, and clear mistakes."""

import base64
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import report
from saecore.query import results
from saecore.query.histograms import Bins
from saecore.query.maps import Patch
from saecore.report import captions
from saecore.report.views import Map, Tile
from tests.helpers import album, planted
from tests.helpers.mistakes import mistake
from tests.helpers.reading import Page, check_links, pages


@pytest.fixture(scope="module")
def written(album_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "report"
    assert report.main(["--run", str(album_run), "--out", str(out)]) == 0
    return out


def ask(run: Path, query: str) -> list[tuple[Any, ...]]:
    tables = {name: f"(FROM '{run}/{name}/*.parquet') AS {name}" for name in ("images", "activations", "maps")}
    return duckdb.sql(query.format(**tables)).fetchall()


def test_there_is_a_page_for_each(album_run: Path, written: Path) -> None:
    fired = {
        str(latent) for (latent,) in ask(album_run, "SELECT DISTINCT latent FROM {activations} WHERE activation > 0")
    }
    ids = {str(image) for (image,) in ask(album_run, "SELECT image_id FROM {images}")}
    assert {path.stem for path in (written / "latents").iterdir()} == fired
    assert {path.stem for path in (written / "images").iterdir()} == ids
    assert len(ids) == album.N_IMAGES
    assert len(list((written / "pictures").iterdir())) == album.N_IMAGES - 1  # the broken one has none


def test_a_picture_out_of_its_shard_and_the_part_of_it_that_clip_saw(album_run: Path) -> None:
    run = results.open(str(album_run))
    with tarfile.open(album_run.parent / "input.tar") as tar:
        for key in ("000004.jpg", album.WIDE):
            member = tar.extractfile(key)
            assert member is not None
            assert run.picture(key) == member.read()
    assert run.crop_box(album.WIDE) == (60, 0, 260, 200)  # the square in the middle of 320 x 200
    with pytest.raises(ValueError, match="it was refused"):
        run.picture(album.BROKEN)


def test_a_text_has_a_page(album_run: Path, written: Path) -> None:
    page = Page(written / "targets" / "0.html")
    assert [path.name for path in (written / "targets").iterdir()] == ["0.html"]
    assert f"text: {album.TEXT}" in page.text
    best = """SELECT key, pre_activation FROM {maps} JOIN {images} USING (image_id)
        WHERE target IS NOT NULL AND method = 'contrib' ORDER BY pre_activation DESC, image_id LIMIT 12"""
    keys, values = zip(*ask(album_run, best), strict=True)
    assert [element["alt"] for element in page.elements["img"] if element["alt"]][:12] == list(keys)
    assert all(captions.number(value) in page.text for value in values)
    assert "orange adds, blue takes away; cosine" in page.text
    for linking in (written / "index.html", written / "images" / "0.html"):
        assert any(element["href"].endswith("targets/0.html") for element in Page(linking).elements["a"])


def test_links_lead_to_files_of_the_report(written: Path) -> None:
    check_links(written)


def test_names_are_text(written: Path) -> None:
    """Whatever images, texts and latents are called makes no element, no handler, and no end of a script."""
    for page in pages(written):
        for element in page.elements["script"]:
            assert element.get("type") == "application/json" or element["src"].endswith(".js")
        for elements in page.elements.values():
            assert not [name for element in elements for name in element if name.startswith("on") or name == "style"]
        assert {element["src"].rpartition("/")[0].removeprefix("../") for element in page.elements["img"]} <= {
            "static",
            "pictures",
        }
    images = {page.path.stem: page for page in pages(written / "images")}
    assert f"text: {album.TEXT}" in images["0"].text
    assert images[str(album.N_SCENES)].text.count(album.HOSTILE) == 2  # title and heading
    labels = [element.get("aria-label") or "" for element in images[str(album.N_SCENES)].elements["canvas"]]
    assert any(label.startswith("map of latent ") and album.HOSTILE in label for label in labels)
    assert album.HOSTILE_NAME in Page(written / "latents.html").text
    assert (
        f"Latent {album.OFTEN} {album.HOSTILE_NAME} ? (not certain)"
        in Page(written / "latents" / f"{album.OFTEN}.html").text
    )
    script = (written / "data" / "search.js").read_text()
    assert "<" not in script
    index = json.loads(script.removeprefix("window.searchIndex = ").removesuffix(";\n"))
    assert [album.N_SCENES, album.HOSTILE] in index["images"]
    assert index["missing"] == [album.N_IMAGES - 1]


def test_a_latents_page_has_the_numbers_of_the_tables(album_run: Path, written: Path) -> None:
    query = """SELECT latent, count(*), avg(activation), median(activation), max(activation) FROM {activations}
        WHERE activation > 0 GROUP BY latent"""
    for latent, count, mean, median, most in ask(album_run, query):
        page = Page(written / "latents" / f"{latent}.html")
        assert f"{count} of {album.N_IMAGES - 1} images ({captions.percent(count / (album.N_IMAGES - 1))})" in page.text
        numbers = [captions.number(value) for value in (mean, median, most)]
        assert f"{numbers[0]} mean, {numbers[1]} median, {numbers[2]} strongest" in page.text
        best = f"""SELECT key FROM {{activations}} JOIN {{images}} USING (image_id)
            WHERE latent = {latent} AND activation > 0 ORDER BY activation DESC, image_id LIMIT 12"""
        shown = [element["alt"] for element in page.elements["img"] if element["alt"]]
        assert shown[: min(count, 12)] == [key for (key,) in ask(album_run, best)]
        assert len(shown) == min(count, 20)


def test_maps_travel_as_they_are_stored(album_run: Path, written: Path) -> None:
    for path in (written / "images").iterdir():
        page, rows = (
            Page(path),
            ask(
                album_run,
                f"""SELECT coalesce(target, 'latent ' || latent), method, map, scale, remainder FROM {{maps}}
                WHERE image_id = {path.stem}""",
            ),
        )
        stored = {(target, method): row for target, method, *row in rows}
        if not stored:
            assert page.data is None
            continue
        assert page.data["methods"] == album.METHODS
        assert page.data["grid"] == [8, 8]
        assert len(page.data["maps"]) == 13
        for one in page.data["maps"]:
            for method, (text, scale, label, caption) in one["by"].items():
                target = re.fullmatch(r"map of (latent \d+|text: .*?) on .*", label)
                assert target is not None
                values, step, remainder = stored.pop((target[1], method))
                assert base64.b64decode(text) == values
                assert scale == step
                relevance = np.frombuffer(values, np.int8) * step
                row, column = divmod(int(np.abs(relevance).argmax()), 8)
                assert label.endswith(f"at row {row + 1}, column {column + 1}")
                assert f"at row {row + 1}, column {column + 1}" in caption
                limit = page.data["sections"][one["section"]]["limits"][method]
                assert np.abs(relevance).max() <= limit * (1 + 1e-6)
                if method == "contrib":
                    assert (
                        f"patches {captions.signed(relevance.sum())}, remainder {captions.signed(remainder)}" in caption
                    )
                    assert caption in page.text  # the run's first method is shown
        assert not stored
        assert {"value": "chefer"} in page.elements["option"]


def test_refused_images_are_told(written: Path) -> None:
    page = Page(written / "index.html")
    assert f"{album.N_IMAGES - 1} images explained; 1 refused" in page.text
    assert "not-an-image" in page.text
    assert album.BROKEN in page.text
    assert "refused: not-an-image" in Page(written / "images" / f"{album.N_IMAGES - 1}.html").text
    assert "refused: not-an-image" in Page(written / "images.html").text


def test_read_aloud(written: Path) -> None:
    """What a screen reader needs of a page; colours and focus are for the browser's tests."""
    for page in pages(written):
        assert page.elements["html"][0]["lang"] == "en"
        assert len(page.elements["h1"]) == len(page.elements["main"]) == 1
        assert all("alt" in image for image in page.elements["img"])
        assert all("aria-label" in canvas or "aria-hidden" in canvas for canvas in page.elements["canvas"])
        assert len(page.elements["caption"]) == len(page.elements["table"])
        assert all("scope" in heading for heading in page.elements["th"])
        assert all("aria-label" in svg or "aria-hidden" in svg for svg in page.elements["svg"])
        ids = [element["id"] for elements in page.elements.values() for element in elements if "id" in element]
        assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_a_smaller_report_replaces_it(album_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    assert report.main(["--run", str(album_run), "--out", str(out)]) == 0
    assert (
        report.main(
            ["--run", str(album_run), "--out", str(out), "--latent-pages", "3", "--image-pages", "4", "--top", "1"]
        )
        == 0
    )
    assert len(list((out / "latents").iterdir())) == 3
    assert len(list((out / "images").iterdir())) == 4  # first and last image among them, which is the refused one
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    check_links(out)


def test_a_run_is_reported_inside_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The planted run: no picture of it exists, and its pages do."""
    run = planted.write(tmp_path / "run")
    assert report.main(["--run", run]) == 0
    said = capsys.readouterr().out
    assert "not found     5 pictures" in said
    assert (tmp_path / "run" / "report" / "index.html").as_uri() in said
    page = Page(tmp_path / "run" / "report" / "latents" / "0.html")
    assert "fires for 4 of 5 images (80.0 %)" in page.text
    assert "2.75 mean, 3.00 median, 4.00 strongest" in page.text
    assert "picture not found: a.jpg" in [image["alt"] for image in page.elements["img"]]


@pytest.mark.parametrize("case", ["refused images alone", "no maps"])
def test_a_run_with_little_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "refused images alone":
        monkeypatch.setattr(planted, "IMAGES", [[(key, 0, []) for key, *_ in chunk] for chunk in planted.IMAGES])
    run = planted.write(tmp_path / "run", methods=planted.METHODS if case == "refused images alone" else ())
    assert report.main(["--run", run]) == 0
    out = tmp_path / "run" / "report"
    check_links(out)
    assert len(list((out / "images").iterdir())) == 6
    expected = "truncated 6" if case == "refused images alone" else "this run was made without maps"
    assert expected in Page(out / "index.html").text


@pytest.mark.parametrize("change", ["gone", "no folder", "two others", "cut"])
def test_inputs_that_are_gone(album_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    shutil.copytree(album_run, tmp_path / "run")
    place = tmp_path / "input" / "images.tar"
    place.parent.mkdir()
    held = (album_run.parent / "input.tar").read_bytes()
    if change == "two others":
        with tarfile.open(album_run.parent / "input.tar") as tar:
            first, second, third = tar.next(), tar.next(), tar.next()
        assert first is not None
        assert second is not None
        assert third is not None
        place.write_bytes(held[second.offset : third.offset] + held[: second.offset] + held[third.offset :])
    elif change == "cut":
        place.write_bytes(held[:30_000])
    elif change == "no folder":
        place.parent.rmdir()
    plan = pq.read_table(tmp_path / "run" / "plan.parquet")
    moved = plan.set_column(plan.schema.names.index("uri"), "uri", pa.array([str(place)] * plan.num_rows))
    pq.write_table(moved, tmp_path / "run" / "plan.parquet")
    assert report.main(["--run", str(tmp_path / "run"), "--latent-pages", "5"]) == 0
    missing = re.search(r"not found +(\d+) pictures", capsys.readouterr().out)
    assert missing is not None
    if change == "cut":
        assert 10 < int(missing[1]) < album.N_IMAGES - 1
    else:
        assert int(missing[1]) == (2 if change == "two others" else album.N_IMAGES - 1)
    check_links(tmp_path / "run" / "report")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--run", "{empty}"], "holds no run"),
        (["--run", "{unfinished}"], "is not complete"),
        (["--run", "{run}", "--out", "{other}"], "holds something other than a report"),
        (["--run", "{run}", "--latent-pages", "0"], "--latent-pages 0: must be at least 1"),
        (["--run", "{run}", "--serve", "--out", "x"], "omit --out x"),
        (["--run", "{run}", "--serve", "--port", "70000"], "--port 70000"),
        (["--run", "s3://bucket/run"], "name a local folder"),
    ],
)
def test_mistakes(
    album_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    (tmp_path / "unfinished").mkdir()
    record = json.loads((album_run / "run.json").read_text()) | {"status": "running"}
    (tmp_path / "unfinished" / "run.json").write_text(json.dumps(record))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years")
    places = {name: str(tmp_path / name) for name in ("empty", "unfinished", "other")} | {"run": str(album_run)}
    assert sentence in mistake(report.main, [word.format(**places) for word in more], capsys)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_numbers_in_words() -> None:
    written = [captions.number(value) for value in (0.0, 1.0, 12.34, -0.5678, 0.01234, 123.4, 1234.5, float("nan"))]
    assert written == ["0", "1.00", "12.3", "\N{MINUS SIGN}0.568", "0.012", "123", "1,234", "none"]
    assert [captions.signed(value) for value in (0.25, 0.0, -0.25)] == ["+0.250", "0", "\N{MINUS SIGN}0.250"]
    assert captions.percent(0.414) == "41.4 %"


def test_a_map_of_nothing_is_said_to_be_one() -> None:
    nothing = Map(bytes(4), 0.0, Patch(0.0, 1, 1), None, 0.0, float("nan"), 0.0)
    assert captions.caption(nothing, "gradeclip") == "nothing anywhere"
    whole = nothing._replace(remainder=1.5)
    assert captions.caption(whole, "contrib") == "patches 0, remainder +1.50; nothing anywhere"
    one = Map(bytes([0, 127, 0, 0]), 0.01, Patch(1.27, 1, 2), None, 1.27, float("nan"), 0.0)
    assert captions.caption(one, "gradeclip") == "strongest +1.27 at row 1, column 2"
    outweighed = one._replace(against=Patch(-2.0, 2, 1))
    against = "strongest against \N{MINUS SIGN}2.00 at row 2, column 1"
    assert captions.caption(outweighed, "gradeclip") == f"strongest +1.27 at row 1, column 2; {against}"
    nothing_for = outweighed._replace(strongest=Patch(0.0, 1, 1))
    assert captions.caption(nothing_for, "gradeclip") == against
    tile = Tile({"key": "a.jpg"}, 5, "latent 5", 1.0, 1.0, "", {})
    assert captions.label(tile, nothing) == "map of latent 5 on a.jpg: nothing anywhere"
    said = "strongest at row 1, column 2; strongest against at row 2, column 1"
    assert captions.label(tile, outweighed) == f"map of latent 5 on a.jpg: {said}"


def test_a_histogram_by_hand() -> None:
    """Two bins of 1 and 4: the second is four times as high, 112 of 150; the SVG's 480 are cut in half, less a gap of 2."""
    drawn = captions.chart("Strength", "activation", "images", Bins([0.0, 1.0, 2.0], [1, 4]))
    assert drawn is not None
    assert [bar[:4] for bar in drawn.bars] == [(1.0, 102.0, 238.0, 28.0), (241.0, 18.0, 238.0, 112.0)]
    assert [bar.text for bar in drawn.bars] == ["0 to 1.00: 1 image", "1.00 to 2.00: 4 images"]
    assert drawn.summary == "Histogram of activation: 5 images from 0 to 2.00, most of them from 1.00 to 2.00"
    assert drawn.ticks == [(0.0, "0", "start"), (240.0, "1.00", "middle"), (480.0, "2.00", "end")]


def test_a_histogram_of_equal_numbers_is_one_bar() -> None:
    drawn = captions.chart("Strength", "activation", "images", Bins([2.5, 2.5000002], [17]))
    assert drawn is not None
    assert [bar[:4] for bar in drawn.bars] == [(230, 18.0, 20, 112.0)]
    assert drawn.summary == "Histogram of activation: 17 images, all at 2.50"
    assert drawn.ticks == [(240, "2.50", "middle")]
    alone = captions.chart("Strength", "activation", "images", Bins([2.5, 2.5], [1]))
    assert alone is not None
    assert alone.summary == "Histogram of activation: 1 image, at 2.50"
    assert captions.chart("Strength", "activation", "images", Bins([], [])) is None


def test_names_that_are_not_certain_are_marked_in_words(album_run: Path, written: Path) -> None:
    """Odd latents' names are not valid, and no names say how they were found."""
    for path in (written / "latents").iterdir():
        sure, name = int(path.stem) % 2 == 0, f"Latent {path.stem} word {path.stem}"
        if int(path.stem) in (0, album.OFTEN):
            continue
        page = Page(path)
        assert (f"{name} ? (not certain)" in page.text) is not sure
        assert ("did not pass the thresholds of a valid name" in page.text.replace("names with ? did", "")) is not sure
        assert "names with ? did not pass the thresholds of a valid name" in page.text
        assert not [span for span in page.elements["span"] if "title" in span]
    for listed in ("latents.html", "images/0.html", "index.html", "search.html"):
        assert "names with ? did not pass the thresholds of a valid name" in Page(written / listed).text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"score": 0.45}, "its score of 0.450 standard deviations is below 1.00"),
        ({"margin": 0.02}, "its margin to the runner-up of 0.020 standard deviations is below 0.200"),
        ({"margin": 0.1999}, "its margin to the runner-up of 0.1999 standard deviations is below 0.200"),
        ({"runner_up_score": 1.4}, "its score's ratio to the runner-up's of 1.07 is below 1.20"),
        ({"by_data": False}, "the latent fires for too few images to be named by them"),
        (
            {"score": 0.5, "margin": 0.1},
            "its score of 0.500 standard deviations is below 1.00; its margin to the runner-up of 0.100 standard deviations is",
        ),
    ],
)
def test_why_a_name_is_not_certain(changed: dict[str, Any], words: str) -> None:
    row = {"score": 1.5, "margin": 0.4, "runner_up_score": -0.1, "by_data": True} | changed
    assert captions.doubt(row, {"by": "data", "valid": {"score": 1.0, "margin": 0.2, "ratio": 1.2}}).startswith(words)

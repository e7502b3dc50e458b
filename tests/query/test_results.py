"""Questions to a run whose answers were worked out by hand (`tests.helpers.planted`), with and without an index."""

import gc
import json
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from jobs import index
from saecore.query import results
from saecore.query.results import Results
from saecore.runs import latents
from tests.helpers import planted
from tests.helpers.planted import IDS

STATES = {"without an index": [], "indexed": [3], "grown since": [1], "indexed in two segments": [2, 3]}
"""How many chunks the run had each time it was indexed."""


@pytest.fixture(scope="module", params=STATES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The planted run in each state in which a reader may find it."""
    folder = tmp_path_factory.mktemp("planted") / "run"
    for chunks in STATES[request.param]:
        assert index.main(["--run", planted.write(folder, chunks)]) == 0
    return results.open(planted.write(folder))


def test_top_images(run: Results) -> None:
    found = run.top_images(0)
    assert found["image_id"].to_pylist() == [
        IDS[key] for key in ("a.jpg", "c.jpg", "b.jpg", "e.jpg")
    ]  # equal: by number
    assert found["activation"].to_pylist() == [4.0, 4.0, 2.0, 1.0]
    assert found["key"].to_pylist() == ["a.jpg", "c.jpg", "b.jpg", "e.jpg"]
    assert found["uri"].to_pylist() == ["/shard-0.tar", "/shard-1.tar", "/shard-0.tar", "/shard-1.tar"]
    assert found["width"].to_pylist() == [10, 30, 20, 50]
    assert run.top_images(0, n=2).equals(found[:2])
    for never in (4, 5):
        assert run.top_images(never, maps=True).num_rows == 0


@pytest.mark.parametrize(("method", "third"), [(None, 0.5), ("contrib", 0.5), ("chefer", 1.0)])
def test_top_images_with_maps(run: Results, method: str | None, third: float) -> None:
    found = run.top_images(3, maps=True, method=method)
    assert found["key"].to_pylist() == ["d.jpg", "e.jpg"]
    assert found["method"].to_pylist() == [method or "contrib"] * 2
    maps = results.decode(found, run.grid)
    assert maps.dtype == np.float32
    np.testing.assert_array_equal(maps, [[[2.0, -0.5, third]]] * 2)


def test_top_images_of_a_text(run: Results) -> None:
    assert run.targets == ["text: x"]
    found = run.top_images_of("text: x", 3, method="chefer", maps=True)
    assert found["key"].to_pylist() == ["e.jpg", "d.jpg", "c.jpg"]
    assert found["cosine"].to_pylist() == pytest.approx([0.5, 0.4, 0.3])
    assert found["method"].to_pylist() == ["chefer"] * 3
    np.testing.assert_array_equal(results.decode(found, run.grid), [[[4.5, -0.5, 1.0]]] * 3)
    assert run.top_images_of("text: x").num_rows == 5
    assert "map" not in run.top_images_of("text: x").column_names
    for spelling in ("text:x", "text:  x", " text : x ", "text:\tx\n"):
        assert run.top_images_of(spelling, 3, method="chefer", maps=True).equals(found)
    for unknown in ("red", "x", "concept: x", "text: y", "text:", ""):
        with pytest.raises(ValueError, match=f"target {unknown}: besides latents, this run explains text: x"):
            run.top_images_of(unknown)
    with pytest.raises(ValueError, match="method legrad: this run has maps by contrib, chefer"):
        run.top_images_of("text: x", method="legrad", maps=True)


def test_latents_and_maps_of_an_image(run: Results) -> None:
    found = run.latents_of("b.jpg")
    assert found["latent"].to_pylist() == [1, 0]
    assert found["activation"].to_pylist() == [5.0, 2.0]
    assert run.latents_of(IDS["b.jpg"]).equals(found)
    assert run.latents_of("d.jpg")["pre_activation"].to_pylist() == [7.0, -0.5]
    maps = run.maps("b.jpg", "chefer")
    assert maps.latents == [1, 0, None]  # strongest first, whatever the order in the file
    assert maps.targets == [None, None, "text: x"]
    assert maps.methods == ["chefer"] * 3
    np.testing.assert_array_equal(maps.maps, [[[1.0, -0.5, 1.0]], [[0.5, -0.5, 1.0]], [[4.5, -0.5, 1.0]]])
    assert maps.remainders.tolist() == [0.25] * 3
    assert maps.table()["row"].to_pylist() == [1, 1, 1]  # from 1, as pages count
    assert maps.table()["column"].to_pylist() == [1, 3, 1]
    assert maps.table()["strongest"].to_pylist() == [1.0, 1.0, 4.5]
    assert maps.table()["against"].null_count == 3
    assert maps.table()["sum"].to_pylist() == [1.5, 1.0, 5.0]
    assert run.image("bad.jpg")["error"] == "truncated"
    assert run.latents_of("bad.jpg").num_rows == 0
    assert run.maps("bad.jpg").maps.shape == (0, 1, 3)


def test_co_firing(run: Results) -> None:
    """Latent 0 fires for a, b, c, e of five images: with 1 for a, b (2 of 4 in all), 2 for c, 3 for e (1 of 5)."""
    found = run.co_firing(0).to_pylist()
    assert [row["latent"] for row in found] == [1, 2, 3]
    assert [row["images"] for row in found] == [2, 1, 1]
    assert [row["share"] for row in found] == [0.5, 0.25, 0.25]
    assert [row["jaccard"] for row in found] == [2 / 4, 1 / 4, 1 / 5]
    assert [row["lift"] for row in found] == pytest.approx([2 * 5 / (4 * 2), 1 * 5 / (4 * 1), 1 * 5 / (4 * 2)])
    assert run.co_firing(0, n=1).num_rows == 1
    assert run.co_firing(4).num_rows == run.co_firing(5).num_rows == 0


def test_histogram(run: Results) -> None:
    found = run.histogram(0, bins=3)
    assert found["images"].to_pylist() == [1, 1, 2]
    assert (found["low"].to_pylist(), found["high"].to_pylist()) == ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert sum(run.histogram(5)["images"].to_pylist()) == 0


def test_compare(run: Results) -> None:
    """Two wide images, d and e, against a, b and c: latent 3 fires for both and for none, 1 for none and for two."""
    found = {row["latent"]: row for row in run.compare("width > 30").to_pylist()}
    assert list(found) == [3, 2, 0, 1]
    assert {latent: (row["images_a"], row["images_b"]) for latent, row in found.items()} == {
        3: (2, 0),
        0: (1, 3),
        2: (0, 1),
        1: (0, 2),
    }
    assert found[3]["effect"] == pytest.approx(math.pi)
    assert found[0]["effect"] == pytest.approx(2 * math.asin(math.sqrt(0.5)) - math.pi)
    assert found[3]["p"] == pytest.approx(1 / 10)  # of ten ways to choose two of five images, one is this one
    assert found[0]["odds_ratio"] == pytest.approx(1.5 * 0.5 / (3.5 * 1.5))
    assert run.compare("width > 30", "width < 30")["images_b"].to_pylist() == [0, 2, 2]
    wide, narrow = [IDS["d.jpg"], IDS["e.jpg"]], np.array([IDS["a.jpg"], IDS["b.jpg"]])
    assert run.compare(wide).equals(run.compare("width > 30"))
    assert run.compare(wide, narrow).equals(run.compare("width > 30", "width < 30"))
    assert run.compare("width > 30", narrow).equals(run.compare(wide, "width < 30"))
    with pytest.raises(ValueError, match="set_a does not exist"):
        run.sql("FROM set_a")


def test_sql(run: Results) -> None:
    assert run.sql("SELECT count(*) AS n FROM by_latent")["n"].to_pylist() == [10]
    assert run.sql("SELECT latent FROM by_latent WHERE latent >= ? ORDER BY ALL", 3)["latent"].to_pylist() == [3, 3, 4]
    assert run.sql("SELECT count(*) AS n FROM maps WHERE latent IS NULL")["n"].to_pylist() == [10]
    assert run.sql("SELECT count(*) AS n FROM latents JOIN activations USING (latent)")["n"].to_pylist() == [10]
    assert run.sql("SELECT count(*) AS n FROM images WHERE error IS NOT NULL")["n"].to_pylist() == [1]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1; SELECT 2",
        "SELECT 1; COPY (SELECT 1) TO '{folder}/x.csv'",
        "COPY (SELECT 1) TO '{folder}/x.csv'",
        "ATTACH '{folder}/x.db'",
        "EXPORT DATABASE '{folder}/x'",
        "CREATE TABLE x AS SELECT 1",
        "CREATE OR REPLACE VIEW images AS SELECT 1",
        "INSERT INTO latents VALUES (1)",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET threads = 1",
        "SET enable_external_access = true",
        "PRAGMA version",
        "CALL pragma_version()",
        "EXPLAIN ANALYZE SELECT 1",
        "",
        "-- nothing",
    ],
)
def test_sql_is_one_select(run: Results, query: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a question is one SELECT"):
        run.sql(query.format(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert run.sql("SELECT count(*) AS n FROM images")["n"].to_pylist() == [6]


@pytest.mark.parametrize(
    "query",
    [
        "FROM read_csv('{file}')",
        "FROM read_text('{file}')",
        "FROM read_blob('{file}')",
        "FROM read_parquet('{file}')",
        "FROM '{file}'",
        "FROM glob('{folder}/*')",
        "FROM images WHERE key IN (SELECT content FROM read_text('{file}'))",
        "FROM query('FROM read_text(''{file}'')')",
    ],
)
def test_sql_reads_the_run_alone(run: Results, query: str, tmp_path: Path) -> None:
    file = tmp_path / "secret.csv"
    file.write_text("a\nsecret\n")
    with pytest.raises(ValueError, match=r"Permission Error|Catalog Error"):
        run.sql(query.format(file=file, folder=tmp_path))


def test_sql_sees_no_variables_of_python(run: Results) -> None:
    mine = pa.table({"a": [1]})
    with pytest.raises(ValueError, match="mine does not exist"):
        run.sql("FROM mine")
    assert mine.num_rows == 1


@pytest.mark.parametrize(
    "query", ["FROM latents", "WITH a AS (SELECT 1) FROM a", "VALUES (1)", "DESCRIBE images", "SUMMARIZE maps"]
)
def test_sql_that_is_a_select_by_another_name(run: Results, query: str) -> None:
    assert run.sql(query).num_rows >= 1


@pytest.mark.parametrize(
    "condition",
    [
        "1 = 1) IS TRUE AS a, false AS b FROM images); COPY (SELECT 2) TO '{file}'; SELECT 1 FROM (SELECT (1 = 1",
        "1 = 1) IS TRUE AS a, image_id > 0 AS b FROM images --",
        "width > 30; COPY (SELECT 1) TO '{file}'",
        "width > 30, COPY (SELECT 1) TO '{file}'",
        "width IN (SELECT a FROM read_csv('{file}'))",
        "width, height",
        "",
    ],
)
def test_a_condition_is_one_expression(run: Results, condition: str, tmp_path: Path) -> None:
    given = condition.format(file=tmp_path / "x.csv")
    for sides in ((given, ""), ("width > 30", given or " ")):
        with pytest.raises(ValueError, match="no condition on images"):
            run.compare(*sides)
    assert list(tmp_path.iterdir()) == []
    assert run.compare("width > 30 -- in pixels").equals(run.compare("width > 30"))
    assert run.compare("image_id IN (SELECT image_id FROM activations WHERE latent = 3)")["latent"].to_pylist() == [
        3,
        2,
        0,
        1,
    ]


def test_find_and_names(tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run")
    with pytest.raises(ValueError, match=r"its latents have no names yet; jobs\.name gives them some"):
        results.open(uri).find("red")
    named = pa.table(
        {
            "latent": pa.array([1, 3, 0, 4], pa.int32()),
            "name": ["dark red", "Red", "sea", None],
            "score": [0.9, 0.3, 0.8, 0.1],
            "valid": [True, False, True, None],
            "words": [["dark red", "wine"], ["Red", "blood"], ["sea", "red"], [None, "100%"]],
        }
    )
    latents.merge(uri, named)
    for indexed in (False, True):
        run = results.open(uri)
        # By name, the surest first; then by another of its words. Latents 2 and 5 have no row, or no name.
        assert run.find("red")["latent"].to_pylist() == [1, 3, 0]
        assert run.find("RED sea")["latent"].to_pylist() == [0]
        assert run.find(" ").num_rows == 0
        assert run.find("100%")["latent"].to_pylist() == [4]
        assert run.find("%").num_rows == 1
        assert run.find("green").num_rows == 0
        assert run.latents_of("c.jpg").select(["latent", "name", "valid"]).to_pylist() == [
            {"latent": 0, "name": "sea", "valid": True},
            {"latent": 2, "name": None, "valid": None},
        ]
        assert run.co_firing(0)["name"].to_pylist() == ["dark red", None, "Red"]
        assert run.co_firing(0)["valid"].to_pylist() == [True, None, False]
        assert run.compare("width > 30")["valid"].to_pylist() == [False, None, True, True]
        assert indexed or index.main(["--run", uri]) == 0
    assert run.latents["images"].to_pylist() == [4, 2, 1, 2, 0, 0]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_run_without_maps(indexed: bool, tmp_path: Path) -> None:
    uri = planted.write(tmp_path / "run", methods=())
    assert not indexed or index.main(["--run", uri]) == 0
    run = results.open(uri)
    assert run.methods == []
    assert run.top_images(3)["key"].to_pylist() == ["d.jpg", "e.jpg"]
    for question in (lambda: run.maps("a.jpg"), lambda: run.top_images(3, maps=True)):
        with pytest.raises(ValueError, match="was made without maps"):
            question()


def test_a_run_of_refused_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "IMAGES", [[(key, 0, []) for key, *_ in chunk] for chunk in planted.IMAGES])
    uri = planted.write(tmp_path / "run")
    for indexed in (False, True):
        run = results.open(uri)
        assert run.n_images == 0
        assert run.top_images(0, maps=True).num_rows == run.co_firing(0).num_rows == 0
        assert run.sql("SELECT count(*) AS n FROM top_images")["n"].to_pylist() == [0]
        assert indexed or index.main(["--run", uri]) == 0
    assert run.latents["dead"].to_pylist() == [True] * 6


def test_images_beyond_the_copied_ones_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saecore.query.statistics.LISTED_IMAGES", 1)
    uri = planted.write(tmp_path / "run")
    assert index.main(["--run", uri, "--top", "1"]) == 0
    run = results.open(uri)
    assert run.sql("SELECT count(*) AS n FROM top_images")["n"].to_pylist() == [4 * len(planted.METHODS)]
    found = run.top_images(0, maps=True, method="chefer")
    assert found["key"].to_pylist() == ["a.jpg", "c.jpg", "b.jpg", "e.jpg"]
    assert found["method"].to_pylist() == ["chefer"] * 4
    np.testing.assert_array_equal(results.decode(found, run.grid), [[[0.5, -0.5, 1.0]]] * 4)
    assert run.latents["top_images"].to_pylist()[0] == [IDS["a.jpg"]]


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        (lambda run: run.top_images(6), "latent 6: the latents of this run are 0 to 5"),
        (lambda run: run.co_firing(-1), "latent -1: the latents of this run are 0 to 5"),
        (lambda run: run.image_id(77), "image 77: this run has none of that number"),
        (lambda run: run.image_id(-1), "image -1: this run has none of that number"),
        (lambda run: run.image_id(10**23), "image 1000.*: this run has none of that number"),
        (lambda run: run.top_images(0, -1), "n -1: must be at least 1"),
        (lambda run: run.co_firing(0, 0), "n 0: must be at least 1"),
        (lambda run: run.values_of("text: x", 0), "n 0: must be at least 1"),
        (lambda run: run.find("red"), "its latents have no names yet"),
        (lambda run: run.maps("z.jpg"), "image z.jpg: this run has none of that key"),
        (lambda run: run.maps("a.jpg", "tea"), "method tea: this run has maps by contrib, chefer"),
        (lambda run: run.compare("wdith > 3"), "no condition on images: .*wdith"),
        (lambda run: run.compare("width > 99"), r"no image meets the condition width > 99"),
        (lambda run: run.compare("width > 0"), "every image meets the condition width > 0, so none"),
        (lambda run: run.compare("width > 0", "width < 0"), "no image meets the condition width < 0"),
        (lambda run: run.compare([7]), r"no image meets the condition image_id IN \(FROM set_a\)"),
        (lambda run: run.compare([0, 1], [1, 1 << 32]), "1 images are in both sets"),
        (lambda run: run.crop_box("bad.jpg"), r"image bad.jpg: it was refused \(truncated\)"),
        (lambda run: run.picture("a.jpg"), "image a.jpg: its file cannot be read from /shard-0.tar any more"),
        (lambda run: run.compare("width > 10", "width > 30"), "2 images are in both sets"),
    ],
)
def test_a_question_without_an_answer(question: Callable[[Results], object], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        question(results.open(planted.write(tmp_path / "run")))


def test_a_key_that_several_images_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, (_, d), last = planted.IMAGES
    monkeypatch.setattr(planted, "IMAGES", [first, [("a.jpg", 30, [(0, 4.0)]), d], last])
    run = results.open(planted.write(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"several have this key.* 0 of /shard-0.tar, 4294967296 of /shard-1.tar"):
        run.image_id("a.jpg")
    assert run.image(1 << 32)["width"] == 30
    assert run.image_id("d.jpg") == IDS["d.jpg"]


def test_what_is_no_complete_run_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        results.open(str(tmp_path))
    uri = planted.write(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for changed, complaint in (
        ({"status": "running"}, "is not complete; the command that began it, given again, ends it: python -m planted"),
        ({"parts": {**record["parts"], "kind": "embed"}}, "holds no latents: jobs.explain makes those"),
        ({"parts": {**record["parts"], "schema": 1}}, "has tables of version 1"),
    ):
        (tmp_path / "run" / "run.json").write_text(json.dumps({**record, **changed}))
        with pytest.raises(ValueError, match=complaint):
            results.open(uri)


def test_through_another_filesystem(store: Path) -> None:
    """An index is made, read, and made longer at an address; nothing else is touched on this machine."""
    planted.write("s3://bucket/run", 1)
    assert index.main(["--run", "s3://bucket/run"]) == 0
    planted.write("s3://bucket/run")
    assert results.open("s3://bucket/run").top_images(3)["key"].to_pylist() == ["d.jpg", "e.jpg"]
    assert index.main(["--run", "s3://bucket/run"]) == 0
    run = results.open("s3://bucket/run")
    assert run.tables.index is not None
    assert len(run.tables.index.segments) == 2
    assert run.top_images(0, maps=True)["key"].to_pylist() == ["a.jpg", "c.jpg", "b.jpg", "e.jpg"]
    assert run.latents["images"].to_pylist() == [4, 2, 1, 2, 0, 0]
    assert run.compare("width > 30")["latent"].to_pylist() == [3, 2, 0, 1]
    assert sorted(path.name for path in store.parent.iterdir()) == ["bucket"]


def test_the_database_of_a_run_is_closed_with_it(tmp_path: Path) -> None:
    """At the exit of Python too, by `weakref.finalize`: 4 of 60 loaded processes aborted there in a thread of DuckDB."""
    run = results.open(planted.write(tmp_path / "run"))
    run.sql("SELECT count(*) FROM images")
    database = run.tables._database
    del run
    gc.collect()
    with pytest.raises(duckdb.ConnectionException):
        database.execute("SELECT 1")


def test_no_thread_of_arrow_holds_memory_of_numpy_after_an_answer(tmp_path: Path) -> None:
    """Such a thread lets go of it while Python ends, now and then, and aborts the process. Shared memory: 28 of 200 times."""
    run = results.open(planted.write(tmp_path / "run"))
    threads = []
    for _ in range(200):
        wanted = np.array([0, 1])
        # The array that `rows` gets is a view: what is finalized is the memory below it.
        weakref.finalize(wanted, lambda: threads.append(threading.get_ident()))
        run.tables.rows("activations", wanted[:], ["latent"])
        del wanted
    assert threads == 200 * [threading.get_ident()]

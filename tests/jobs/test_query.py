"""The command line, and readers that do not know this package."""

import json
import re
import shlex
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from jobs import index, query
from saecore import schema
from saecore.query import results
from saecore.runs import latents
from saecore.runs.files import EXPLAINED
from tests.helpers import planted
from tests.helpers.mistakes import mistake
from tests.helpers.planted import IDS

JOBS = {"index": index, "query": query}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The planted run, indexed, with names: one of them as long as a name may be, one that tries to steer the terminal."""
    uri = planted.write(tmp_path_factory.mktemp("planted") / "run")
    assert index.main(["--run", uri]) == 0
    names = ["a name that is as long as the vocabulary allows it to be", "\x1b[31mred[/red]", "sea"]
    named = {"latent": pa.array([0, 1, 3], pa.int32()), "name": names, "score": [0.5, 0.25, 0.125]}
    sure = {"runner_up": ["b", "c", "d"], "margin": [0.1, 0.2, 0.3], "valid": [False, True, False]}
    latents.merge(uri, pa.table({**named, **sure}))
    return uri


QUESTIONS = {
    "top": ["{run}", "0"],
    "target": ["{run}", "text:x"],
    "image": ["{run}", "a.jpg"],
    "maps": ["{run}", str(IDS["b.jpg"]), "--method", "chefer"],
    "find": ["{run}", "E"],
    "cofiring": ["{run}", "0"],
    "histogram": ["{run}", "0", "--bins", "3"],
    "compare": ["{run}", "width > 30", "--b", "width < 30"],
    "latents": ["{run}", "--by", "extent", "--least"],
    "sql": ["{run}", "SELECT * FROM top_images ORDER BY ALL"],
}


def asked(run: str, name: str, *more: str) -> list[str]:
    return [name, *(argument.format(run=run) for argument in QUESTIONS[name]), *more]


@pytest.mark.parametrize("name", query.QUESTIONS)
@pytest.mark.parametrize("width", [80, 40, 200])
def test_every_answer_fits_the_terminal(
    name: str, width: int, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert query.main(asked(run, name)) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 3
    assert max(map(len, said)) <= width
    assert "\x1b" not in "".join(said)
    header = re.split(r"\s+", said[0].strip())
    assert header[0] in {"latent", "key", "image_id", "rank", "low"}
    marked = [line for line in said if re.search(r"(allows|sea|a name that.*…) \?( |$)", line)]
    assert not marked or "".join(said).replace("\n", " ").count("did not pass the thresholds") == 1
    if width == 200:
        assert len(marked) == {"find": 2, "image": 1, "cofiring": 1, "compare": 2, "latents": 2}.get(name, 0)
    if width == 200 and name == "find":
        assert "\N{REPLACEMENT CHARACTER}[31mred[/red]" in "".join(said)  # what looks like markup is text


@pytest.mark.parametrize("name", query.QUESTIONS)
def test_json_has_all_that_python_has(name: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    opened = results.open(run)
    answers: dict[str, pa.Table] = {
        "top": opened.top_images(0),
        "target": opened.top_images_of("text: x"),
        "image": opened.latents_of("a.jpg"),
        "maps": opened.maps("b.jpg", "chefer").table(),
        "find": opened.find("e"),
        "cofiring": opened.co_firing(0),
        "histogram": opened.histogram(0, 3),
        "compare": opened.compare("width > 30", "width < 30"),
        "latents": opened.latents.sort_by([("extent", "ascending"), ("latent", "ascending")]),
        "sql": opened.sql("SELECT * FROM top_images ORDER BY ALL"),
    }
    assert query.main(asked(run, name, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    expected = answers[name].to_pylist()
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for column, value in wanted.items():
            assert row[column] == (value.hex() if isinstance(value, bytes) else value)


@pytest.mark.parametrize("name", ["image", "find", "cofiring", "compare", "latents"])
def test_json_says_of_every_name_whether_it_is_valid(name: str, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert query.main(asked(run, name, "--json")) == 0
    valid = {row["latent"]: row["valid"] for row in json.loads(capsys.readouterr().out) if row["name"]}
    assert valid
    assert valid.items() <= {0: False, 1: True, 3: False}.items()


def test_what_is_against_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a map of 1, 1, -1 half units by contrib, chefer has 2 against; one of 5, -1, 1 has none."""
    explained = planted.explained

    def turned(chunk: int, methods: tuple[str, ...]) -> pa.Table:
        rows = explained(chunk, methods).to_pylist()
        for one in (one for row in rows for one in row["maps"] or [] if one["latent"] == 0):
            one["map"] = bytes([1, 1, 253])
        return pa.Table.from_pylist(rows, schema=schema.explained_schema(3))

    monkeypatch.setattr(planted, "explained", turned)
    uri = planted.write(tmp_path / "run")
    monkeypatch.setenv("COLUMNS", "80")
    assert query.main(["maps", uri, "b.jpg"]) == 0
    header, *rows, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["latent", "target", "row", "column", "strongest", "against"]
    assert rows[0].split()[:4] == ["1", "1", "1", "1"]  # latent, row, column, strongest
    assert rows[1].split()[:7] == ["0", "1", "1", "0.5", "-1.5", "at", "1,"]
    assert query.main(["maps", uri, "b.jpg", "--json"]) == 0
    found = {row["latent"]: row for row in json.loads(capsys.readouterr().out)}
    assert [found[0][name] for name in ("against", "against_row", "against_column")] == [-1.5, 1, 3]
    assert [found[1][name] for name in ("against", "against_row", "against_column")] == [None] * 3


def test_what_was_found_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = planted.write(tmp_path / "run")
    named = {"latent": pa.array([0, 2], pa.int32()), "name": ["circle", "dark red"], "valid": [False, True]}
    latents.merge(uri, pa.table(named | {"words": [["circle", "Red", "infrared", "blue"], ["dark red", "wine"]]}))
    monkeypatch.setenv("COLUMNS", "80")
    assert query.main(["find", uri, "RED"]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[:3])
    assert header == ["latent", "name", "also"]
    assert rows == [["2", "dark", "red"], ["0", "circle", "?", "Red"]]
    assert query.main(["find", uri, "frar"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["0", "circle", "?", "infrared"]
    assert query.main(["find", uri, "green"]) == 0
    assert "0 rows" in capsys.readouterr().out


def test_latents_without_a_name_among_others_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Latent 3 alone has a name that is not valid: an answer without it explains no mark, one without names has no column."""
    uri = planted.write(tmp_path / "run")
    named = {"latent": pa.array([0, 1, 3], pa.int32()), "name": [None, "sky", "sea"], "valid": [False, True, False]}
    latents.merge(uri, pa.table(named))
    monkeypatch.setenv("COLUMNS", "200")
    assert query.main(["image", uri, "a.jpg"]) == 0
    said = capsys.readouterr().out
    assert "sky" in said
    assert "?" not in said
    assert query.main(["image", uri, "d.jpg"]) == 0
    assert "sea ?" in capsys.readouterr().out
    assert query.main(["image", uri, "c.jpg"]) == 0
    assert "name" not in capsys.readouterr().out.splitlines()[0]


def test_a_target_is_what_was_typed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for spelling in ("text:x", "text: x", " text :  x"):
        assert query.main(["target", run, spelling]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert said[0].split()[:2] == ["key", "cosine"]
    assert "pre_activation" not in said[0]


WRONG = [
    " ",
    "abc",
    "-1",
    "6",
    "1.5",
    "1e30",
    "9" * 23,
    "9" * 6000,
    str(2**63),
    "²",
    "٣",
    "a'b",
    'a"b',
    "a\nb",
    "\x1b[31m",
]
WRONG += ["", "\udcff", "%", "--", "';--", "[red]x[/red]", "a" * 5000]


@pytest.mark.parametrize("name", query.QUESTIONS)
def test_no_wrong_argument_ends_in_a_traceback(
    name: str, run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the place of each argument: an answer, or one printable line and exit code 2, or tyro's own usage and SystemExit 2."""
    monkeypatch.chdir(tmp_path)
    given = asked(run, name)
    options = {"n", "bins", "by", "b", "method"} & set(vars(query.QUESTIONS[name]))
    commands = [[*given[:place], word, *given[place + 1 :]] for place in range(1, len(given)) for word in WRONG]
    commands += [[*given, f"--{flag}", word] for flag in options for word in WRONG]
    commands += [given[:length] for length in range(1, len(given))]
    ended = {outcome(command, capsys) for command in commands}
    assert 2 in ended
    assert ended <= {0, 2, "usage"}
    assert list(tmp_path.iterdir()) == []


def outcome(command: list[str], capsys: pytest.CaptureFixture[str]) -> int | str:
    try:
        code = query.main(command)
    except SystemExit as usage:
        capsys.readouterr()
        return "usage" if usage.code == 2 else f"{command} exits with {usage.code}"
    said = capsys.readouterr().err
    if code:
        assert said.startswith("error: "), command
        assert said.endswith("\n"), command
        assert said[:-1].isprintable(), command
    return code


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("file", ["run.json", "manifest.parquet", "plan.parquet", "maps/chunk-00000000.parquet"])
def test_a_damaged_run_is_told_by_the_name_of_its_file(
    file: str, damage: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    place = tmp_path / "run" / file
    place.unlink() if damage == "gone" else place.write_bytes(place.read_bytes()[:40])
    assert file in mistake(query.main, ["maps", str(tmp_path / "run"), "a.jpg"], capsys)


def test_json_of_what_json_does_not_know(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "SELECT 'nan'::FLOAT AS a, [1.5, 'inf'::DOUBLE] AS b, DATE '2026-11-25' AS c, NULL AS d, 2::HUGEINT AS e"
    assert query.main(["sql", run, asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"a": None, "b": [1.5, None], "c": "2026-11-25", "d": None, "e": "2"}
    ]


def test_maps_go_to_a_file(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert query.main(["maps", run, "b.jpg", "--npy", str(tmp_path / "maps.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), results.open(run).maps("b.jpg").maps)
    assert "chefer" not in capsys.readouterr().out


def test_compare_shows_both_ends(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert query.main(["compare", run, "width > 30", "--n", "1", "--json"]) == 0
    assert [row["latent"] for row in json.loads(capsys.readouterr().out)] == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["query", "top", "{run}", "6"], "latent 6: the latents of this run are 0 to 5"),
        (["query", "top", "{run}", "-1"], "latent -1: the latents of this run are 0 to 5"),
        (["query", "top", "{run}", "sea"], "LATENT sea is no number: did you mean latent 3, sea?"),
        (
            ["query", "cofiring", "{run}", "NAME that"],
            "did you mean latent 0, a name that is as long as the vocabulary",
        ),
        (["query", "histogram", "{run}", "sky"], "LATENT sky is no number, and no latent of this run has that name"),
        (["query", "top", "/no/such/run", "6"], "/no/such/run holds no run"),
        (["query", "top", "{run}", "0", "--n", "0"], "--n 0: must be at least 1"),
        (["query", "histogram", "{run}", "0", "--bins", "-1"], "--bins -1"),
        (["query", "image", "{run}", "z.jpg"], "image z.jpg"),
        (["query", "image", "{run}", "9" * 23], "image 99999999999999999999999: this run has none of that key"),
        (["query", "image", "{run}", "7"], "image 7: this run has none of that number"),
        (["query", "target", "{run}", "text:y"], "target text:y: besides latents, this run explains text: x"),
        (["query", "histogram", "{run}", "0", "--bins", "10001"], "--bins 10001: must be at most 10,000"),
        (["query", "find", "{run}", " "], "WORDS is empty"),
        (["query", "compare", "{run}", ""], "CONDITION is empty"),
        (["query", "sql", "{run}", "SELECT 1; SELECT 2"], "this is 2 statements, SELECT, SELECT"),
        (
            ["query", "sql", "{run}", "FROM read_text('/etc/hostname')"],
            "a question is about the tables of the run only",
        ),
        (["query", "maps", "{run}", "a.jpg", "--method", "tea"], "method tea"),
        (["query", "compare", "{run}", "wdith > 1"], "wdith"),
        (["query", "latents", "{run}", "--by", "beauty"], "--by beauty"),
        (["query", "sql", "{run}", "SELEKT 1"], "SELEKT"),
        (["query", "sql", "{run}", "SELECT beauty FROM latents"], "beauty"),
        (["index", "--run", "/no/such/run"], "holds no run"),
        (["index", "--run", "{run}", "--top", "3"], "--top 3: must be at least 20"),
        (["index", "--run", "{run}", "--memory", "0.1"], "--memory 0.1"),
        (["index", "--run", "{run}", "--segments", "0"], "--segments 0"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], complaint: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job, *given = (argument.format(run=run) for argument in arguments)
    assert complaint in mistake(JOBS[job].main, given, capsys)


def test_every_table_in_every_reader(local_run: Path, tmp_path: Path) -> None:
    """The same values, and maps as bytes, in DuckDB, pandas and Polars, of a real run."""
    shutil.copytree(local_run, tmp_path / "run")
    assert index.main(["--run", str(tmp_path / "run")]) == 0
    for name in (*EXPLAINED, "by_latent", "top_images", "latents.parquet"):
        place = str(tmp_path / "run" / name)
        files = place if name.endswith(".parquet") else f"{place}/*.parquet"
        columns = {
            "duckdb": duckdb.sql(f"FROM '{files}'").to_arrow_table().to_pydict(),
            "pandas": pa.Table.from_pandas(pd.read_parquet(place, dtype_backend="pyarrow")).to_pydict(),
            "polars": pl.read_parquet(files).to_dict(as_series=False),
        }
        assert columns["duckdb"] == columns["pandas"] == columns["polars"], name
        assert len(columns["pandas"]) >= 5


@pytest.mark.parametrize("name", query.QUESTIONS)
def test_help_has_an_example_that_is_a_question(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        query.main([name, "--help"])
    assert ended.value.code == 0
    (example,) = re.findall(r"Example: python -m jobs\.query (.*)", capsys.readouterr().out)
    assert type(query.parse(shlex.split(example))) is query.QUESTIONS[name]

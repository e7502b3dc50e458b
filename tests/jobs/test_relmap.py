"""One program for all commands, `relmap` or `python -m jobs`: what it lists and calls, how it ends; the whole way in one."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jobs.__main__ as relmap
from jobs import commands, explain, run
from saecore.query import results
from saecore.runs.record import read_complete
from tests.conftest import command
from tests.helpers.mistakes import mistake
from tests.test_layout import JOBS, ROOT


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(relmap.NAMES) == JOBS
    assert relmap.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in JOBS)
    assert max(map(len, said.splitlines())) <= 115
    assert relmap.main([]) == 0
    assert capsys.readouterr().out == said


def test_every_example_is_a_command_line_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the work, which is replaced; those in the heads of modules are tried by their --help below."""
    called: list[Any] = []

    def run_job(job: Any) -> int:
        called.append(job)
        return 0

    monkeypatch.setattr(commands, "run_job", run_job)
    for words in relmap.EXAMPLES:
        assert relmap.main(shlex.split(words)) == 0
    assert len(called) == len(relmap.EXAMPLES)


def test_the_list_loads_nothing_large() -> None:
    code = (
        "import sys, jobs.__main__ as relmap; relmap.main(['--help']); relmap.main(['explian']); relmap.main(['--version']); "
        "print(sorted({'torch', 'ray', 'tyro', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("explian", "did you mean explain?"),
        ("indx", "did you mean index?"),
        ("bananas", "python -m jobs --help lists them"),
    ],
)
def test_a_command_that_does_not_exist(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(lambda argv: relmap.main(argv), [word, "--demo"], capsys) == f"{word}: no such command; {hint}"


def without_boxes(said: str) -> str:
    """On one line, without what tyro draws around it, which are letters of ASCII where the output is no terminal."""
    return " ".join(re.sub("[│|╭╮╰╯─]", " ", said).split())


@pytest.mark.parametrize("name", [*JOBS, "query compare"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It has an example, which is this command's; no default that says nothing; no title that says `options` twice."""
    with pytest.raises(SystemExit) as ended:
        relmap.main([*name.split(), "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m jobs.{name} ")
    text = without_boxes(said)
    for nothing in (
        "(default: )",
        "(default: '')",
        "(default: False)",
        "(default: None)",
        "(default: True)",
        "options options",
    ):
        assert nothing not in text
    if name != "query":  # each of its questions has one
        assert re.search(f"Examples?: python -m jobs.{name} ", text)


def test_a_list_that_nobody_reads_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    said = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    os.close(writer)
    assert (said.returncode, said.stderr) == (141, "")


def test_help_begins_with_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        explain.main(["--help"])
    flags = re.findall(r"^\W+(--[a-z][a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert flags[:5] == ["--images", "--clip", "--sae", "--demo", "--out"]


def test_the_help_of_a_flag_that_turns_something_off_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        relmap.main(["train", "--help"])
    text = without_boxes(capsys.readouterr().out)
    assert "--centre, --no-centre Subtract the mean of the embeddings from each embedding. (default: on)" in text


SLOW_IMPORT = """
import sys, time
from pathlib import Path
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "tyro":
            Path(sys.argv[1]).touch()
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                raise ImportError("as a module written in C may have it")
sys.meta_path.insert(0, Slow())
from jobs.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_python_imports(number: int, code: int, tmp_path: Path) -> None:
    """The first second of every command."""
    mark = tmp_path / "reached"
    words = [sys.executable, "-c", SLOW_IMPORT, str(mark), "explain", "--demo", "--out", str(tmp_path / "run")]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == code
        assert process.stderr is not None
        assert process.stderr.read() == "stopped: the same command starts again\n"


def test_a_command_to_run_next_can_be_pasted(tmp_path: Path) -> None:
    """From the folder where this process runs, whatever its words hold."""
    line = commands.line("query", "sql", "no such run; 'quoted'", "SELECT 1")
    said = subprocess.run(
        ["bash", "-c", line], cwd=Path.cwd(), env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert said.returncode == 2
    assert "no such run; 'quoted'" in said.stderr


def test_arguments_and_their_words() -> None:
    """Any arguments are given again by the words that are made of them; defaults need none."""
    bare = ["--demo", "--out", "a folder"]
    rich = [
        "--images",
        "a b",
        "c",
        "--clip",
        "x",
        "--sae",
        "y",
        "--out",
        "z",
        "--k",
        "5",
        "--gpus-per-replica",
        "0.5",
        "--local",
    ]
    rich += [
        "--targets",
        "kept",
        "text:a red square",
        "--norm",
        "exact",
        "--no-legrad-correction",
        "--method",
        "legrad,contrib",
    ]
    for argv in (bare, rich):
        arguments = commands.parse(explain.Arguments, argv, "explain")
        words = commands.words(arguments, explain.Arguments)
        assert sorted(words) == sorted(argv)
        assert commands.parse(explain.Arguments, words, "explain") == arguments


# ---- The whole way.


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run made by one command, and that command."""
    out = tmp_path_factory.mktemp("whole") / "run"
    argv = [word for word in command(shards, out, "--local", "--k", "6") if word != "--keep-embeddings"]
    assert run.main(argv) == 0
    return out, argv


def test_one_command_does_what_four_do(whole: tuple[Path, list[str]]) -> None:
    out, _ = whole
    record = read_complete(str(out))
    assert record.keeps_embeddings
    asked = results.open(str(out))
    assert asked.tables.index is not None
    assert json.loads(asked.latents.schema.metadata[b"naming"])["by"] == "data"
    assert (out / "report" / "index.html").exists()
    # What run.json calls its command makes this run by itself.
    program, words = record.command.split(" ", 3)[:3], shlex.split(record.command)[3:]
    assert program == ["python", "-m", "jobs.explain"]
    assert {"--k", "6", "--local", "--keep-embeddings"} <= set(words)
    assert explain.main(words) == 0


def test_the_same_command_again_says_what_is_done(
    whole: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, argv = whole
    before = (out / "run.json").read_bytes()
    capsys.readouterr()
    assert run.main(argv) == 0
    said = capsys.readouterr().out
    heads = re.findall(r"^(\d of 4  \w+):", said, re.MULTILINE)
    assert heads == ["1 of 4  explain", "2 of 4  index", "3 of 4  name", "4 of 4  report"]
    assert f"{out} is complete: nothing to do" in said
    assert f"{out} is indexed: nothing to do" in said
    assert f"open          {(out / 'report' / 'index.html').as_uri()}\n" in said
    assert said.count("next ") == 1, "steps propose nothing: what comes next is done"
    assert (out / "run.json").read_bytes() == before


def test_without_a_vocabulary_there_are_no_names(
    whole: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, argv = whole
    arguments = dataclasses.replace(commands.parse(run.Arguments, argv, "run"), clip="elsewhere/clip")
    assert [step.name for step in run.way(arguments)] == ["explain", "index", "report"]
    assert [step.name for step in run.way(dataclasses.replace(arguments, vocabulary="words"))][2] == "name"
    monkeypatch.setattr(run, "take", lambda step: 0)
    monkeypatch.setattr(commands, "parse", lambda *given: arguments)
    assert run.main([]) == 0
    assert "no names      latents get some from a file with one word a line" in capsys.readouterr().out


def test_a_step_that_fails_ends_the_way(
    whole: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, argv = whole
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "letter.txt").write_text("not to be replaced")
    assert run.main([*argv, "--pages", str(tmp_path / "pages")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "holds something other than a report" in said[0]
    assert said[1:] == ["ended at step 4 of 4, report; the same command goes on there"]


def test_mistakes_are_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("one\n")
    demo = ["--demo", "--out", str(tmp_path / "run")]
    assert "--vocabulary" in mistake(run.main, [*demo, "--vocabulary", str(tmp_path / "none.txt")], capsys)
    assert "at least 2" in mistake(run.main, [*demo, "--vocabulary", str(tmp_path / "words.txt")], capsys)
    assert "--pages" in mistake(run.main, ["--demo", "--out", "s3://bucket/run"], capsys)
    assert "--demo for all three" in mistake(run.main, ["--out", "x"], capsys)
    assert not (tmp_path / "run").exists()

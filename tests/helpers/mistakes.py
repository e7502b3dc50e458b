"""How every command tells a mistake: one sentence on standard error, nothing on standard output, exit code 2."""

from collections.abc import Callable

import pytest


def mistake(main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence, without `error: ` before it; a test that expects a mistake fails here if the command does anything else."""
    capsys.readouterr()  # what was said before is not this command's
    code = main(argv)
    said = capsys.readouterr()
    assert code == 2, said
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.endswith("\n")
    sentence = said.err.removeprefix("error: ").removesuffix("\n")
    assert sentence.isprintable(), "a line break, or another character that moves a terminal"
    return sentence

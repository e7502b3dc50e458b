"""What only a command knows: flags, how a sentence of the library comes to name one, and how help shows them."""

import dataclasses
import re
from typing import Annotated

import pytest
import tyro

from jobs import commands


@dataclasses.dataclass
class Owner:
    batch_size: int = 0
    nested: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("batch_size 0: must be at least 1", "--batch-size 0: must be at least 1"),
        ("nested: no levels", "--nested: no levels"),
        ("batch sizes differ", "batch sizes differ"),
        ("what batch_size says", "what batch_size says"),
        ("other_field 3: too many", "other_field 3: too many"),
        ("", ""),
    ],
)
def test_a_field_at_the_start_of_a_sentence_becomes_its_flag(sentence: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"), commands.given_fields(Owner()):
        raise ValueError(sentence)


@dataclasses.dataclass
class Inner:
    centre: bool = True
    tied: bool = False


@dataclasses.dataclass
class Outer:
    inner: Annotated[Inner, tyro.conf.arg(name="")]
    quiet: bool = False
    sure: bool = True

    def check(self) -> None:
        """Nothing contradicts itself."""


def test_a_boolean_that_is_on_reads_forwards_and_one_that_is_off_has_one_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        commands.parse(Outer, ["--help"], "jobs.outer")
    shown = capsys.readouterr().out
    assert "--centre, --no-centre" in shown
    assert "--sure, --no-sure" in shown
    assert "--no-tied" not in shown
    assert "--no-quiet" not in shown
    assert commands.parse(Outer, [], "jobs.outer") == Outer(Inner())
    assert commands.parse(Outer, ["--no-centre", "--tied", "--quiet"], "m") == Outer(Inner(False, True), True)
    assert commands.parse(Outer, ["--centre", "--no-sure"], "m") == Outer(Inner(), sure=False)

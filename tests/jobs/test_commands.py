"""How a sentence of the library comes to name a flag: only the job knows that there are flags."""

import dataclasses
import re

import pytest

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

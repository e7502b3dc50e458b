"""The request that says which targets are explained: kept latents, latents by number, texts, concepts.

The formulas of targets are in `saecore.relevance.targets`. This module needs no PyTorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

from saecore.methods import once


class TargetRequest(NamedTuple):
    """The targets that are explained for every image."""

    kept: bool
    """Whether the image's kept latents are explained."""
    latents: tuple[int, ...]
    """Latents that are explained whether they are kept or not."""
    texts: tuple[str, ...]
    """Texts: the cosine between the embedding and the embedding of each text is explained."""
    concepts: tuple[str, ...]
    """Words: for each, the weighted sum of the latents that the word names is explained."""

    @property
    def words(self) -> tuple[str, ...]:
        """The texts and words that CLIP's text tower must embed."""
        return self.texts + self.concepts

    def labels(self) -> list[str]:
        """The names of the word targets in the column `target` of MAPS."""
        return [f"text: {text}" for text in self.texts] + [f"concept: {word}" for word in self.concepts]

    def specs(self) -> list[str]:
        """The request as `parse_targets` reads it. Equal requests have one spelling, which goes into the fingerprint."""
        numbers = ",".join(map(str, self.latents))
        latents = ["kept"] * self.kept + [f"latents:{numbers}"] * bool(numbers)
        words = [f"text:{text}" for text in self.texts] + [f"concept:{word}" for word in self.concepts]
        return latents + words if latents else ["no-kept", *words]


KEPT = TargetRequest(True, (), (), ())


def parse_targets(specs: Sequence[str]) -> TargetRequest:
    """`kept`, `no-kept`, `latents:3,17`, `text:a red square`, `concept:red`, in any number -> the request.

    Texts and concepts add to the kept latents. Latents by number replace the kept latents unless `kept` is given too.
    `no-kept` omits the kept latents. ValueError for any other text, for a contradiction, and if nothing is left to explain.
    """
    switches, latents, texts, concepts = set[str](), list[int](), list[str](), list[str]()
    for spec in specs:
        kind, _, rest = (part.strip() for part in spec.partition(":"))
        if kind in ("kept", "no-kept") and not rest:
            switches.add(kind)
        elif kind == "latents" and all(number.strip().isdecimal() for number in rest.split(",")):
            latents += [int(number) for number in rest.split(",")]
        elif kind in ("text", "concept") and rest:
            (texts if kind == "text" else concepts).append(rest)
        else:
            raise ValueError(
                f"targets {spec!r}: must be kept, no-kept, latents:NUMBER[,NUMBER], text:A PHRASE or concept:A WORD"
            )
    if not specs:
        raise ValueError("targets: give at least one, kept for example")
    if len(switches) > 1:
        raise ValueError("targets kept no-kept: one asks for what the other omits; give one of them")
    if "no-kept" in switches and not (latents or texts or concepts):
        raise ValueError("targets no-kept leaves nothing to explain; add a text:A PHRASE, for example")
    kept = "kept" in switches or not (switches or latents)
    return TargetRequest(kept, once(latents), once(texts), once(concepts))

"""How maps are made, beside the arithmetic: the methods' names, their options, and what is to be explained. No PyTorch.

    method         gives                                 units             cost aimed at for 32 maps, in forwards
    contrib        exact decomposition                   pre-activation    1.10
    contrib_grad   attention times its exact gradient    pre-activation    1.30 (1.75 on ViT-B/32)
    chefer         positive part of the same, one layer  none              1.10
    legrad         positive part of the gradient         none              1.10; of the mean token: several forwards
    gradeclip      gradient with key-query weights       none              1.10
    rollout        gradients rolled through all layers   a share           one plain-attention forward, a backward per target
    dense          patch tokens read as if they were CLS pre-activation    1.05
    occlusion      what dropping a patch changes         pre-activation    a forward per patch or block, for all targets
    attention      CLS attention                         none              1.00

What they did cost is in BENCHMARKS.md. Formulas are with the functions, in `saecore.relevance` and `saecore.reruns`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

METHODS = ("contrib", "contrib_grad", "chefer", "legrad", "gradeclip", "rollout", "dense", "occlusion", "attention")
"""How maps can be computed."""

DECOMPOSE = ("contrib", "contrib_grad")
"""Methods whose maps add up to the pre-activation with their remainder."""

UNITS = dict.fromkeys((*DECOMPOSE, "occlusion"), "pre-activation units") | {"dense": "target at each patch"}
"""What methods are in; the others are in no units."""

CAUSES = tuple(name for name in METHODS if name not in ("dense", "attention"))
"""Methods that say what a target depends on. `dense` shows an activation, `attention` knows nothing of the target."""

PRECISE = ("occlusion",)
"""Methods that take the difference of two forwards, where what bfloat16 rounds off is as large as what a patch changes: on the
embedded models their maps were 6 % off, the other methods' 1 %."""

CHOICES = {"norm": ("frozen", "exact"), "legrad_target": ("cls", "mean"), "dense": ("token", "value")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the methods leave open; each field says whom it concerns."""

    layers: int = 0
    """Last layers that contrib, contrib_grad, chefer and legrad look at; 0 is all for the first two and one for the others. Of
    SigLIP there is only its pooling to look at, except for legrad's `mean`."""
    norm: str = "frozen"
    """The final LayerNorm, a text's division by |e| and an SAE's own normaliser: `frozen` at the image's values, or `exact`,
    differentiated too. Not for attention; occlusion is always exact."""
    legrad_target: str = "cls"
    """What legrad reads: `cls`, the embedding itself, or `mean`, the published surrogate: each layer's mean token, or, of
    SigLIP, each layer's tokens pooled."""
    discard: float = 0.9
    """Share of each layer's smallest weights that rollout drops."""
    dense: str = "token"
    """What dense reads of a patch: its `token` in CLS's place, or its last `value` through the CLS token's way out."""
    block: int = 1
    """Side of the square of patches that occlusion drops at once."""

    def check(self) -> None:
        """ValueError for what cannot be. Not at construction: tyro would draw a box around the sentence."""
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"--{field.replace('_', '-')} {getattr(self, field)!r} is not one of {', '.join(choices)}"
                )
        if self.layers < 0:
            raise ValueError(f"--layers {self.layers}: must be 0, for the method's own number, or more")
        if not 0 <= self.discard < 1:
            raise ValueError(f"--discard {self.discard}: a share, from 0 to below 1")
        if self.block < 1:
            raise ValueError(f"--block {self.block}: must be at least 1")


DEFAULT_OPTIONS = Options()


def dtype_of(device: str, methods: Sequence[str] = ()) -> str:
    """The tower's precision: bfloat16 on CUDA, unless a method needs float32."""
    return "bfloat16" if device == "cuda" and not set(methods) & set(PRECISE) else "float32"


def parse_methods(names: str) -> tuple[str, ...]:
    """`contrib,chefer` -> each method once, in that order; ValueError for one that is none."""
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if wrong := [name for name in found if name not in METHODS]:
        raise ValueError(f"--method {wrong[0]}: must be one or several, joined by commas, of {', '.join(METHODS)}")
    return found


class Wanted(NamedTuple):
    """What is explained of every image."""

    kept: bool
    """Its kept latents."""
    latents: tuple[int, ...]
    """These latents, kept or not."""
    texts: tuple[str, ...]
    """The cosine between the embedding and these texts'."""
    concepts: tuple[str, ...]
    """Weighted sums of the latents that these words name."""

    @property
    def words(self) -> tuple[str, ...]:
        """What CLIP's text tower is needed for."""
        return self.texts + self.concepts

    def labels(self) -> list[str]:
        """How targets that are no latent are called in the column `target` of MAPS."""
        return [f"text: {text}" for text in self.texts] + [f"concept: {word}" for word in self.concepts]

    def specs(self) -> list[str]:
        """As `parse_targets` takes them: one spelling for all that ask for the same, which a fingerprint is made of."""
        numbers = ",".join(map(str, self.latents))
        own = ["kept"] * self.kept + [f"latents:{numbers}"] * bool(numbers)
        words = [f"text:{text}" for text in self.texts] + [f"concept:{word}" for word in self.concepts]
        return own + words if own else ["no-kept", *words]


KEPT = Wanted(True, (), (), ())


def parse_targets(specs: Sequence[str]) -> Wanted:
    """`kept`, `no-kept`, `latents:3,17`, `text:a red square`, `concept:red`, any of them several times -> what is explained.

    Texts and concepts add to the kept latents; latents by number stand in for them, unless `kept` is there too; `no-kept`
    leaves them away. ValueError for anything else, for a contradiction, and where nothing is left.
    """
    alone, latents, texts, concepts = set[str](), list[int](), list[str](), list[str]()
    for spec in specs:
        kind, _, rest = (part.strip() for part in spec.partition(":"))
        if kind in ("kept", "no-kept") and not rest:
            alone.add(kind)
        elif kind == "latents" and all(number.strip().isdecimal() for number in rest.split(",")):
            latents += [int(number) for number in rest.split(",")]
        elif kind in ("text", "concept") and rest:
            (texts if kind == "text" else concepts).append(rest)
        else:
            raise ValueError(
                f"--targets {spec!r}: must be kept, no-kept, latents:NUMBER[,NUMBER], text:A PHRASE or concept:A WORD"
            )
    if not specs:
        raise ValueError("--targets: give at least one, kept for example")
    if len(alone) > 1:
        raise ValueError("--targets kept no-kept: one asks for what the other leaves away; give one of them")
    if "no-kept" in alone and not (latents or texts or concepts):
        raise ValueError("--targets no-kept leaves nothing to explain; name a text:A PHRASE beside it, for example")
    kept = "kept" in alone or not (alone or latents)
    return Wanted(kept, _once(latents), _once(texts), _once(concepts))


def _once(items: list[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))

"""How maps are made, beside the arithmetic: the methods' names, their options, and what is to be explained. No PyTorch.

    method         gives                                 units             cost aimed at for 32 maps, in forwards
    contrib        exact decomposition                   pre-activation    1.10
    contrib_grad   attention times its exact gradient    pre-activation    1.30 (1.75 on ViT-B/32)
    chefer         positive part of the same, one layer  none              1.10
    legrad         positive part of the gradient         none              several forwards; of CLS: 1.10
    gradeclip      gradient with key-query weights       none              1.10
    rollout        gradients rolled through all layers   a share           one plain-attention forward, a backward per target
    dense          patch tokens read as if they were CLS pre-activation    1.05
    occlusion      what dropping a patch changes         pre-activation    a forward per patch or block, for all targets
    attention      CLS attention                         none              1.00

What bears a published name is computed as published unless an option says otherwise; `RECORDS` says which, and what each
looks at. What they did cost is in docs/benchmarks.md. Formulas are with the functions, in `saecore.relevance.maps` and
`saecore.relevance.reruns`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Method(NamedTuple):
    """What a method is. The table in docs/maps.md says the same of each, and a test compares the two."""

    norm: str
    """Its own norm: `frozen` or `exact`, see `Options.norm`; `always exact`, or `none` where there is nothing to hold."""
    layers: int | None
    """How many last layers it looks at unless told otherwise, 0 for all; None if it looks at no layer's attention."""
    target: str
    """What its gradient or read-out begins at: `embedding`, `layer` (each layer's own), `patch` (each patch's) or `none`."""
    units: str
    """What its values are in; empty where they are in no units."""
    published: str
    """Who published it, where it is computed as published; empty for our own."""


RECORDS = {
    "contrib": Method("frozen", 0, "embedding", "pre-activation units", ""),
    "contrib_grad": Method("frozen", 0, "embedding", "pre-activation units", ""),
    "chefer": Method("exact", 1, "embedding", "", "Chefer et al. 2021"),
    "legrad": Method("exact", 2, "layer", "", "Bousselham et al. 2024"),
    "gradeclip": Method("exact", 1, "embedding", "", "Zhao et al. 2024"),
    "rollout": Method("exact", 0, "embedding", "", "relevancy_map_SAE 2025"),
    "dense": Method("frozen", None, "patch", "target at each patch", ""),
    "occlusion": Method("always exact", None, "embedding", "pre-activation units", ""),
    "attention": Method("none", 1, "none", "", ""),
}
"""Every method, by name."""

METHODS = tuple(RECORDS)
"""How maps can be computed."""

DECOMPOSE = ("contrib", "contrib_grad")
"""Methods whose maps add up to the pre-activation with their remainder."""

UNITS = {name: method.units for name, method in RECORDS.items() if method.units}
"""What methods are in; the others are in no units."""

CAUSES = tuple(name for name in METHODS if name not in ("dense", "attention"))
"""Methods that say what a target depends on. `dense` shows an activation, `attention` knows nothing of the target."""

PRECISE = ("occlusion",)
"""Methods that take the difference of two forwards, where what bfloat16 rounds off is as large as what a patch changes: on the
embedded models their maps were 6 % off, the other methods' 1 %."""

CHOICES = {
    "norm": ("auto", "frozen", "exact"),
    "legrad_target": ("mean", "cls"),
    "gradeclip_cosine": ("inside", "projected"),
    "dense": ("token", "value"),
}

BLANK_TEXT = "a photo of a"
"""What LeGrad's published code takes for a text that says nothing, to find patches that light for any text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the methods leave open; each field says whom it concerns."""

    layers: int = 0
    """Last layers that contrib, contrib_grad, chefer and legrad look at; 0 is the method's own number: all for the first two,
    the last for chefer, the last two for legrad (as its code has it; its paper takes all). With more than the last, chefer
    and legrad's `cls` follow the CLS path. Of SigLIP there is only its pooling to look at, except for legrad's `mean`."""
    norm: str = "auto"
    """The final LayerNorm, a text's division by |e| and an SAE's own normaliser: `frozen` at the image's values, `exact`, that
    is differentiated too, or `auto`, the method's own: exact for chefer, legrad, gradeclip and rollout, which are published
    so, frozen for the others. Not for attention; occlusion and dense's `token` are always exact."""
    legrad_target: str = "mean"
    """What legrad reads: `mean`, as published: each layer's mean token, or, of SigLIP, each layer's tokens pooled; or `cls`,
    ours, which costs less: the embedding itself, along the CLS path."""
    legrad_correction: bool = True
    """Of SigLIP, zero the patches that legrad's `mean` also lights for a text that says nothing, as published."""
    gradeclip_cosine: str = "inside"
    """What gradeclip weights patches by: the cosine of query and keys `inside` the attention, as its notebook has it, or
    `projected` by the attention's way out, as its scripts have it."""
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

    def norm_of(self, method: str) -> str:
        """The norm that a method is computed with: `frozen`, `exact`, or what its record says where there is no choice."""
        own = RECORDS[method].norm
        if method == "dense" and self.dense == "token":
            return "always exact"
        return self.norm if self.norm != "auto" and own in ("frozen", "exact") else own

    def layers_of(self, method: str, available: int) -> int:
        """How many last layers a method looks at, of so many that there are to look at."""
        return self.layers or min(RECORDS[method].layers or available, available)


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

"""The methods by which maps are made: one record each, their options, and the request that says what is to be explained.

`METHODS` is the only place that knows a method's facts: its name, what it gives, its units, what it looks at and what it needs.
The command line, the pages, the table in docs/maps.md and what a tower must keep of its forward are made of it. The
formulas are with the functions, in `saecore.relevance`; what each method costs was measured in docs/benchmarks.md.

A method with a published name is computed as published unless an option says otherwise. No PyTorch here.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What a method is."""

    gives: str
    """What its maps show, in words for a page."""
    norm: str
    """Its own norm: `frozen` or `exact`, see `Options.norm`; `always exact`, or `none` where there is nothing to hold."""
    layers: int | None
    """How many last layers it looks at unless told otherwise, 0 for all; None if it looks at no layer's attention."""
    target: str
    """What its gradient or read-out begins at: `embedding`, `layer` (each layer's own), `patch` (each patch's) or `none`."""
    units: str = ""
    """The units of its values; empty if they have none."""
    published: str = ""
    """Who published it, if it is computed as published; empty for our own."""
    decomposes: bool = False
    """Whether a map and its remainder add up to the pre-activation."""
    is_cause: bool = True
    """Whether it says what a target depends on. `dense` shows an activation, `attention` knows nothing of the target."""
    takes_layers: bool = False
    """Whether `Options.layers` concerns it."""
    follows_path: bool = False
    """Whether it takes the gradient along the CLS path, which needs the keys of every layer below the last."""
    has_own_forwards: bool = False
    """Whether it runs the tower itself, and so needs nothing of the forward that all methods share."""
    needs_float32: bool = False
    """Whether it takes the difference of two forwards, where what bfloat16 rounds off is as large as what a patch changes: on
    the embedded models such maps were 6 % off, those of the other methods 1 %."""


PRE_ACTIVATION = "pre-activation units"

METHODS = {
    "contrib": Method(
        gives="exact contribution of each patch to the CLS token",
        norm="frozen",
        layers=0,
        target="embedding",
        units=PRE_ACTIVATION,
        decomposes=True,
        takes_layers=True,
    ),
    "contrib_grad": Method(
        gives="attention times its exact gradient along the CLS path",
        norm="frozen",
        layers=0,
        target="embedding",
        units=PRE_ACTIVATION,
        decomposes=True,
        takes_layers=True,
        follows_path=True,
    ),
    "chefer": Method(
        gives="Transformer-MM-Explainability's rule",
        norm="exact",
        layers=1,
        target="embedding",
        published="Chefer et al. 2021",
        takes_layers=True,
        follows_path=True,
    ),
    "legrad": Method(
        gives="gradient of the target by attention",
        norm="exact",
        layers=2,
        target="layer",
        published="Bousselham et al. 2024",
        takes_layers=True,
        follows_path=True,
    ),
    "gradeclip": Method(
        gives="Grad-ECLIP with the model's real heads",
        norm="exact",
        layers=1,
        target="embedding",
        published="Zhao et al. 2024",
    ),
    "rollout": Method(
        gives="gradient-weighted rollout through all layers",
        norm="exact",
        layers=0,
        target="embedding",
        published="relevancy_map_SAE 2025",
        has_own_forwards=True,
    ),
    "dense": Method(
        gives="each patch's own token read by the SAE: an activation, not a cause",
        norm="frozen",
        layers=None,
        target="patch",
        units="target at each patch",
        is_cause=False,
    ),
    "occlusion": Method(
        gives="what the target loses when a patch is taken out",
        norm="always exact",
        layers=None,
        target="embedding",
        units=PRE_ACTIVATION,
        has_own_forwards=True,
        needs_float32=True,
    ),
    "attention": Method(
        gives="CLS attention, which knows nothing of the target",
        norm="none",
        layers=1,
        target="none",
        is_cause=False,
    ),
}
"""Every method, by name."""

UNKNOWN = Method(gives="", norm="none", layers=None, target="none", is_cause=False)
"""What is known of a method of another version, whose runs can still be looked at, and of a run without maps."""

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
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.layers < 0:
            raise ValueError(f"layers {self.layers}: must be 0, for the method's own number, or more")
        if not 0 <= self.discard < 1:
            raise ValueError(f"discard {self.discard}: a share, from 0 to below 1")
        if self.block < 1:
            raise ValueError(f"block {self.block}: must be at least 1")

    def norm_of(self, method: str) -> str:
        """The norm that a method is computed with: `frozen`, `exact`, or what its record says where there is no choice."""
        own = METHODS[method].norm
        if method == "dense" and self.dense == "token":
            return "always exact"
        return self.norm if self.norm != "auto" and own in ("frozen", "exact") else own

    def layers_of(self, method: str, available: int) -> int:
        """How many last layers a method looks at, of so many that there are to look at."""
        return self.layers or min(METHODS[method].layers or available, available)


DEFAULT_OPTIONS = Options()


def dtype_of(device: str, methods: Sequence[str] = ()) -> str:
    """The tower's precision: bfloat16 on CUDA, unless a method needs float32."""
    return (
        "bfloat16" if device == "cuda" and not any(METHODS[method].needs_float32 for method in methods) else "float32"
    )


def parse_methods(names: str) -> tuple[str, ...]:
    """`contrib,chefer` -> each method once, in that order; ValueError for one that is none."""
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    if wrong := [name for name in found if name not in METHODS]:
        raise ValueError(f"method {wrong[0]}: must be one or several, joined by commas, of {', '.join(METHODS)}")
    return found


class TargetRequest(NamedTuple):
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


KEPT = TargetRequest(True, (), (), ())


def parse_targets(specs: Sequence[str]) -> TargetRequest:
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
                f"targets {spec!r}: must be kept, no-kept, latents:NUMBER[,NUMBER], text:A PHRASE or concept:A WORD"
            )
    if not specs:
        raise ValueError("targets: give at least one, kept for example")
    if len(alone) > 1:
        raise ValueError("targets kept no-kept: one asks for what the other omits; give one of them")
    if "no-kept" in alone and not (latents or texts or concepts):
        raise ValueError("targets no-kept leaves nothing to explain; add a text:A PHRASE, for example")
    kept = "kept" in alone or not (alone or latents)
    return TargetRequest(kept, _once(latents), _once(texts), _once(concepts))


def _once(items: list[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))

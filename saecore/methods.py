"""The methods that make maps, with their options.

`METHODS` is the only place that knows a method's facts: its name, what it shows, its units, what it looks at and what it needs.
The command line, the pages, the table in docs/maps.md and what a tower keeps of its forward all follow from it. The formulas
are with the functions, in `saecore.relevance`. docs/benchmarks.md has the measured costs.

A method with a published name is computed as published unless an option says otherwise. This module needs no PyTorch.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The facts of a method."""

    gives: str
    """What its maps show, in words for a page."""
    norm: str
    """Its own norm: `frozen` or `exact`, see `Options.norm`; `always exact`; or `none` if the method passes no norm."""
    layers: int | None
    """How many last layers it looks at by default, 0 for all; None if it looks at no layer's attention."""
    target: str
    """Where its gradient or read-out begins: `embedding`, `layer` (each layer has its own target), `patch` (so has each patch)
    or `none`."""
    units: str = ""
    """The units of its values; empty if the values have no units."""
    published: str = ""
    """Who published it, if it is computed as published; empty for our own methods."""
    decomposes: bool = False
    """Whether a map and its remainder add up to the pre-activation."""
    is_cause: bool = True
    """Whether it says what a target depends on. `dense` shows an activation; `attention` does not know the target."""
    takes_layers: bool = False
    """Whether `Options.layers` changes it."""
    follows_path: bool = False
    """Whether it takes the gradient along the CLS path, which needs the keys of every layer below the last."""
    has_own_forwards: bool = False
    """Whether it runs the tower itself and needs nothing from the forward that the other methods share."""
    of_embedding: bool = True
    """Whether it explains read-outs of one vector of an image: of the embedding, or of CLS after a layer."""
    of_tokens: bool = False
    """Whether it explains what an SAE reads of an image's tokens."""
    needs_own_token: bool = False
    """Whether it begins at the embedding without any patch, which only a tower with a token of its own has."""
    needs_head: bool = False
    """Whether it needs a head that was trained on its tower (`saecore.removal.head`)."""
    needs_float32: bool = False
    """Whether it subtracts two forwards. The rounding of bfloat16 is as large as the effect of one patch: on the embedded
    models such maps were 6 % off in bfloat16, and those of the other methods 1 %."""


PRE_ACTIVATION = "pre-activation units"

ACTIVATION = "activation"
"""The method that shows where a latent of an SAE that reads tokens is active."""

SHAPLEY, REMOVAL = "shapley", "removal"
"""What removing patches does: the Shapley values by sampling, and their prediction by a trained head."""

METHODS = {
    "contrib": Method(
        gives="exact contribution of each patch to the CLS token",
        norm="frozen",
        layers=0,
        target="embedding",
        units=PRE_ACTIVATION,
        decomposes=True,
        takes_layers=True,
        of_tokens=True,
    ),
    "contrib_grad": Method(
        gives="attention times its exact gradient along the path of the CLS token",
        norm="frozen",
        layers=0,
        target="embedding",
        takes_layers=True,
        follows_path=True,
        units=PRE_ACTIVATION,
        decomposes=True,
        of_tokens=True,
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
        of_tokens=True,
    ),
    SHAPLEY: Method(
        gives="the Shapley value of each patch: what it is worth, averaged over which others are there",
        norm="frozen",
        layers=None,
        target="embedding",
        units=PRE_ACTIVATION,
        decomposes=True,
        has_own_forwards=True,
        needs_own_token=True,
        needs_float32=True,
    ),
    REMOVAL: Method(
        gives="the Shapley value of each patch, as a trained head predicts it from one forward",
        norm="frozen",
        layers=None,
        target="embedding",
        units=PRE_ACTIVATION,
        decomposes=True,
        needs_own_token=True,
        needs_head=True,
    ),
    "attention": Method(
        gives="attention of the CLS token, which knows nothing of the target",
        norm="none",
        layers=1,
        target="none",
        is_cause=False,
        of_tokens=True,
    ),
    ACTIVATION: Method(
        gives="the latent's activation at each patch: where it is active, not what causes it",
        norm="none",
        layers=None,
        target="patch",
        units="activation at each patch",
        is_cause=False,
        of_embedding=False,
        of_tokens=True,
    ),
}
"""Every method, by name."""

OF_EMBEDDING = tuple(name for name, method in METHODS.items() if method.of_embedding)
OF_EVERY_TOWER = tuple(name for name in OF_EMBEDDING if not METHODS[name].needs_own_token)
OF_TOKENS = tuple(name for name, method in METHODS.items() if method.of_tokens)

AUTO = "auto"

DEFAULT_METHODS = {"embedding": ("contrib",), "head": (REMOVAL,), "tokens": ("contrib", ACTIVATION)}
"""The methods of a run that names none, by what its SAE reads; `head` where that is one vector and a head is given. Of the maps
that need no training contrib points best, at a few percent of a forward; those of a head are more faithful (docs/maps.md)."""

UNKNOWN = Method(gives="", norm="none", layers=None, target="none", is_cause=False)
"""Stands for the methods of another version, whose runs can still be read, and for a run without maps."""

CHOICES = {
    "norm": ("auto", "frozen", "exact"),
    "legrad_target": ("mean", "cls"),
    "gradeclip_cosine": ("inside", "projected"),
    "dense": ("token", "value"),
}

BLANK_TEXT = "a photo of a"
"""The text that LeGrad's published code uses as one that says nothing, to find patches that light for any text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose about the methods; each field names the methods that it concerns."""

    layers: int = 0
    """How many last layers contrib, contrib_grad, chefer and legrad look at; 0 is the method's own number: all layers for the
    first two, the last for chefer, the last two for legrad (as in its code; its paper takes all). With more than the last
    layer, chefer and legrad's `cls` follow the CLS path. A SigLIP has only its pooling to look at, except for legrad's
    `mean`."""
    norm: str = "auto"
    """How the final LayerNorm, a text's division by |e| and an SAE's own normaliser are treated: `frozen` holds them at the
    image's values, `exact` differentiates them too, and `auto` is the method's own norm: exact for chefer, legrad, gradeclip
    and rollout, as published, and frozen for the others. It does not concern attention; occlusion and dense's `token` are
    always exact."""
    legrad_target: str = "mean"
    """What legrad reads: `mean`, as published, is each layer's mean token, or for SigLIP each layer's pooled tokens; `cls` is
    ours and costs less: the embedding itself, along the CLS path."""
    legrad_correction: bool = True
    """For SigLIP, set to zero the patches that legrad's `mean` also lights for a text that says nothing, as published."""
    gradeclip_cosine: str = "inside"
    """The cosine by which gradeclip weights patches: of query and keys `inside` the attention, as in its notebook, or of both
    `projected` by the attention's output weights, as in its scripts."""
    discard: float = 0.9
    """Share of each layer's smallest weights that rollout drops."""
    dense: str = "token"
    """What dense reads of a patch: its `token` in CLS's place, or its last `value` through the attention's output weights."""
    block: int = 1
    """Side, in patches, of the square that occlusion drops at once."""
    subsets: int = 960
    """Subsets of patches on which shapley runs the tower. With four times as many, its standard error is half as large."""

    def check(self) -> None:
        """ValueError for impossible values. Not at construction, because tyro would draw a box around the sentence."""
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.layers < 0:
            raise ValueError(f"layers {self.layers}: must be 0, for the method's own number, or more")
        if not 0 <= self.discard < 1:
            raise ValueError(f"discard {self.discard}: must be a share, from 0 to below 1")
        if self.block < 1:
            raise ValueError(f"block {self.block}: must be at least 1")
        if self.subsets < 1:
            raise ValueError(f"subsets {self.subsets}: must be at least 1")

    def norm_of(self, method: str) -> str:
        """The norm that a method is computed with: `frozen`, `exact`, or `Method.norm` if the method leaves no choice."""
        own = METHODS[method].norm
        if method == "dense" and self.dense == "token":
            return "always exact"
        return self.norm if self.norm != "auto" and own in ("frozen", "exact") else own

    def layers_of(self, method: str, available: int) -> int:
        """How many last layers a method looks at, if `available` layers can be looked at."""
        return self.layers or min(METHODS[method].layers or available, available)


DEFAULT_OPTIONS = Options()


PRECISIONS = ("auto", "float32", "bfloat16")
"""What a user can ask of the tower. docs/benchmarks.md says why `auto` is float32 on a CPU."""


def dtype_of(device: str, methods: Sequence[str] = (), precision: str = "auto") -> str:
    """The tower's precision as it was asked for; `auto` is bfloat16 on CUDA, unless a method needs float32.

    It depends on no machine's processor, so that all replicas of a run compute in the same one.
    """
    if precision != "auto":
        return precision
    return "bfloat16" if device == "cuda" and not _need_float32(methods) else "float32"


def check_precision(precision: str, methods: Sequence[str] = ()) -> None:
    """ValueError for a word that is no precision, and for bfloat16 with a method that needs float32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "bfloat16" and (needing := _need_float32(methods)):
        raise ValueError(
            f"precision bfloat16: {needing[0]} subtracts two forwards, which needs float32; ask for one of the two"
        )


def _need_float32(methods: Sequence[str]) -> list[str]:
    return [method for method in methods if METHODS[method].needs_float32]


def methods_for(names: str, reads_tokens: bool, has_head: bool = False) -> tuple[str, ...]:
    """`parse_methods` for an SAE that reads tokens, or one vector of an image; `auto` is what suits it, and the head if one was
    given. ValueError for a method that has no meaning there."""
    if names == AUTO:
        return DEFAULT_METHODS["tokens" if reads_tokens else "head" if has_head else "embedding"]
    methods = parse_methods(names)
    known, reads = (OF_TOKENS, "the tokens of a layer") if reads_tokens else (OF_EMBEDDING, "one vector for each image")
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(
            f"method {unknown[0]}: has no meaning for an SAE that reads {reads}; for it there are {', '.join(known)}"
        )
    return methods


def parse_methods(names: str) -> tuple[str, ...]:
    """`contrib,chefer` -> each method once, in that order; `auto` is none yet. ValueError for a name that is no method."""
    if names == AUTO:
        return ()
    methods = once(name.strip() for name in names.split(","))
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"method {unknown[0]}: must be one or several, joined by commas, of {', '.join(METHODS)}")
    return methods


def once(items: Iterable[T]) -> tuple[T, ...]:
    return tuple(dict.fromkeys(items))

"""One forward, many maps: what a tower must keep of its forward for some methods, and the maps that they make of it.

    pixels -> tower -> embedding, trace -> targets -> maps of every target by every method

`explain_latents` does all of it for given latents. A run chooses the latents by the embedding, so it calls the tower itself,
and then `explain_forward`, which `explain_latents` calls too.

Shapes: B images, k latents; the others are those of `saecore.relevance.maps`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from saecore.methods import DEFAULT_OPTIONS, METHODS, REMOVAL, SHAPLEY, Options
from saecore.relevance import maps, tokens
from saecore.relevance.maps import Batch, Maps
from saecore.relevance.occlusion import occlusion, predicted, sampled
from saecore.relevance.rollout import rollout
from saecore.relevance.targets import Targets, WordTargets, no_word_targets
from saecore.removal.head import Head, check_belongs, check_tower
from saecore.sae.model import SAE
from saecore.towers.tokens import TokenTower
from saecore.towers.tower import ImageTower, Trace
from saecore.untrusted import about

FUNCTIONS: dict[str, Callable[[Batch], Maps]] = {
    "contrib": maps.contrib,
    "contrib_grad": maps.contrib_grad,
    "chefer": maps.chefer,
    "legrad": maps.legrad,
    "gradeclip": maps.gradeclip,
    "rollout": rollout,
    "dense": maps.dense,
    "occlusion": occlusion,
    SHAPLEY: sampled,
    REMOVAL: predicted,
    "attention": maps.attention,
}
"""The function of each method of `saecore.methods.OF_EMBEDDING`. All take one `Batch`, and none changes it."""


def trace_needs(methods: Iterable[str], options: Options, n_layers: int) -> dict[str, int]:
    """The arguments `layers`, `keys` and `tokens` of a tower's forward, so that its trace holds what these methods read.

    `n_layers` is the length of the tower's path. The trace holds no more than is needed: keys double its size, and if residual
    streams are kept, the last layer cannot compute only the CLS token.
    """
    depths = {
        name: n_layers
        if METHODS[name].needs_head
        else options.layers_of(name, n_layers)
        if METHODS[name].takes_layers
        else 1
        for name in methods
        if not METHODS[name].has_own_forwards
    }
    keys, streams = False, 0
    for name, depth in depths.items():
        if name == "legrad" and options.legrad_target == "mean":
            # Each layer's own target is read from the tokens, and does not follow the CLS path.
            streams = max(streams, depth + 1)
        elif (METHODS[name].follows_path and depth > 1) or METHODS[name].needs_head or name == "gradeclip":
            keys = True
        elif name == "dense" and options.dense == "token":
            streams = max(streams, 1)
    return {"layers": max(depths.values(), default=0), "keys": keys, "tokens": streams}


def check_fits(tower: ImageTower, methods: Sequence[str], options: Options) -> None:
    """ValueError if the options name more layers than a method can look at in this tower, or a block of all that it sees."""
    if isinstance(tower, TokenTower):
        tokens.check_fits(tower, methods, options)
        return
    for name in methods:
        # Every layer has a target of its own; the other methods look at the layers that the query passes.
        each_layer = name == "legrad" and options.legrad_target == "mean"
        most = tower.n_layers if each_layer else len(tower.path())
        if METHODS[name].takes_layers and options.layers > most:
            raise ValueError(f"layers {options.layers}: {name} has {most} to look at in this model")
        if METHODS[name].needs_own_token:
            with about(f"method {name}"):
                check_tower(tower)
    if "occlusion" in methods and options.block >= max(tower.grid) and not tower.n_own:
        raise ValueError(
            f"block {options.block}: this model has {max(tower.grid)} patches a side, and nothing else to see"
        )
    n_patches = tower.grid[0] * tower.grid[1]
    if SHAPLEY in methods and options.subsets < n_patches:
        raise ValueError(f"subsets {options.subsets}: do not tell the values of this model's {n_patches} patches")


def check_head(tower: ImageTower, methods: Sequence[str], head: Head | None) -> None:
    """ValueError if a method needs a head and there is none, or one that belongs to another tower."""
    if not any(METHODS[name].needs_head for name in methods):
        return
    if head is None:
        raise ValueError(f"method {REMOVAL}: needs a head that was trained on this model, and none is given")
    check_belongs(head.config, tower)


def explain_latents(
    tower: ImageTower,
    sae: SAE,
    pixels: torch.Tensor,
    latents: torch.Tensor,
    methods: Sequence[str] = ("contrib",),
    options: Options = DEFAULT_OPTIONS,
    words: WordTargets | None = None,
    heads: bool = False,
    head: Head | None = None,
) -> dict[str, Maps]:
    """Maps by every method of latents, int64 (B, k), and of `words`, in images, uint8 (B, height, width, 3): one forward.

    heads: keeps the heads of the attention apart, see `saecore.relevance.maps.Batch`. head: what removal predicts with.
    """
    options.check()
    check_fits(tower, methods, options)
    check_head(tower, methods, head)
    words = words or no_word_targets(sae)
    if needs_blank(tower, methods, options) and not len(words.blank):
        raise ValueError("legrad of a SigLIP needs `WordTargets.blank`, or options with legrad_correction=False")
    embedding, trace = tower(pixels, **trace_needs(methods, options, len(tower.path())))
    return explain_forward(
        methods, tower, pixels, embedding, trace, Targets(sae, latents, words), options, heads, head=head
    )


def explain_forward(
    methods: Sequence[str],
    tower: ImageTower,
    pixels: torch.Tensor,
    embedding: torch.Tensor,
    trace: Trace,
    targets: Targets,
    options: Options,
    heads: bool = False,
    check: bool = True,
    head: Head | None = None,
) -> dict[str, Maps]:
    """Maps by every method of one forward, whose trace must hold what `trace_needs` says.

    The targets' read-outs are computed once for each norm that the methods need.
    """
    exact = {name: options.norm_of(name) == "exact" for name in methods}
    batches = {
        norm: maps.batch_of(tower, pixels, embedding, trace, targets, norm, options, heads, check, head)
        for norm in set(exact.values())
    }
    return {name: FUNCTIONS[name](batches[exact[name]]) for name in methods}


def needs_blank(tower: ImageTower, methods: Sequence[str], options: Options) -> bool:
    """Whether a method needs `WordTargets.blank`: the embedding of `methods.BLANK_TEXT`, the text that says nothing."""
    return "legrad" in methods and maps.corrects_legrad(tower, options)

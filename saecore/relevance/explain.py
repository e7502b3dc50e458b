"""One forward, many maps: what a tower must keep of its forward for the methods that are asked for, and their maps of it.

    pixels -> tower -> embedding, trace -> targets -> maps of every target by every method

`explain_latents` is all of it, for latents that are given. A run chooses the latents by the embedding, so it calls the tower
itself and then `explain_forward`, which both share.

Shapes: B images, k latents; the others as in `saecore.relevance.maps`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from saecore.methods import DEFAULT_OPTIONS, METHODS, Options
from saecore.relevance import maps
from saecore.relevance.maps import Batch, Maps
from saecore.relevance.occlusion import occlusion
from saecore.relevance.rollout import rollout
from saecore.relevance.targets import Targets, WordTargets, no_word_targets
from saecore.sae.model import SAE
from saecore.towers.tower import ImageTower, Trace

FUNCTIONS: dict[str, Callable[[Batch], Maps]] = {
    "contrib": maps.contrib,
    "contrib_grad": maps.contrib_grad,
    "chefer": maps.chefer,
    "legrad": maps.legrad,
    "gradeclip": maps.gradeclip,
    "rollout": rollout,
    "dense": maps.dense,
    "occlusion": occlusion,
    "attention": maps.attention,
}
"""The function of each method of `saecore.methods.METHODS`."""


def trace_needs(methods: Iterable[str], options: Options, n_layers: int) -> dict[str, int]:
    """What a tower of so many layers must leave in its trace for these methods: its arguments `layers`, `keys` and `tokens`.

    Keys double what a trace holds, and residual streams keep the last layer from computing CLS alone.
    """
    own_targets = options.legrad_target == "mean"  # legrad's, which leave the CLS path alone
    keeps_layers, keeps_keys, keeps_tokens = 0, False, 0
    for name in methods:
        method = METHODS[name]
        if method.has_own_forwards:
            continue
        depth = options.layers_of(name, n_layers) if method.takes_layers else 1
        keeps_layers = max(keeps_layers, depth)
        if name == "legrad" and own_targets:
            keeps_tokens = max(keeps_tokens, depth + 1)
        elif (method.follows_path and depth > 1) or name == "gradeclip":
            keeps_keys = True
        if name == "dense" and options.dense == "token":
            keeps_tokens = max(keeps_tokens, 1)
    return {"layers": keeps_layers, "keys": keeps_keys, "tokens": keeps_tokens}


def check_fits(tower: ImageTower, methods: Sequence[str], options: Options) -> None:
    """ValueError if a method is to look at more layers than its query passes, or to drop all that there is to look at."""
    for name in (name for name in methods if METHODS[name].takes_layers):
        own = name == "legrad" and options.legrad_target == "mean"  # whatever the query passes, all layers have targets
        most = tower.n_layers if own else len(tower.path())
        if options.layers > most:
            raise ValueError(f"layers {options.layers}: {name} has {most} to look at in this model")
    if "occlusion" in methods and options.block >= max(tower.grid) and not tower.n_own:
        raise ValueError(
            f"block {options.block}: this model has {max(tower.grid)} patches a side, and nothing else to see"
        )


def explain_latents(
    tower: ImageTower,
    sae: SAE,
    pixels: torch.Tensor,
    latents: torch.Tensor,
    methods: Sequence[str] = ("contrib",),
    options: Options = DEFAULT_OPTIONS,
    words: WordTargets | None = None,
    heads: bool = False,
) -> dict[str, Maps]:
    """Maps of the latents (B, k) of images (uint8 (B, height, width, 3)), and of `words`, by every method: one forward."""
    options.check()
    check_fits(tower, methods, options)
    words = words or no_word_targets(sae)
    if needs_blank(tower, methods, options) and not len(words.blank):
        raise ValueError("legrad of a SigLIP needs `WordTargets.blank`, or options with legrad_correction=False")
    embedding, trace = tower(pixels, **trace_needs(methods, options, len(tower.path())))
    return explain_forward(methods, tower, pixels, embedding, trace, Targets(sae, latents, words), options, heads)


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
) -> dict[str, Maps]:
    """Maps by every method, of one forward; the targets' read-outs are computed once for each norm that is asked for."""
    exact = {name: options.norm_of(name) == "exact" for name in methods}
    batches = {
        norm: maps.batch_of(tower, pixels, embedding, trace, targets, norm, options, heads, check)
        for norm in set(exact.values())
    }
    return {name: FUNCTIONS[name](batches[exact[name]]) for name in methods}


def needs_blank(tower: ImageTower, methods: Sequence[str], options: Options) -> bool:
    """Whether a method needs the text that says nothing, `methods.BLANK_TEXT`, in `WordTargets.blank`."""
    return "legrad" in methods and maps.corrects_legrad(tower, options)

"""The cost of maps of k latents on this machine, as a ratio to a plain forward, with random weights of the true shapes.

Every round times all ways in a random order. A ratio is the median over rounds of the ratio of two ways in the same round,
since a machine's speed drifts. With two threads on B/32, in runs of 15 rounds, the standard deviation of that median was 0.003
to 0.007. For the ratio of least times it was 0.008 to 0.010; the mean of the medians was equal to it or up to 0.006 higher.

    forward        `ClipTower.embed`: fused attention, and only the CLS token in the last layer
    transformers   its own forward of the same weights, with fused attention: all tokens of all layers
    a method       the tower with its trace, the SAE's encoder, maps of the k strongest latents
    naive ..       `benchmarks.naive_maps` with a few latents, scaled to k: a constant part of the cost, and a part per latent

One thread is timed by its CPU time, which does not count other programs' work. Several threads, or a GPU, are timed by the
clock. A GPU runs bfloat16, as jobs do there. Cost does not depend on weights, so nothing is downloaded.

Left out: the other work of a job: decoding, reconstruction, rounding to 8 bits, tables, and the check of contrib_grad's
gradient (one row a layer: 0.06 of a forward for 8 images at once on B/32, where its share is largest).
"""

import copy
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import naive_maps
from benchmarks.tables import aligned
from saecore.images.preprocess import Preprocess
from saecore.methods import DEFAULT_OPTIONS, METHODS, Options, dtype_of
from saecore.relevance.explain import explain_forward, trace_needs
from saecore.relevance.maps import Maps
from saecore.relevance.targets import Targets, no_word_targets
from saecore.removal.head import Head, config_for
from saecore.removal.recipe import HEAD_WIDTH, Recipe
from saecore.sae.model import SAE, SAEConfig
from saecore.towers.clip import ClipTower


class Shape(NamedTuple):
    """The shape of an image tower with random weights."""

    image_size: int
    patch_size: int
    width: int
    heads: int
    layers: int
    outputs: int
    batch: int
    """How many images run at once by default."""
    bounds: Mapping[str, float]
    """Bounds on the cost of 32 maps, in forwards, by method or variant."""


def _bounds(contrib_grad: float) -> dict[str, float]:
    last_layer = {"chefer": 1.10, "legrad cls, 1 layer": 1.10, "gradeclip": 1.10}
    return {"contrib": 1.10, "contrib_grad": contrib_grad, **last_layer, "dense": 1.05, "attention": 1.0}


SHAPES = {
    "B/32": Shape(224, 32, 768, 12, 12, 512, 8, _bounds(1.75)),
    "B/16": Shape(224, 16, 768, 12, 12, 512, 4, _bounds(1.30)),
    "L/14": Shape(224, 14, 1024, 16, 24, 768, 2, _bounds(1.30)),
    "demo": Shape(64, 8, 128, 4, 5, 128, 16, {}),
}
"""OpenAI's names. `demo` is the embedded model's shape, to try the command with."""

BOUND_K = 32
"""The bounds hold for this many latents."""

NAIVE_BOUND = 50.0
"""A method with a bound must also be this many times cheaper than a forward and a backward for each of 32 latents."""

MEASURABLE = 0.02
"""The tolerance of `attention`, whose bound is 1.0: the SAE after the forward always costs something, within the noise."""

NAIVE: dict[str, Callable[[Any, SAE, Tensor, Tensor], Tensor]] = {
    "naive forward": naive_maps.forward_alone,
    "naive once": naive_maps.once,
    "naive repeated": naive_maps.repeated,
    "naive each": naive_maps.each,
}

DEAR = 3.0
"""A way is not timed again once it has taken this many forwards for each round. A way of 50 forwards is timed once."""


class Row(NamedTuple):
    """The cost of one way."""

    way: str
    seconds: float
    """The least of all rounds, for one image."""
    forwards: float
    """Ratio to `forward`."""
    transformers: float
    """Ratio to `transformers`."""
    cheaper: float | None
    """Ratio of `naive each` to this way; None if `naive each` was not timed."""
    bound: float | None
    """A bound on `forwards`; for dense on `transformers`, which also computes all tokens of the last layer."""
    met: bool | None
    """Whether the bound holds; None without a bound."""
    cheap: bool | None
    """Whether `NAIVE_BOUND` holds; None without a bound, or if `naive each` was not timed."""
    timed: int
    """In how many rounds the way was timed."""


def cost_of_maps(
    shape: Shape,
    methods: Sequence[str],
    k: int,
    n_latents: int,
    naive_latents: int,
    rounds: int,
    threads: int,
    device: str,
) -> list[Row]:
    """Rows of `forward` and `transformers`, of the methods and, unless `naive_latents` is 0, of the naive ways.

    threads: threads of the CPU.
    """
    model, sae = random_models(shape, n_latents, k, device)
    default = dtype_of(device)
    dtypes = {method: dtype_of(device, [method]) for method in methods}
    towers = {dtype: tower_in(dtype, model, shape) for dtype in {default, *dtypes.values()}}
    tower = towers[default]
    model.to(getattr(torch, default))
    heads = {
        dtype: Head(config_for(towers[dtype], head_width(shape), Recipe.blocks)).eval().requires_grad_(False).to(device)
        for dtype in {dtypes[name] for name in methods if METHODS[name].needs_head}
    }
    size = (shape.batch, shape.image_size, shape.image_size, 3)
    pixels = torch.randint(256, size, dtype=torch.uint8, device=device)
    ways: dict[str, Callable[[], object]] = {
        "forward": lambda: tower.embed(pixels),
        "transformers": lambda: model(tower.normalise(pixels)),
    }
    for method in methods:
        for name, options in variants(method, tower):
            ways[name] = functools.partial(
                maps_of, towers[dtypes[method]], sae, pixels, k, method, options, heads.get(dtypes[method])
            )
    ways = {name: torch.inference_mode()(way) for name, way in ways.items()}
    if naive_latents:
        plain = naive_maps.with_plain_attention(model)
        latents = torch.randint(n_latents, (shape.batch, naive_latents), device=device)
        images = tower.normalise(pixels)
        ways |= {name: functools.partial(way, plain, sae, images, latents) for name, way in NAIVE.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timed = time_in_turn(ways, rounds, watch(device, threads))
    finally:
        torch.set_num_threads(before)
    seconds = {name: [taken / shape.batch for taken in times] for name, times in timed.items()}
    if naive_latents:
        factor = k / naive_latents
        pairs = zip(seconds["naive forward"], seconds["naive once"], strict=False)
        seconds["naive once"] = [forward + (once - forward) * factor for forward, once in pairs]
        for name in ("naive repeated", "naive each"):
            seconds[name] = [taken * factor for taken in seconds[name]]
    return [row_of(name, seconds, shape.bounds if k == BOUND_K else {}) for name in ways]


def random_models(shape: Shape, n_latents: int, k: int, device: str) -> tuple[Any, SAE]:
    """transformers' image tower with random weights, and a TopK SAE, in float32."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        projection_dim=shape.outputs,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        attn_implementation="sdpa",
    )
    sae = SAE(SAEConfig(n_inputs=shape.outputs, n_latents=n_latents, k=k))
    torch.nn.init.normal_(sae.encoder)
    models = CLIPVisionModelWithProjection(config), sae
    model, sae = (part.eval().requires_grad_(False).to(device) for part in models)
    return model, sae


def tower_in(dtype: str, model: Any, shape: Shape) -> ClipTower:
    """Our tower with the model's weights. On the CPU it shares the tensors, since no type is converted there."""
    half, size = (0.5, 0.5, 0.5), (shape.image_size, shape.image_size)
    preprocess = Preprocess(shape.image_size, size, resample=3, mean=half, std=half, rescale_factor=1 / 255)
    tower = ClipTower(model if model.device.type == "cpu" else copy.deepcopy(model), preprocess)
    if dtype != "float32":
        tower.run_in(getattr(torch, dtype))
    return tower


def head_width(shape: Shape) -> int:
    """The width of a head of removal: 320 for B/32, with which it costs less than a quarter of a forward."""
    return HEAD_WIDTH * (5 * shape.width // (12 * HEAD_WIDTH))


def variants(method: str, tower: ClipTower) -> list[tuple[str, Options]]:
    """The variants of a method that differ in cost: name and options of each."""
    if method == "legrad":
        return [("legrad", DEFAULT_OPTIONS), ("legrad cls, 1 layer", Options(legrad_target="cls", layers=1))]
    if method == "occlusion":  # With single patches it would take 196 forwards on B/16.
        side = max(1, tower.grid[0] // 7)
        across = -(-tower.grid[0] // side)
        return [(f"occlusion {across}x{across}", Options(block=side))]
    return [(method, DEFAULT_OPTIONS)]


def maps_of(
    tower: ClipTower, sae: SAE, pixels: Tensor, k: int, method: str, options: Options, head: Head | None = None
) -> Maps:
    """Pixels -> maps of the k strongest latents."""
    embedding, trace = tower(pixels, **trace_needs((method,), options, len(tower.path())))
    latents = sae.encode_sparse(embedding, at_least=k).latents[:, :k]
    targets = Targets(sae, latents, no_word_targets(sae))
    return explain_forward((method,), tower, pixels, embedding, trace, targets, options, check=False, head=head)[method]


def time_in_turn(
    ways: Mapping[str, Callable[[], object]], rounds: int, now: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each way in each round. Later rounds omit a way that is `DEAR` compared with the first of the ways."""
    timed: dict[str, list[float]] = {name: [] for name in ways}
    names, reference, generator = list(ways), timed[next(iter(ways))], random.Random(0)
    for _ in range(rounds):
        # The state of memory and caches depends on the way that ran before, so the order changes.
        generator.shuffle(names)
        for name in names:
            if timed[name] and sum(timed[name]) > DEAR * rounds * min(reference):
                continue
            started = now()
            ways[name]()
            timed[name].append(now() - started)
    return timed


def unit(device: str, threads: int) -> str:
    """What is timed. The CPU time of one thread does not count other programs' work."""
    return "CPU time" if device == "cpu" and threads == 1 else "wall time"


def watch(device: str, threads: int) -> Callable[[], float]:
    """A clock in seconds. On a GPU it first waits until all work is done."""
    if device == "cpu":
        return time.process_time if unit(device, threads) == "CPU time" else time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def row_of(name: str, seconds: Mapping[str, Sequence[float]], bounds: Mapping[str, float]) -> Row:
    """One row, from the seconds of all ways in each round. Dear ways have seconds for the first rounds only."""
    own, bound = seconds[name], bounds.get(name)
    forwards, transformers = _ratio(own, seconds["forward"]), _ratio(own, seconds["transformers"])
    cheaper = _ratio(seconds["naive each"], own) if "naive each" in seconds else None
    met = cheap = None
    if bound is not None:
        ratio = transformers if name == "dense" else forwards
        met = ratio <= bound + (MEASURABLE if name == "attention" else 0)
        cheap = None if cheaper is None else cheaper >= NAIVE_BOUND
    return Row(name, min(own), forwards, transformers, cheaper, bound, met, cheap, len(own))


def _ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=False))


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table whose columns are aligned."""
    answers = {True: "yes", False: "NO", None: ""}
    cells = [("", "ms an image", "/ forward", "/ transformers", "bound", "held", "naive each / this", "timed")]
    for row in rows:
        bound = "" if row.bound is None else f"{row.bound:.2f}" + " of transformers" * (row.way == "dense")
        cheaper = "" if row.cheaper is None else f"{row.cheaper:.1f}" + f" < {NAIVE_BOUND:.0f}" * (row.cheap is False)
        ratios = f"{row.forwards:.3f}", f"{row.transformers:.3f}"
        cells.append((row.way, f"{row.seconds * 1e3:,.1f}", *ratios, bound, answers[row.met], cheaper, str(row.timed)))
    return aligned(cells)

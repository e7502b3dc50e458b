"""A guard in CI: decoding and maps must not become a fifth slower than they were measured, as ratios and never in seconds.

Ways are timed in turn by the CPU time of one thread, and the median over rounds of the ratio within a round counts. On a
machine of two cores on which four to six programs ran, the standard deviation of that median was 0.019 for exact decoding (12
times: 0.94 to 1.00) and 0.0015 for maps (4 times: 0.063 to 0.066), ten of which a bound is away. Of fast decoding it was 0.1 (4
times, with less going on: 2.40 to 2.63), five of which its bound is away. The ratios belong to processors like that one
(x86-64, AMD EPYC with AVX-512).
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import decoders, maps, steps
from benchmarks.material import Size, pictures
from saecore.images.preprocess import Preprocess

FALL = 0.8
"""A ratio of speeds may fall to this part of what was measured."""

DECODE = {decoders.FAST: 2.5, decoders.EXACT: 0.97}
"""Measured: how many times as fast as plain Pillow the decoder of a new run is, on JPEGs of 500 x 375."""

MAPS = 0.0654
"""Measured: what 32 maps by contrib cost after the forward, in forwards of B/32."""


def ratio(ways: Mapping[str, Callable[[], object]], one: str, other: str, rounds: int) -> float:
    """The median over rounds of the CPU time of `one` over that of `other`."""
    timed = maps.time_in_turn(ways, rounds, time.process_time)
    return statistics.median(a / b for a, b in zip(timed[one], timed[other], strict=True))


def test_decoding_is_as_fast_as_it_was() -> None:
    data = [*pictures(Size(500, 375), 12)]
    half = (0.5, 0.5, 0.5)
    preprocess = Preprocess(224, (224, 224), resample=3, mean=half, std=half, rescale_factor=1 / 255)
    named = decoders.ways(preprocess)
    ways = {name: (lambda way=named[name]: [way(one) for one in data]) for name in (decoders.PILLOW, chosen())}
    assert ratio(ways, decoders.PILLOW, chosen(), rounds=15) > FALL * DECODE[chosen()]


def chosen() -> str:
    return decoders.name_of_default()


def test_maps_are_as_fast_as_they_were() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = maps.SHAPES["B/32"]
    model, sae = maps.random_models(shape, 6144, 32, "cpu")
    tower = maps.tower_in("float32", model, shape)
    pixels = torch.randint(256, (2, shape.image_size, shape.image_size, 3), dtype=torch.uint8)
    try:
        with torch.inference_mode():
            explain = steps.in_the_stage(tower, sae, pixels, 32)["maps"]
            ways = {"forward": lambda: tower.embed(pixels), "maps": lambda: [explain() for _ in range(3)]}
            assert ratio(ways, "maps", "forward", rounds=9) / 3 < MAPS / FALL
    finally:
        torch.set_num_threads(threads)


def test_a_guard_sees_a_fall() -> None:
    """A way that does its work twice is found, in rounds that grow slower and in which something else goes on."""
    now, slow = [0.0], [1.0]

    def takes(seconds: float) -> None:
        slow[0] *= 1.01
        now[0] += seconds * slow[0]

    def measured(cost: float) -> float:
        ways = {"ours": lambda: takes(cost), "plain": lambda: takes(1.0)}
        timed = maps.time_in_turn(ways, 15, lambda: now[0])
        return statistics.median(a / b for a, b in zip(timed["plain"], timed["ours"], strict=True))

    assert measured(1.0) > FALL > measured(1.3)

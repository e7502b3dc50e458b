"""The outlines of the drawn world's shapes, each with the area of the unit disc.

Left out: where an object stands, how large it is and what it is painted with (`saecore.demo.scenes`).
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")


@cache
def outline(shape: str) -> tuple[NDArray[np.float64], ...]:
    """Closed contours [points, xy] with the unit disc's area, y downwards; a second one is a hole."""

    def arc(start: float, stop: float, radius: float = 1.0, x: float = 0.0, points: int = 48) -> NDArray[np.float64]:
        angle = np.linspace(start, stop, points)
        return np.stack([x + radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def spokes(*lengths: float) -> NDArray[np.float64]:
        angle = np.arange(len(lengths)) * 2 * np.pi / len(lengths) - np.pi / 2
        return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.array(lengths)[:, None]

    contours: list[NDArray[np.float64]]
    match shape:
        case "circle":
            contours = [arc(0, 2 * np.pi)]
        case "square":
            contours = [np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)])]
        case "triangle":
            contours = [spokes(1, 1, 1)]
        case "star":
            contours = [spokes(*(1, 0.46) * 5)]
        case "cross":
            a = 0.34
            quarter = [(-a, -1.0), (a, -1.0), (a, -a), (1.0, -a), (1.0, a), (a, a)]
            contours = [np.array(quarter + [(-x, -y) for x, y in quarter])]
        case "ring":
            contours = [arc(0, 2 * np.pi), arc(0, 2 * np.pi, 0.55)]
        case "heart":
            t = np.linspace(0, 2 * np.pi, 64)
            y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            contours = [np.stack([16 * np.sin(t) ** 3, -y], axis=1)]
        case "crescent":
            # The unit disc less a disc of radius 0.85 at x = 0.5; the circles meet at x = (1 + 0.5^2 - 0.85^2) / (2 * 0.5).
            tip = 1 + 0.5**2 - 0.85**2
            outer, inner = math.acos(tip), math.atan2(math.sqrt(1 - tip**2), tip - 0.5)
            contours = [np.concatenate([arc(outer, 2 * np.pi - outer), arc(2 * np.pi - inner, inner, 0.85, 0.5)])]
        case _:
            raise ValueError(f"no such shape: {shape!r}")
    corners = np.concatenate(contours)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    areas = [abs(np.dot(c[:, 0], np.roll(c[:, 1], 1)) - np.dot(c[:, 1], np.roll(c[:, 0], 1))) / 2 for c in contours]
    scale = math.sqrt(math.pi / (areas[0] - sum(areas[1:])))
    return tuple((c - middle) * scale for c in contours)


@cache
def reach(shape: str) -> float:
    """The farthest point of an outline from its centre, in radii."""
    return float(max(np.hypot(c[:, 0], c[:, 1]).max() for c in outline(shape)))

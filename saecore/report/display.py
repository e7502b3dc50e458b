"""Relevance maps as pictures: overlays, what CLIP did not see, colour bars, labelled sheets. Pure functions on arrays.

A map keeps its sign and its zero: orange adds to the target, blue takes away from it, no colour is zero. Full colour is a
limit, which maps share if they are to be compared (`shared_limit`). No map is stretched to its own range without a word.

Between patch centres a map is interpolated by monotone cubics (PCHIP: Fritsch and Butland 1984), down, then across: they
pass through every patch's value at its centre and stay within the values around it, so that no relevance is invented.
So does bilinear interpolation, but at 1,600 pixels it shows every strong patch as a star with a sharp tip; bicubic
interpolation overshoots, and puts blue rings around orange.

Left out: plots of figures (matplotlib), where maps come from (`saecore.report.views`), and where pictures come from
(`saecore.report.pictures`).
"""

import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Blue and orange differ for every common kind of colour blindness. Zero has no colour.
POSITIVE = np.array([226, 88, 12], np.float32)
NEGATIVE = np.array([24, 90, 219], np.float32)
MOST_OPAQUE = 0.8

UNSEEN = 0.5
"""Brightness of the parts of a picture that CLIP did not see."""

INK = (60, 60, 60)
LINE = 22
"""Height of a line of text, pixels."""

MEANING = "orange adds to the target, blue takes away from it"

Tile = tuple[np.ndarray, str]
"""A picture, uint8 (height, width, 3), and the words under it."""

NOTHING: Tile = (np.zeros((0, 0, 3), np.uint8), "")


def overlay(
    picture: np.ndarray, relevance: np.ndarray, limit: float, smooth: bool = True, sinks: np.ndarray | None = None
) -> np.ndarray:
    """A signed map over the picture that it explains: orange where it is positive, blue where it is negative, clear at zero.

    picture: uint8 (height, width, 3), the crop that CLIP saw. relevance: float (H, W), a value for each patch. limit: the
    |relevance| of full colour; larger values have full colour too. smooth: interpolate between patch centres, else give each
    patch one colour. sinks: bool (H, W), patches to mask: they are hatched, have no colour, and do not change the patches
    around them; None masks nothing. Returns uint8 (height, width, 3).
    """
    height, width = picture.shape[:2]
    shown = relevance if sinks is None else _without(relevance, sinks)
    spread = (interpolate if smooth else _blocks)(shown, height, width)
    opacity = (
        MOST_OPAQUE * np.clip(np.abs(spread) / max(float(limit), float(np.finfo(np.float32).tiny)), 0, 1)[..., None]
    )
    # The picture is pale and grey under the colours: an orange object must not be taken for relevance.
    base = 80 + 0.65 * _grey(picture)
    painted = base * (1 - opacity) + np.where(spread[..., None] > 0, POSITIVE, NEGATIVE) * opacity
    if sinks is not None:
        masked = _blocks(sinks, height, width) > 0
        painted[masked] = _hatched(base, relevance.shape[0])[masked]
    return np.clip(painted, 0, 255).astype(np.uint8)


def interpolate(relevance: np.ndarray, height: int, width: int) -> np.ndarray:
    """A patch grid (H, W) at every pixel, float32 (height, width); constant beyond the outermost patch centres."""
    from scipy.interpolate import PchipInterpolator

    spread = relevance.astype(np.float64)
    for axis, pixels in enumerate((height, width)):
        patches = relevance.shape[axis]
        centres = np.concatenate([[-0.5], np.arange(patches), [patches - 0.5]])  # and the two edges
        edged = np.pad(spread, [(1, 1) if axis == other else (0, 0) for other in range(2)], "edge")
        spread = PchipInterpolator(centres, edged, axis=axis)((np.arange(pixels) + 0.5) * patches / pixels - 0.5)
    return spread.astype(np.float32)


def _blocks(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """The value of the patch that each pixel's centre lies in, float32 (height, width)."""
    down = ((np.arange(height) + 0.5) * grid.shape[0] / height).astype(int)
    across = ((np.arange(width) + 0.5) * grid.shape[1] / width).astype(int)
    return grid.astype(np.float32)[down[:, None], across]


def _without(relevance: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """The map with each sink at the value of the nearest other patch, so that interpolation does not spread sinks."""
    from scipy.ndimage import distance_transform_edt

    return relevance[tuple(distance_transform_edt(sinks, return_distances=False, return_indices=True))]


def _grey(picture: np.ndarray) -> np.ndarray:
    """Luma, float32 (height, width, 1)."""
    return (picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _hatched(base: np.ndarray, rows: int) -> np.ndarray:
    """Diagonal lines, a few on each patch; dark with a light edge, so that they are visible on any ground."""
    height, width = base.shape[:2]
    period = max(6.0, height / rows / 4)
    phase = np.add.outer(np.arange(height), np.arange(width))[..., None] % period / max(1.0, period / 8)
    return np.where(phase < 1, 40, np.where(phase < 2, 235, base))


def shared_limit(maps: Iterable[np.ndarray], quantile: float = 1.0, sinks: Iterable[np.ndarray] | None = None) -> float:
    """The |relevance| of full colour for maps that are to be compared: all maps of one image, or of one latent.

    maps: float (H, W) each, on any grids. quantile: the limit is this quantile of all |relevance|; below 1, the few patches
    above it have full colour too. sinks: bool (H, W) for each map; masked patches do not count. 0 if no patch is left.
    """
    sizes = [np.abs(relevance) for relevance in maps]
    kept = sizes if sinks is None else [size[~mask] for size, mask in zip(sizes, sinks, strict=True)]
    values = np.concatenate([size.ravel() for size in kept]) if kept else np.zeros(0)
    return float(np.quantile(values, quantile)) if values.size else 0.0


def paste(picture: np.ndarray, box: tuple[int, int, int, int], crop: np.ndarray) -> np.ndarray:
    """An overlay at its place on the full picture; the rest, which CLIP did not see, turns dark and grey.

    picture: uint8 (height, width, 3). box: left, top, right, bottom of the crop in the picture's pixels; it may reach over
    the edges. crop: uint8, of the box's size; it stays as it is, since the thin line around it is drawn outside.
    """
    left, top, right, bottom = box
    if crop.shape != (bottom - top, right - left, 3):
        raise ValueError(f"an overlay of {crop.shape[1]} x {crop.shape[0]} pixels does not fit the crop {box}")
    height, width = picture.shape[:2]
    full = np.repeat(UNSEEN * _grey(picture), 3, axis=2).astype(np.uint8)
    line = max(1, round(min(height, width) / 400))
    full[max(0, top - line) : max(0, bottom + line), max(0, left - line) : max(0, right + line)] = 255
    seen = crop[max(0, -top) : height - top, max(0, -left) : width - left]
    full[max(0, top) : max(0, top) + seen.shape[0], max(0, left) : max(0, left) + seen.shape[1]] = seen
    return full


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture with `side` pixels along its longer side."""
    image = Image.fromarray(picture)
    size = [max(1, round(pixels * side / max(image.size))) for pixels in image.size]
    return np.asarray(image.resize((size[0], size[1]), Image.Resampling.BICUBIC))


def png(image: Image.Image | np.ndarray) -> bytes:
    """A picture as a PNG file."""
    sink = io.BytesIO()
    # optimize=True took ten times as long at 1,600 pixels and saved 8 % of the bytes.
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(sink, "PNG")
    return sink.getvalue()


# ---- Many maps on one page.


def mosaic(rows: Sequence[Sequence[Tile]], heads: Sequence[str] = (), foot: str = "", gap: int = 12) -> Image.Image:
    """Pictures in rows and columns, with words under each, bold words above the columns, and a line at the foot."""
    widths = [max(tile.shape[1] for tile, _ in column) for column in itertools.zip_longest(*rows, fillvalue=NOTHING)]
    lefts = list(itertools.accumulate(widths, lambda left, width: left + width + gap, initial=gap))
    heights = [max(tile.shape[0] for tile, _ in row) + LINE + gap for row in rows]
    top = gap + LINE * bool(heads)
    page = Image.new("RGB", (lefts[-1], top + sum(heights) + LINE * bool(foot)), (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for left, head in zip(lefts, heads, strict=False):
        draw.text((left, gap - 3), head, fill=(0, 0, 0), font=font, stroke_width=0.3)
    for row, height in zip(rows, heights, strict=True):
        for left, (tile, words) in zip(lefts, row, strict=False):
            if tile.size:
                page.paste(Image.fromarray(tile), (left, top))
            draw.text((left, top + tile.shape[0] + 3), words, fill=INK, font=font)
        top += height
    draw.text((gap, top), foot, fill=INK, font=font)
    return page


def colour_bar(limit: float, width: int = 232, signed: bool = True) -> np.ndarray:
    """What the colours mean under this limit: uint8 (height, width, 3), from -limit or 0 to limit, with numbers below."""
    values = np.linspace(-limit if signed else 0, limit, width, dtype=np.float32)[None]
    page = Image.new("RGB", (width, 14 + LINE), (255, 255, 255))
    page.paste(Image.fromarray(overlay(np.full((14, width, 3), 190, np.uint8), values, limit, smooth=False)))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    ticks = [(0, "la", f"-{limit:.3g}"), (width // 2, "ma", "0")] if signed else [(0, "la", "0")]
    for x, anchor, text in [*ticks, (width - 1, "ra", f"{limit:.3g}")]:
        draw.text((x, 17), text, fill=INK, font=font, anchor=anchor)
    return np.asarray(page)


def sheet(
    pictures: Sequence[np.ndarray],
    names: Sequence[str],
    methods: Sequence[str],
    units: Sequence[str | None],
    maps: np.ndarray,
    remainders: np.ndarray,
    side: int = 176,
    smooth: bool = True,
    sinks: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """Targets in rows, methods in columns; the picture at the left of each row, a colour bar under each column.

    pictures: for each row the crop that CLIP saw; names: its target. units: those of each method, or None. maps: float (rows,
    columns, H, W). remainders: float (rows, columns), NaN where maps do not add up to their target. All maps in one unit share
    one scale; a method without units has a scale of its own, which all rows share. sinks: bool (H, W) for each row, to be
    masked.
    """
    limits, bars = [], []
    for column, unit in enumerate(units):
        alike = [unit == other if unit else column == place for place, other in enumerate(units)]
        compared = maps[:, alike]
        masks = None if sinks is None else np.broadcast_to(np.stack(sinks)[:, None], compared.shape)
        limits.append(shared_limit(compared, sinks=masks))
        bars.append((colour_bar(limits[-1], side, bool((compared < 0).any())), unit or "no units, own scale"))
    rows: list[list[Tile]] = []
    for row, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        small = resized(picture, side)
        rows.append([(small, name)])
        for relevance, remainder, limit in zip(maps[row], remainders[row], limits, strict=True):
            words = "" if np.isnan(remainder) else f"{relevance.sum():.2f}, remainder {remainder:.2f}"
            rows[-1].append((overlay(small, relevance, limit, smooth, None if sinks is None else sinks[row]), words))
    foot = f"{MEANING}; under a map: the sum of its patches, and the remainder"
    return mosaic(
        [*rows, [NOTHING, *bars]], ["", *methods], foot if sinks is None else foot + "; hatched: masked sinks"
    )

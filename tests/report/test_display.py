"""Overlays: what a colour says, where it lies, and what is done to the rest of the picture."""

import io

import numpy as np
import pytest
from PIL import Image

from saecore.report import display
from tests.helpers.photographs import photographs

RNG = np.random.default_rng(5)


def square(side: int, name: str = "chelsea") -> np.ndarray:
    """The middle of a photograph."""
    image = Image.fromarray(photographs()[name])
    edge, (width, height) = min(image.size), image.size
    left, top = (width - edge) // 2, (height - edge) // 2
    return np.asarray(image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC))


def read_back(painted: np.ndarray, base: np.ndarray, limit: float) -> np.ndarray:
    """Relevance at every pixel, from the colours alone: painted = base + opacity (colour - base)."""
    painted, base = painted.astype(float), base.astype(float)
    opacity = {
        sign: ((painted - base) * (colour - base)).sum(-1) / np.square(colour - base).sum(-1)
        for sign, colour in ((1, display.POSITIVE), (-1, display.NEGATIVE))
    }
    sign = np.where(opacity[1] > opacity[-1], 1, -1)
    return sign * np.where(sign > 0, opacity[1], opacity[-1]) / display.MOST_OPAQUE * limit


def test_nothing_is_grey_and_each_sign_has_its_hue() -> None:
    picture = square(112)
    base = display.overlay(picture, np.zeros((7, 7)), 1.0)
    assert np.ptp(base, axis=2).max() == 0
    assert np.corrcoef(base[..., 0].ravel(), picture.mean(-1).ravel())[0, 1] > 0.99
    np.testing.assert_array_equal(display.overlay(picture, np.zeros((7, 7)), 0.0), base)  # a latent without a map
    relevance = np.zeros((7, 7))
    relevance[1, 2], relevance[5, 4] = 1, -1
    red, _, blue = np.moveaxis(display.overlay(picture, relevance, 1.0).astype(int), 2, 0)
    assert red[24, 40] - blue[24, 40] > 100
    assert blue[88, 72] - red[88, 72] > 100
    assert abs(red[:, 96:] - blue[:, 96:]).max() == 0


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (16, 16), (3, 5)])
def test_blocks_show_the_numbers_as_they_are(grid: tuple[int, int]) -> None:
    picture = np.full((grid[0] * 16, grid[1] * 16, 3), 120, np.uint8)
    relevance = RNG.normal(size=grid)
    limit = np.abs(relevance).max()
    painted = display.overlay(picture, relevance, limit, smooth=False)
    base = display.overlay(picture, np.zeros(grid), limit)
    expected = relevance.repeat(16, axis=0).repeat(16, axis=1)
    np.testing.assert_allclose(read_back(painted, base, limit), expected, atol=0.01 * limit)


def test_interpolation_has_each_patch_at_its_centre_and_invents_nothing() -> None:
    """Patches of 9 pixels: pixel 4 is the centre. Between four centres no value is outside of the range of those four."""
    relevance = RNG.normal(size=(6, 5))
    spread = display.interpolate(relevance, 54, 45)
    np.testing.assert_allclose(spread[4::9, 4::9], relevance, atol=1e-6)
    np.testing.assert_allclose(spread[:5], np.repeat(spread[4:5], 5, axis=0), atol=1e-6)
    for row in range(5):
        for column in range(4):
            around = relevance[row : row + 2, column : column + 2]
            between = spread[9 * row + 4 : 9 * row + 14, 9 * column + 4 : 9 * column + 14]
            assert around.min() - 1e-6 <= between.min()
            assert between.max() <= around.max() + 1e-6
    ramp = np.add.outer(np.arange(6.0), 2 * np.arange(5.0))
    inside = display.interpolate(ramp, 54, 45)[13:41, 13:32]
    exact = np.add.outer(np.arange(13, 41) - 4, 2.0 * (np.arange(13, 32) - 4)) / 9
    np.testing.assert_allclose(inside, exact, atol=1e-5)
    np.testing.assert_allclose(display.interpolate(relevance[::-1, ::-1], 54, 45), spread[::-1, ::-1], atol=1e-6)


def test_a_limit_is_shared() -> None:
    """One value has one colour in all maps of an image, and what lies beyond the limit has full colour."""
    one, other = np.array([[1.0, -2.0], [0.5, 0.0]]), np.array([[4.0, 1.0, -3.0]])
    assert display.shared_limit([one, other]) == 4.0
    assert display.shared_limit([one, other], quantile=0.5) == 1.0  # of 0, 0.5, 1, 1, 2, 3, 4
    masks = [np.array([[False, True], [False, False]]), np.array([[True, False, False]])]
    assert display.shared_limit([one, other], sinks=masks) == 3.0
    assert display.shared_limit([]) == display.shared_limit([one], sinks=[np.ones((2, 2), bool)]) == 0.0
    grey = np.full((60, 60, 3), 90, np.uint8)
    painted = [display.overlay(grey, relevance, 2.0, smooth=False) for relevance in (one, other)]
    np.testing.assert_array_equal(painted[0][0, 0], painted[1][0, 30])
    np.testing.assert_array_equal(painted[1][0, 0], display.overlay(grey, np.full((1, 1), 2.0), 2.0)[0, 0])


@pytest.mark.parametrize("smooth", [True, False])
def test_masked_sinks_are_hatched_and_leave_no_trace(smooth: bool) -> None:
    picture, relevance = square(224), RNG.normal(size=(14, 14))
    sinks = np.zeros((14, 14), bool)
    sinks[3, 4] = sinks[3, 5] = sinks[13, 0] = True
    masked = display.overlay(picture, relevance, 2.0, smooth, sinks)
    relevance[sinks] = -1000
    np.testing.assert_array_equal(display.overlay(picture, relevance, 2.0, smooth, sinks), masked)
    assert (display.overlay(picture, relevance, 2.0, smooth) != masked).any(), "shown if they are not masked"
    where = sinks.repeat(16, axis=0).repeat(16, axis=1)
    base = display.overlay(picture, np.zeros((14, 14)), 1.0)
    assert np.ptp(masked[where], axis=1).max() == 0
    for row, column in np.argwhere(sinks):
        patch = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert 0.2 < (np.abs(masked[patch].astype(int) - base[patch]).max(-1) > 10).mean() < 0.7
    beside = display.overlay(picture, np.where(sinks, 0, relevance), 2.0, smooth=False)
    if not smooth:
        np.testing.assert_array_equal(masked[~where], beside[~where])
    everywhere = display.overlay(picture, relevance, 2.0, smooth, np.ones((14, 14), bool))
    assert np.ptp(everywhere, axis=2).max() == 0


@pytest.mark.parametrize("side", [224, 1600])
@pytest.mark.parametrize("grid", [7, 16])
def test_sizes(side: int, grid: int) -> None:
    """Any size of picture: the same map, to a pixel's rounding."""
    relevance = RNG.normal(size=(grid, grid))
    painted = display.overlay(square(side), relevance, 2.0)
    assert (painted.shape, painted.dtype) == ((side, side, 3), np.uint8)
    centres = ((np.arange(grid) + 0.5) * side / grid).astype(int)
    base = display.overlay(square(side), np.zeros((grid, grid)), 2.0)
    seen = read_back(painted, base, 2.0)[np.ix_(centres, centres)]
    np.testing.assert_allclose(seen, relevance.clip(-2, 2), atol=0.16 if side == 224 else 0.03)


def test_paste_puts_the_crop_back_and_dims_the_rest() -> None:
    picture = photographs()["coffee"]  # 600 x 400
    crop = display.overlay(picture[:, 100:500], RNG.normal(size=(7, 7)), 2.0)
    full = display.paste(picture, (100, 0, 500, 400), crop)
    assert full.shape == picture.shape
    np.testing.assert_array_equal(full[:, 100:500], crop)
    np.testing.assert_array_equal(full[:, [99, 500]], 255)
    rest = np.concatenate([full[:, :99], full[:, 501:]], axis=1)
    assert np.ptp(rest, axis=2).max() == 0
    assert (rest.max(-1) <= 0.5 * np.concatenate([picture[:, :99], picture[:, 501:]], axis=1).max(-1) + 1).all()
    inner = display.paste(picture, (100, 50, 300, 250), crop[:200, :200])
    np.testing.assert_array_equal(inner[50:250, 100:300], crop[:200, :200])
    np.testing.assert_array_equal(inner[49, 99:301], 255)
    np.testing.assert_array_equal(display.paste(picture, (0, 0, 600, 400), picture), picture)
    with pytest.raises(ValueError, match="400 x 400 pixels does not fit the crop"):
        display.paste(picture, (0, 0, 300, 300), crop)


def test_paste_of_a_crop_that_reaches_over_the_edges() -> None:
    picture = photographs()["coffee"]
    crop = RNG.integers(0, 256, (500, 700, 3)).astype(np.uint8)
    np.testing.assert_array_equal(display.paste(picture, (-40, -50, 660, 450), crop), crop[50:450, 40:640])
    corner = display.paste(picture, (-40, 300, 60, 450), crop[:150, :100])
    np.testing.assert_array_equal(corner[300:, :60], crop[:100, 40:100])


def test_a_colour_bar_shows_the_colours_of_maps() -> None:
    bar = display.colour_bar(3.0, 201)
    grey = np.full((1, 3, 3), 190, np.uint8)
    np.testing.assert_array_equal(
        bar[5, [0, 100, 200]], display.overlay(grey, np.array([[-3.0, 0, 3]]), 3.0, smooth=False)[0]
    )
    np.testing.assert_array_equal(display.colour_bar(3.0, 201, signed=False)[5, [0, 200]], bar[5, [100, 200]])
    assert bar[14:].min() < 100, "numbers"


def test_a_sheet_has_one_scale_for_each_unit() -> None:
    pictures, side = [square(64), square(64, "coffee")], 64
    maps = RNG.normal(size=(2, 4, 8, 8))
    maps[:, 2:] = np.abs(maps[:, 2:])
    remainders = np.array([[0.5, np.nan, np.nan, np.nan], [1.5, np.nan, np.nan, np.nan]])

    def tiles(maps: np.ndarray, sinks: list[np.ndarray] | None = None) -> dict[tuple[int, int], np.ndarray]:
        page = np.asarray(
            display.sheet(
                pictures, ["one", "other"], list("abcd"), ["u", "u", None, None], maps, remainders, side, sinks=sinks
            )
        )
        left, top, down = 12 + side + 12, 12 + display.LINE, side + display.LINE + 12
        return {
            (row, column): page[top + row * down :, left + column * (side + 12) :][:side, :side]
            for row in range(2)
            for column in range(4)
        }

    found = tiles(maps)
    limits = [np.abs(maps[:, :2]).max(), np.abs(maps[:, :2]).max(), maps[:, 2].max(), maps[:, 3].max()]
    for (row, column), tile in found.items():
        np.testing.assert_array_equal(tile, display.overlay(pictures[row], maps[row, column], limits[column]))
    louder = tiles(maps * np.array([1, 1, 1, 10])[:, None, None])
    assert all((louder[place] == found[place]).all() for place in found), "a scale of its own"
    louder = tiles(maps * np.array([1, 10, 1, 1])[:, None, None])
    assert (louder[0, 0] != found[0, 0]).any(), "a shared scale"
    assert (louder[0, 2] == found[0, 2]).all()
    masked = tiles(maps, [np.eye(8, dtype=bool), np.zeros((8, 8), bool)])
    assert np.ptp(masked[0, 2][:8, :8], axis=2).max() == 0


def test_png_and_resized() -> None:
    image = display.resized(photographs()["coffee"], 300)
    assert image.shape == (200, 300, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(display.png(image)))), image)

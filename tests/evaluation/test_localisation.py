"""Scores of maps against true masks: by hand, against scikit-learn and SciPy, and their baselines."""

import numpy as np
import pytest
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import average_precision_score

from saecore.evaluation import localisation

RNG = np.random.default_rng(8)

COVERED = np.array([[1.0, 0.5, 0.4, 0.0]])


def test_by_hand() -> None:
    """Patches 0 and 1 are on the object. The map's order is 2, 0, 3, 1: precision 1/2 at patch 0, 2/4 at patch 1."""
    relevance = np.array([[2.0, -1.0, 5.0, 1.0]])
    assert localisation.pointing(relevance, COVERED) == 0.0
    assert localisation.mass(relevance, COVERED) == (2 * 1.0 + 5 * 0.4) / 8
    assert localisation.average_precision(relevance, COVERED) == (1 / 2 + 2 / 4) / 2
    perfect = np.array([[2.0, 1.0, 0.0, -3.0]])
    assert localisation.pointing(perfect, COVERED) == localisation.average_precision(perfect, COVERED) == 1.0
    assert localisation.mass(perfect, COVERED) == (2 * 1.0 + 1 * 0.5) / 3


def test_a_map_that_says_nothing_scores_as_chance() -> None:
    flat = np.zeros((1, 4))
    assert localisation.pointing(flat, COVERED) == 0.5
    assert localisation.mass(flat, COVERED) == COVERED.mean()
    assert localisation.average_precision(flat, COVERED) == 0.5
    assert localisation.mass(flat - 1, COVERED) == COVERED.mean()
    assert np.isnan(localisation.agreement(flat, COVERED))
    assert np.isnan(localisation.average_precision(flat, np.zeros((1, 4))))


def test_mean_iou_by_hand() -> None:
    """Above the mean of 1.75 lie the patches 0 and 2: of the object they share patch 0 of 0, 1, 2, of the rest 3 of 1, 2, 3."""
    maps = np.array([[2.0, -1.0, 5.0, 1.0], [2.0, 1.0, 0.0, -3.0], [0.1, 0.1, 0.1, 0.1]], np.float32)
    found = localisation.mean_iou(maps, COVERED.repeat(3, axis=0))
    np.testing.assert_allclose(found, [1 / 3, 1, (0 + 2 / 4) / 2])
    assert np.isnan(localisation.mean_iou(maps, np.zeros((3, 4)))).all()
    assert np.isnan(localisation.mean_iou(maps, np.ones((3, 4)))).all()
    named = {name: score(maps, COVERED.repeat(3, axis=0))[1] for name, score in localisation.SCORES.items()}
    assert named == {"pointing": 1, "mass": (2 + 0.5) / 3, "average precision": 1, "mIoU": 1}


@pytest.mark.parametrize("values", [1000, 5], ids=["few ties", "many ties"])
def test_average_precision_and_agreement_are_the_libraries(values: int) -> None:
    maps = RNG.integers(-values, values, (200, 49)).astype(np.float32)
    covered = RNG.random((200, 49)) ** 2
    expected = [average_precision_score(c >= 0.5, m) for m, c in zip(maps, covered, strict=True)]
    np.testing.assert_allclose(localisation.average_precision(maps, covered), expected, rtol=1e-12)
    expected = [spearmanr(m, c).statistic for m, c in zip(maps, covered, strict=True)]
    np.testing.assert_allclose(localisation.agreement(maps, covered), expected, rtol=1e-9, atol=1e-12)


def test_mean_of_patches_by_hand() -> None:
    mask = np.zeros((1, 4, 6), bool)
    mask[0, :2, :3] = True
    mask[0, 2, 3] = True
    assert localisation.per_patch(mask, (2, 2)).tolist() == [[1.0, 0.0, 0.0, 1 / 6]]
    assert localisation.per_patch(mask, (2, 3)).tolist() == [[1.0, 0.5, 0.0, 0.0, 0.25, 0.0]]
    with pytest.raises(ValueError, match="6 x 4 pixels cannot be cut into 4 x 2"):
        localisation.per_patch(mask, (2, 4))


def test_what_knows_nothing_scores_as_it_should() -> None:
    """Noise points at the object as often as the object is large. The centre scores only if the object is there."""
    covered = np.zeros((4000, 64))
    covered[:, [27, 28, 35, 36]] = 1
    middle = localisation.centre(4000, (8, 8))
    assert (localisation.pointing(middle, covered) == 1).all()
    assert (localisation.average_precision(middle, covered) == 1).all()
    noise = localisation.noise(4000, (8, 8))
    assert abs(localisation.pointing(noise, covered).mean() - 4 / 64) < 0.012  # 3 standard deviations
    assert abs(localisation.mass(noise, covered).mean() - 4 / 64) < 0.002
    assert (localisation.pointing(middle, np.roll(covered, 4, axis=1)) == 0).all()


def test_edges_are_where_they_are() -> None:
    picture = np.full((1, 64, 64, 3), 100, np.uint8)
    picture[0, :, 36:] = 200  # inside of the fifth column of patches
    lengths = localisation.edges(picture, (8, 8)).reshape(8, 8)
    np.testing.assert_allclose(lengths[:, 4], 2 * 4 * 100 / 8, rtol=1e-5)  # 2 of 8 pixels; weights 1, 2, 1
    assert (np.delete(lengths, 4, axis=1) == 0).all()


def test_the_interval_is_over_images() -> None:
    """It is SciPy's if every image has one score. Ten equal scores per image make it no narrower, since they add nothing."""
    scores, images = RNG.normal(0.6, 0.2, 150), np.arange(150)
    mean = localisation.mean_over_images(scores, images)
    expected = bootstrap((scores,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert mean.value == pytest.approx(scores.mean())
    assert mean.low == pytest.approx(expected.low, abs=0.004)
    assert mean.high == pytest.approx(expected.high, abs=0.004)
    assert localisation.mean_over_images(scores, images) == mean
    tenfold = localisation.mean_over_images(scores.repeat(10), images.repeat(10))
    np.testing.assert_allclose(tenfold, mean)
    gaps = localisation.mean_over_images(np.append(scores, np.nan), np.append(images, 900))
    assert gaps == mean
    with pytest.raises(ValueError, match="no score"):
        localisation.mean_over_images(np.array([np.nan]), np.array([0]))


def test_the_interval_by_hand() -> None:
    """One image of eight has a 1: a sample of eight has a binomial number of ones, at most 2 in 93.3 % and at most 3 in 98.9 %.
    Of two images, a quarter of the samples hold only the first, a quarter only the second, whose three scores then count."""
    one = localisation.mean_over_images(np.arange(8) == 3, np.arange(8))
    two = localisation.mean_over_images(np.array([0.0, 1, 1, 1]), np.array([4, 9, 9, 9]))
    assert [*one] == [1 / 8, 0, 3 / 8]
    assert [*two] == [3 / 4, 0, 1]


def test_differences_are_compared_image_by_image() -> None:
    scores, images = RNG.normal(size=400), np.arange(100).repeat(4)
    better = localisation.mean_over_images((scores + 0.01) - scores, images)
    assert better.low == pytest.approx(0.01, abs=1e-9)
    assert better.high == pytest.approx(0.01, abs=1e-9)
    alone = localisation.mean_over_images(scores, images)
    assert alone.high - alone.low > 0.1

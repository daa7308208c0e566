import numpy as np
import pytest
from scipy import ndimage

from dino_jax.evals.common.davis_metrics import (
    boundary,
    boundary_accuracy,
    region_similarity,
    score_objects,
    statistics,
)


def left_of(column, shape=(100, 100)):
    mask = np.zeros(shape, bool)
    mask[:, :column] = True
    return mask


def test_region_similarity_is_intersection_over_union():
    assert region_similarity(left_of(40), left_of(40)) == 1
    assert region_similarity(left_of(20), left_of(40)) == 0.5
    assert region_similarity(left_of(40), ~left_of(40)) == 0
    assert region_similarity(left_of(0), left_of(0)) == 1  # rightly nothing
    assert region_similarity(left_of(0), left_of(40)) == 0


def test_boundary_lies_half_a_pixel_towards_the_origin():
    mask = np.zeros((5, 6), bool)
    mask[2:4, 2:4] = True
    expected = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 0, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0],
        ]
    )
    assert np.array_equal(boundary(mask), expected)
    mask[:] = False
    mask[3:, 4:] = True  # in the corner: none along the image's border
    expected = np.zeros((5, 6))
    expected[2, 3:] = expected[2:, 3] = 1
    assert np.array_equal(boundary(mask), expected)


def test_boundaries_match_within_the_bound():
    # The diagonal of 100 x 100 pixels is 141.4, of which 0.008 are 1.13: 2 pixels.
    assert boundary_accuracy(left_of(50), left_of(50)) == 1
    assert boundary_accuracy(left_of(52), left_of(50)) == 1
    assert boundary_accuracy(left_of(53), left_of(50)) == 0
    assert boundary_accuracy(left_of(0), left_of(0)) == 1
    assert boundary_accuracy(left_of(0), left_of(50)) == 0
    assert boundary_accuracy(left_of(50), left_of(0)) == 0
    twice = left_of(50) | ~left_of(80)  # a second edge of the same length, in the wrong place: precision 1/2
    assert boundary_accuracy(twice, left_of(50)) == pytest.approx(2 / 3)
    assert boundary_accuracy(left_of(50), twice) == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_boundary_accuracy_is_that_of_dilated_boundaries(seed):
    """The benchmark's way: dilate by a disk, intersect, count."""
    noise = np.random.default_rng(seed).standard_normal((2, 150, 230))
    mask, truth = (ndimage.gaussian_filter(one, 8) > 0.01 for one in noise)
    truth |= ndimage.shift(mask, (2, 1))  # in part close to one another
    radius = np.ceil(0.008 * np.sqrt(150**2 + 230**2))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x * x + y * y <= radius * radius
    ours, theirs = boundary(mask), boundary(truth)
    precision = (ours & ndimage.binary_dilation(theirs, disk)).sum() / ours.sum()
    recall = (theirs & ndimage.binary_dilation(ours, disk)).sum() / theirs.sum()
    assert 0.05 < precision < 0.95
    assert boundary_accuracy(mask, truth) == pytest.approx(2 * precision * recall / (precision + recall))


def test_statistics_of_a_video():
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    found = statistics(values)
    assert found["mean"] == pytest.approx(0.6)
    assert found["recall"] == pytest.approx(5 / 9)  # 0.5 itself is not above
    assert found["decay"] == pytest.approx(0.9 - 0.3)  # 9 frames: quarters 0-2 and 6-8


def test_objects_are_scored_one_by_one():
    truth = np.zeros((2, 20, 20), np.uint8)
    truth[:, :10, :10], truth[:, 10:, 10:] = 1, 2
    masks = truth.copy()
    masks[1][masks[1] == 2] = 0  # the second object is lost in the second frame
    J, F = score_objects(iter(masks), iter(truth), 2)
    assert J.tolist() == [[1, 1], [1, 0]]
    assert F.tolist() == [[1, 1], [1, 0]]

import numpy as np
import pytest

from dino_jax.evals import segmentation
from dino_jax.evals.common.segmentation_data import Classes
from dino_jax.evals.common.segmentation_heads import (
    confusion,
    intersection_over_union,
    patch_classes,
    pixel_accuracy,
)


def test_figures_by_hand():
    """Class 3 is absent. Class 2 has no pixel, but one is predicted to have it. The last column does not count."""
    truth = np.array([[0, 0, 1, -1], [0, 1, 1, -1]])
    predicted = np.array([[0, 1, 1, 3], [0, 1, 2, 0]])
    counts = confusion(truth, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = intersection_over_union(counts)
    np.testing.assert_allclose(iou, [200 / 3, 50, 0, np.nan])
    assert pixel_accuracy(counts) == pytest.approx(400 / 6)
    figures, by_class = segmentation.summary({"linear": counts}, Classes(np.array([0, 4, 7, 9], np.uint8), None))
    assert figures["linear"]["mIoU"] == pytest.approx((200 / 3 + 50 + 0) / 3)
    assert by_class["9"] == {"linear": None}
    assert by_class["4"] == {"linear": pytest.approx(50)}


def test_the_matrix_is_summed_over_images():
    """The mean over images would be another number."""
    large = confusion(np.zeros((10, 10), int), np.zeros((10, 10), int), 2)
    small = confusion(np.ones((1, 2), int), np.array([[0, 1]]), 2)
    np.testing.assert_allclose(intersection_over_union(large + small), [10_000 / 101, 50])


def test_a_patch_has_its_most_frequent_class():
    classes = np.full((16, 32), -1, np.int16)
    classes[:8, :6], classes[8:, 16:], classes[8:10, 16:] = 2, 1, 0
    np.testing.assert_array_equal(patch_classes(classes, (2, 4), 3), [[2, -1, -1, -1], [-1, -1, 1, 1]])

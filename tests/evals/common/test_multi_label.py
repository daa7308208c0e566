"""Mean average precision against closed forms, and targets of sets of labels."""

import numpy as np
import pytest

from dino_jax.evals.common.multi_label import mean_average_precision, targets


def test_average_precision_is_the_mean_precision_at_each_right_image():
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    assert mean_average_precision(scores, np.array([[1], [0], [1], [0]])) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert mean_average_precision(scores, np.array([[1], [1], [0], [0]])) == 100
    assert mean_average_precision(scores, np.array([[0], [0], [0], [1]])) == 25


def test_equal_scores_count_together():
    """Whatever the order of the images, so that a constant score is worth the share of the class."""
    for right in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert mean_average_precision(np.zeros((4, 1)), np.array(right)[:, None]) == 25


def test_the_mean_is_over_classes_with_images():
    scores = np.array([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    assert mean_average_precision(scores, np.array([[1, 1, 0], [0, 0, 0]])) == pytest.approx((100 + 50) / 2)


def test_nan_ranks_last():
    assert mean_average_precision(np.array([[np.nan], [0.0]]), np.array([[0], [1]])) == 100


def test_targets():
    class Sets:
        class_names = ("a", "b", "c")
        label_sets = ((0, 2), (), (1,))

    assert targets(Sets(), np.array([2, 0, 1])).tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]

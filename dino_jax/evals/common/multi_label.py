"""Targets and accuracy where an image has any number of classes."""

import numpy as np

from dino_jax.data.sources import Source

PADDING = -1.0  # in the rows of targets that only fill a batch


def targets(source: Source, records: np.ndarray) -> np.ndarray:
    """Returns float32 [b, C]: 1 for the classes of each record, else 0."""
    rows = np.zeros((len(records), len(source.class_names)), np.float32)
    for row, record in zip(rows, records.tolist(), strict=True):
        row[list(source.label_sets[record] if source.label_sets is not None else [source.label(record)])] = 1
    return rows


def mean_average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Returns the mean over classes of the area under the precision-recall curve, in percent.

    Average precision is the mean, over the images of a class, of the precision among all images with at least as high a
    score (scikit-learn's `average_precision_score`). Classes without an image are left out.

    Args:
        scores: float [N, C]; NaN counts as the lowest score.
        present: [N, C], 1 where the image has the class.
    """
    found = []
    for score, right in zip(np.nan_to_num(scores, nan=-np.inf).T, present.T > 0, strict=True):
        if not right.any():
            continue
        # Rank of each image: the number of images, and of right ones, with at least its score.
        ranked, ranked_right = np.sort(score), np.sort(score[right])
        above = len(ranked) - np.searchsorted(ranked, ranked_right, "left")
        right_above = len(ranked_right) - np.searchsorted(ranked_right, ranked_right, "left")
        found.append(np.mean(right_above / above))
    return 100 * float(np.mean(found)) if found else float("nan")

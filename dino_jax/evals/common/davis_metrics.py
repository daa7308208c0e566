"""Metrics of DAVIS 2017: region similarity J and boundary accuracy F (Perazzi et al., CVPR 2016).

Definitions and averages are those of the benchmark's own evaluation.
"""

from collections.abc import Iterable

import numpy as np
from scipy.spatial import cKDTree

BOUND = 0.008  # of the image's diagonal: the tolerance for boundaries


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Returns J of two masks, bool [H, W]: intersection over union, 1 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """Returns F of two masks, bool [H, W]: the harmonic mean of precision and recall of the mask's boundary pixels.

    A boundary pixel matches if the other boundary has a pixel at a distance of at most BOUND * diagonal (rounded up),
    which is equivalent to dilation by a disk and intersection. F is 1 if neither mask has a boundary and 0 if only one
    has.
    """
    ours, theirs = boundary(mask), boundary(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    reach = np.ceil(BOUND * np.hypot(*mask.shape))
    ours, theirs = np.argwhere(ours), np.argwhere(theirs)
    precision, recall = (
        (cKDTree(b).query(a, distance_upper_bound=reach + 1)[0] <= reach).mean()
        for a, b in ((ours, theirs), (theirs, ours))
    )
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels that differ from their right, lower or lower right neighbor: bool [H, W] -> bool [H, W].

    The image is extended by its border, so an object that the border cuts off has no boundary there.
    """
    on = np.pad(mask, ((0, 1), (0, 1)), "edge")
    here = on[:-1, :-1]
    return (here != on[:-1, 1:]) | (here != on[1:, :-1]) | (here != on[1:, 1:])


def score_objects(
    masks: Iterable[np.ndarray], truths: Iterable[np.ndarray], objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns J and F, float [objects, T] each, of label maps int [H, W] of T frames; object i has label i + 1."""
    scores = [
        [(region_similarity(m == i, t == i), boundary_accuracy(m == i, t == i)) for i in range(1, objects + 1)]
        for m, t in zip(masks, truths, strict=True)
    ]
    J, F = np.asarray(scores).reshape(-1, objects, 2).transpose(2, 1, 0)
    return J, F


def statistics(values: np.ndarray) -> dict[str, float]:
    """Returns mean, recall (share of frames above 0.5) and decay (first quarter - last quarter) of J or F, [T].

    Adjacent quarters share a frame.
    """
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[: ends[1] + 1], values[ends[3] :]
    return {
        "mean": float(values.mean()),
        "recall": float((values > 0.5).mean()),
        "decay": float(first.mean() - last.mean()),
    }

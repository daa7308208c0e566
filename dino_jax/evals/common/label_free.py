"""Measures of features without labels.

Features are rows: float [n, D] of n images, or [n, c, D] of c crops of each. Everything is computed in float64 from the
features' second moments or in blocks of rows, so memory grows with D^2 and not with n^2.
"""

from typing import Any

import numpy as np

from dino_jax.evals.common.extraction import l2_normalize

ALIKE = 0.9  # cosine from which two prototypes count as one
BLOCK = 1_024  # rows compared at a time
EPS = 1e-7  # of the rank measures, as in their papers


def rankme(features: np.ndarray) -> float:
    """RankMe (Garrido et al., 2023, arXiv 2210.02885): the effective rank of a matrix of features, 1 to min(n, D).

    exp(H(p)), with p the singular values of [n, D] divided by their sum. The matrix is not centered.
    """
    return _effective_rank(np.sqrt(_eigenvalues(_moments(features)[1])))


def lidar(crops: np.ndarray, delta: float = 1e-4) -> float:
    """LiDAR (Thilak et al., 2024, arXiv 2312.04000): the effective rank that tells images apart, 1 to min(n - 1, D).

    The crops of an image are its class. With the covariance `between` of the class means and the mean covariance
    `within` the classes, plus `delta` on its diagonal, it is exp(H(p)), p the eigenvalues of
    within^-1/2 between within^-1/2 divided by their sum.
    """
    crops = np.asarray(crops, np.float64)
    n, c, D = crops.shape
    means = crops.mean(1)
    centered = (crops - means[:, None]).reshape(n * c, D)
    within = centered.T @ centered / (n * max(c - 1, 1)) + delta * np.eye(D)
    deviations = means - means.mean(0)
    between = deviations.T @ deviations / max(n - 1, 1)
    values, vectors = np.linalg.eigh(within)
    root = vectors / np.sqrt(values) @ vectors.T
    return _effective_rank(_eigenvalues(root @ between @ root))


def alpha_req(features: np.ndarray) -> float:
    """alpha-ReQ (Agrawal et al., NeurIPS 2022): the exponent of the power law of the covariance's eigenvalues.

    The slope of -log(eigenvalue) over log(rank), by least squares with weights 1 / rank, over the eigenvalues above
    1e-10 of the largest. 0: all directions have the same variance. Large: few directions have most of it. That paper
    finds about 1 best.
    """
    mean, second = _moments(features)
    values = _eigenvalues(second - np.outer(mean, mean))
    values = values[values > 1e-10 * values[0]]
    if len(values) < 2:
        return float("inf")
    rank = np.arange(1, len(values) + 1)
    return float(-np.polyfit(np.log(rank), np.log(values), 1, w=1 / np.sqrt(rank))[0])


def uniformity(features: np.ndarray) -> float:
    """Uniformity (Wang and Isola, ICML 2020): log mean exp(-2 |x - y|^2) over pairs of different unit vectors.

    0: all vectors are the same. Vectors in all directions of a large space give about -4.
    """
    x = unit(features)
    total = sum(np.exp(4 * (x[i : i + BLOCK] @ x.T) - 4).sum() for i in range(0, len(x), BLOCK))  # |x - y|^2 = 2 - 2 xy
    n = len(x)
    return float(np.log((total - n) / (n * (n - 1))))


def alignment(crops: np.ndarray) -> float:
    """Alignment (Wang and Isola, ICML 2020): mean |x - y|^2 over pairs of different crops of an image, unit vectors.

    0: the crops of an image have the same features.
    """
    x = unit(crops)
    c = x.shape[1]
    # The squared distances of all ordered pairs, of which c are zero, sum to 2 c^2 - 2 |sum|^2.
    squares = 2 * c**2 - 2 * np.square(x.sum(1)).sum(-1)
    return float(squares.mean() / (c * (c - 1)))


def crop_retrieval(crops: np.ndarray) -> float:
    """How often the crop nearest to a crop, by cosine among the crops of all images, is of the same image; percent.

    Chance is 100 (c - 1) / (n c - 1).
    """
    n, c, D = crops.shape
    x = unit(crops).astype(np.float32).reshape(n * c, D)
    hits = 0
    for start in range(0, len(x), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(x)))
        similarity = x[rows] @ x.T
        similarity[rows - start, rows] = -np.inf
        hits += int((similarity.argmax(1) // c == rows // c).sum())
    return 100 * hits / len(x)


def distinct_prototypes(prototypes: np.ndarray) -> int:
    """The number of different directions among prototypes [K, D]: those within a cosine of `ALIKE` count once.

    A prototype counts unless one before it that counts is alike, so that a chain of neighbors is not one.
    """
    x = unit(prototypes).astype(np.float32)
    kept = np.empty((0, x.shape[1]), np.float32)
    for start in range(0, len(x), BLOCK):
        block = x[start : start + BLOCK]
        block = block[(block @ kept.T).max(1, initial=-1) < ALIKE]
        alike, chosen = block @ block.T >= ALIKE, np.ones(len(block), bool)
        for i in range(len(block)):
            if chosen[i]:
                chosen[i + 1 :] &= ~alike[i, i + 1 :]
        kept = np.concatenate([kept, block[chosen]])
    return len(kept)


def unit(features: Any) -> np.ndarray:
    """Divides vectors, on the last axis, by their length; float64."""
    return l2_normalize(np.asarray(features, np.float64))


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean [D] and mean outer product [D, D] of rows."""
    n, D = features.shape
    total, products = np.zeros(D), np.zeros((D, D))
    for start in range(0, n, BLOCK):
        rows = np.asarray(features[start : start + BLOCK], np.float64)
        total += rows.sum(0)
        products += rows.T @ rows
    return total / n, products / n


def _eigenvalues(symmetric: np.ndarray) -> np.ndarray:
    """Returns the eigenvalues in descending order; rounding errors below 0 are 0."""
    return np.maximum(np.linalg.eigvalsh(symmetric)[::-1], 0)


def _effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of values that are divided by their sum; 1 if all are zero."""
    if not values.any():
        return 1.0
    p = values / values.sum() + EPS
    return float(np.exp(-(p * np.log(p)).sum()))

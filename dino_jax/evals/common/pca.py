"""Principal components."""

import numpy as np


def principal_components(features: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates of [N, D] along the n principal components, float32 [N, n], and explained shares [n].

    Components beyond the rank of the features are 0. The sign of a component makes its largest weight positive, so that
    a picture is not mirrored from one run to the next.
    """
    mean = features.mean(0, dtype=np.float64)
    covariance = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), 65536):  # float64, in parts to save memory
        part = features[start : start + 65536] - mean
        covariance += part.T @ part
    _, variance, directions = np.linalg.svd(covariance, hermitian=True)
    directions = directions[:n] * np.where(variance[:n] > 1e-12 * variance.sum(), 1.0, 0.0)[:, None]
    largest = np.abs(directions).argmax(1)
    directions *= np.sign(np.take_along_axis(directions, largest[:, None], 1))
    coordinates = np.zeros((len(features), n), np.float32)
    for start in range(0, len(features), 65536):
        coordinates[start : start + 65536, : len(directions)] = (features[start : start + 65536] - mean) @ directions.T
    share = np.zeros(n)
    share[: len(directions)] = variance[:n] / max(variance.sum(), 1e-300)
    return coordinates, share

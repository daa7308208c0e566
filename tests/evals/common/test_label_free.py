"""Measures without labels against closed forms."""

import numpy as np
import pytest

from dino_jax.evals.common import label_free

rng = np.random.default_rng(0)


def planted(n, c, D, noise, directions=None):
    """c crops of n images: each image a random direction (of some), each crop with noise."""
    centers = label_free.unit(rng.normal(size=(directions or n, D)))[np.arange(n) % (directions or n)]
    return centers[:, None] + noise * rng.normal(size=(n, c, D)) / np.sqrt(D)


def test_rankme_counts_directions():
    """Equal singular values: their number. A Gaussian's differ by sqrt(D / n), which costs a few percent."""
    assert label_free.rankme(np.eye(24)) == pytest.approx(24, rel=1e-4)
    assert label_free.rankme(rng.normal(size=(20_000, 32))) == pytest.approx(32, rel=0.01)
    assert label_free.rankme(np.outer(rng.normal(size=500), rng.normal(size=32))) == pytest.approx(1, abs=1e-3)
    assert label_free.rankme(np.zeros((5, 8))) == 1
    # Singular values 3 and 1: exp(H(3/4, 1/4)).
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert label_free.rankme(np.diag([3.0, 1.0])) == pytest.approx(expected, rel=1e-4)


def test_lidar_counts_the_directions_in_which_images_differ():
    """Noise in all 32 dimensions does not count; images in a subspace of 4 do."""
    n, D, inside = 4_000, 32, 4
    means = np.zeros((n, D))
    means[:, :inside] = rng.normal(size=(n, inside))
    crops = means[:, None] + 0.01 * rng.normal(size=(n, 4, D))
    assert label_free.lidar(crops) == pytest.approx(inside, rel=0.02)
    everywhere = rng.normal(size=(n, 1, D)) + 0.01 * rng.normal(size=(n, 4, D))
    assert label_free.lidar(everywhere) == pytest.approx(D, rel=0.02)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_exponent_of_the_eigenvalues(alpha):
    D = 16
    axes = np.linalg.qr(rng.normal(size=(D, D)))[0] * np.arange(1, D + 1) ** (-alpha / 2)
    features = np.concatenate([axes.T, -axes.T])  # mean 0, covariance with eigenvalues i^-alpha, up to a factor
    assert label_free.alpha_req(features) == pytest.approx(alpha, rel=1e-6)


def test_alpha_req_of_an_isotropic_gaussian_is_near_zero():
    assert abs(label_free.alpha_req(rng.normal(size=(50_000, 16)))) < 0.05


def test_uniformity():
    assert label_free.uniformity(np.ones((100, 8))) == pytest.approx(0, abs=1e-9)
    # Two opposite vectors: |x - y|^2 is 4 for half of the pairs of 2, all of them here.
    assert label_free.uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    # In many dimensions all pairs are orthogonal: |x - y|^2 = 2.
    assert label_free.uniformity(rng.normal(size=(2_000, 512))) == pytest.approx(-4, abs=0.05)


def test_alignment():
    same = np.repeat(rng.normal(size=(50, 1, 8)), 3, axis=1)
    assert label_free.alignment(same) == pytest.approx(0, abs=1e-9)
    assert label_free.alignment(np.stack([same[:, 0], -same[:, 0]], 1)) == pytest.approx(4)
    assert label_free.alignment(rng.normal(size=(500, 3, 512))) == pytest.approx(2, abs=0.02)


def test_crop_retrieval():
    assert label_free.crop_retrieval(planted(1_500, 4, 64, noise=0.1)) == 100
    # No information: chance, with a standard error of 0.06 for 6,000 crops.
    chance = 100 * 3 / (1_500 * 4 - 1)
    assert label_free.crop_retrieval(rng.normal(size=(1_500, 4, 64))) == pytest.approx(chance, abs=0.3)
    # 20 groups of images that look alike: a neighbor is of the same group, of 300 crops.
    assert label_free.crop_retrieval(planted(1_500, 4, 64, 0.1, directions=20)) == pytest.approx(100 * 3 / 299, abs=0.7)


def test_distinct_prototypes():
    orthogonal = np.eye(64)[rng.permutation(2_500) % 64] + 1e-3 * rng.normal(size=(2_500, 64))
    assert label_free.distinct_prototypes(orthogonal) == 64
    assert label_free.distinct_prototypes(rng.normal(size=(2_500, 256))) == 2_500
    assert label_free.distinct_prototypes(np.ones((3, 8)) * [[1], [2], [-1]]) == 2
    # A chain: neighbors have a cosine of cos(20 degrees) = 0.94, every second one 0.77.
    angles = np.deg2rad(20 * np.arange(4))
    assert label_free.distinct_prototypes(np.stack([np.cos(angles), np.sin(angles)], 1)) == 2

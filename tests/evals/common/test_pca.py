import numpy as np

from dino_jax.evals.common.pca import principal_components


def test_components_are_those_of_the_svd():
    features = np.random.default_rng(0).standard_normal((60, 7)) * (1, 5, 2, 1, 1, 3, 1) + 100
    coordinates, shares = principal_components(features.astype(np.float32), 3)
    centered = features - features.mean(0)
    left, values, _ = np.linalg.svd(centered, full_matrices=False)
    # The features are rounded to float32, 1e-7 of their 100.
    np.testing.assert_allclose(np.abs(coordinates), np.abs(left * values)[:, :3], atol=1e-3)
    np.testing.assert_allclose(shares, (values**2 / (values**2).sum())[:3], rtol=1e-5)


def test_sign_does_not_depend_on_the_order_of_the_images():
    features = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    np.testing.assert_allclose(
        principal_components(features, 3)[0], principal_components(features[::-1], 3)[0][::-1], atol=1e-5
    )


def test_components_that_there_are_not_are_zero():
    line = np.outer(np.arange(9), (3, 4)).astype(np.float32)
    coordinates, shares = principal_components(line, 3)
    np.testing.assert_allclose(coordinates[:, 0], 5 * (np.arange(9) - 4), atol=1e-4)
    assert not coordinates[:, 1:].any()
    np.testing.assert_allclose(shares, (1, 0, 0), atol=1e-9)
    assert not principal_components(np.ones((4, 5), np.float32), 2)[0].any()

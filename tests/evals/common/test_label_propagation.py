import jax.numpy as jnp
import numpy as np
from tolerances import assert_close

from dino_jax.evals.common.label_propagation import TILE, hard_labels, propagate


def run(features, first, **settings):
    return [np.asarray(soft) for soft in propagate(features, first, **settings)]


def dense(features, first, context, radius, topk, temperature):
    """The definition, with every patch against every other: labels of each frame after the first."""
    h, w = features.shape[1:3]
    place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape(-1, 2)
    near = np.abs(place[:, None] - place).max(-1) <= radius
    unit = features.reshape(len(features), h * w, -1)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    labels = [first.reshape(h * w, -1)]
    for t in range(1, len(features)):
        known = [0, *range(max(1, t - context), t)]
        affinity = np.concatenate([np.exp(unit[t] @ unit[i].T / temperature) * near for i in known], 1)
        affinity *= affinity >= np.sort(affinity, 1)[:, -topk, None]
        labels.append(affinity / affinity.sum(1, keepdims=True) @ np.concatenate([labels[i] for i in known]))
    return np.reshape(labels[1:], (len(features) - 1, h, w, -1))


def test_golden(golden):
    arrays, meta = golden("evals")
    settings = meta["propagation"]
    first = np.moveaxis(arrays["propagation/in/first_mask"][0], 0, -1)
    found = run(
        arrays["propagation/in/features"],
        first,
        context=settings["n_last_frames"],
        radius=settings["size_mask_neighborhood"],
        topk=settings["topk"],
        temperature=settings["temperature"],
    )
    assert len(found) == len(arrays["propagation/in/features"]) - 1
    for t, soft in enumerate(found, start=1):
        assert_close(np.moveaxis(soft, -1, 0)[None], arrays, f"propagation/soft{t}", meta)
        assert np.array_equal(hard_labels(soft, settings["patch_size"]), arrays[f"propagation/labels{t}"])


def test_tiles_join_to_the_definition():
    """More than one tile each way, none of which the frame is a multiple of; frames older than the context."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((4, 3 * TILE + 3, TILE + 5, 6)).astype(np.float32)
    first = rng.dirichlet(np.ones(3), features.shape[1:3]).astype(np.float32)
    settings = {"context": 1, "radius": 2, "topk": 5, "temperature": 0.1}
    expected = dense(features.astype(np.float64), first, **settings)
    np.testing.assert_allclose(run(features, first, **settings), expected, atol=1e-5)  # float32 against float64


def test_patches_just_as_near_count_all():
    """Features that are the same everywhere: a patch's label is the mean over its neighborhood."""
    features = np.ones((2, 5, 4, 3), np.float32)
    first = np.zeros((5, 4, 2), np.float32)
    first[:3, :, 0] = first[3:, :, 1] = 1
    (soft,) = run(features, first, radius=1, topk=1)
    np.testing.assert_allclose(soft[:, 0, 1], [0, 0, 1 / 3, 2 / 3, 1], atol=1e-6)


def test_labels_move_with_the_patches():
    rng = np.random.default_rng(0)
    still = rng.standard_normal((8, 8, 16)).astype(np.float32)
    first = np.zeros((8, 8, 2), np.float32)
    first[..., 0] = 1
    first[2:4, 2:4] = 0, 1
    frames = [np.roll(still, t, axis=1) for t in range(4)]
    for t, soft in enumerate(run(frames, first, radius=2, topk=1), start=1):
        assert np.array_equal(soft.argmax(-1)[:, 2:], np.roll(first, t, axis=1).argmax(-1)[:, 2:])


def test_hard_labels_are_bilinear_and_stretch_each_class():
    soft = np.zeros((2, 3, 3), np.float32)
    soft[..., 0] = 1
    assert np.array_equal(hard_labels(soft, 4), np.zeros((8, 12)))  # classes that are nowhere never win
    soft[:, 2] = 0.8, 0, 0.2  # the third class never leads, but here it is at its most and the background at its least
    expected = np.zeros((8, 12), np.uint8)
    expected[:, 8:] = 2  # half-way between the centers of the last two patches, where both are stretched to a half
    assert np.array_equal(hard_labels(jnp.asarray(soft), 4), expected)

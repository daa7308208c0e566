import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dino_jax.health import signals

B, G, V, D, K = 64, 2, 6, 16, 32
rng = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def measured(crops=None, logits=None, temp=0.1, z=None, teacher_z=None, center=0.0, loss=3.0):
    """The signals of a batch; what is not given is random."""
    crops = rng.normal(size=(B, G, 8, 8, 3)) if crops is None else crops
    logits = rng.normal(size=(B, G, K)) if logits is None else logits
    z = unit(rng.normal(size=(B, V, D))) if z is None else z
    teacher_z = unit(rng.normal(size=(B, G, D))) if teacher_z is None else teacher_z
    crops, logits, z, teacher_z = (jnp.asarray(x, jnp.float32) for x in (crops, logits, z, teacher_z))
    means = signals.batch_means(crops, logits, jax.nn.softmax(logits / temp), z, teacher_z)
    return {name: float(x) for name, x in signals.scalars(means, jnp.full(K, center), jnp.float32(loss)).items()}


def test_uniform_targets_have_the_entropy_of_all_prototypes():
    found = measured(logits=np.zeros((B, G, K)), loss=np.log(K))
    assert found["teacher_entropy"] == pytest.approx(np.log(K), rel=1e-6)
    assert found["mean_target_entropy"] == pytest.approx(np.log(K), rel=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-5)


def test_a_single_prototype_has_no_entropy():
    found = measured(logits=np.eye(K)[np.full((B, G), 3)] * 10)
    assert found["teacher_entropy"] == pytest.approx(0, abs=1e-5)
    assert found["mean_target_entropy"] == pytest.approx(0, abs=1e-5)


def test_sharp_targets_of_all_prototypes_are_told_apart_from_both():
    found = measured(logits=np.eye(K)[np.arange(B * G).reshape(B, G) % K] * 10)
    assert found["teacher_entropy"] == pytest.approx(0, abs=1e-5)
    assert found["mean_target_entropy"] == pytest.approx(np.log(K), rel=1e-5)


def test_spread_of_features():
    """1 for vectors in all directions, 0 for one vector."""
    many = unit(rng.normal(size=(4096, V, D)))  # their mean has a length of about 1 / sqrt(4096 V)
    assert measured(z=many)["student_spread"] == pytest.approx(1, abs=0.01)
    one = np.broadcast_to(unit(rng.normal(size=D)), (B, G, D))
    assert measured(teacher_z=one)["teacher_spread"] == pytest.approx(0, abs=1e-3)  # the square is float32's 1e-7
    # Two opposite vectors, one three times as often: |mean| = 1/2.
    two = one * np.where(np.arange(B) % 4, 1, -1)[:, None, None]
    assert measured(teacher_z=two)["teacher_spread"] == pytest.approx(np.sqrt(3 / 4), rel=1e-4)


def test_spread_of_pixels():
    noise = rng.normal(0.5, 2, (B, G, 16, 16, 3))
    found = measured(crops=noise)
    assert found["pixel_spread"] == pytest.approx(2, rel=0.02)
    assert found["crop_pixel_spread"] == pytest.approx(2, rel=0.02)
    assert found["crop_difference"] == pytest.approx(1, rel=0.02)
    same = np.repeat(noise[:, :1], G, axis=1)
    assert measured(crops=same)["crop_difference"] == 0
    flat = np.broadcast_to(rng.normal(size=(B, 1, 1, 1, 1)), (B, G, 8, 8, 3))  # each image one color
    assert measured(crops=flat)["crop_pixel_spread"] == pytest.approx(0, abs=1e-6)
    assert measured(crops=flat)["pixel_spread"] == pytest.approx(flat.std(), rel=1e-4)
    assert measured(crops=np.zeros((B, G, 8, 8, 3)))["pixel_spread"] == 0


def test_center():
    logits = rng.normal(0, 3, (B, G, K))
    found = measured(logits=logits, center=1.5)
    assert found["center_norm"] == pytest.approx(1.5 * np.sqrt(K), rel=1e-6)
    assert found["center_share"] == pytest.approx(1.5 / np.sqrt(np.square(logits).mean()), rel=1e-5)


@pytest.mark.parametrize("frequent", [1, 8, K])
def test_prototypes_used_is_the_number_of_equally_frequent_ones(frequent):
    winners = jnp.zeros(K)
    for step in range(320):
        winners = signals.remember_winners(winners, jnp.zeros(K).at[step % frequent].add(1.0))
    # Later batches count more, by 1% each, so that 32 prototypes in turn are not quite equally frequent.
    assert signals.prototypes_used(winners) == pytest.approx(frequent, rel=0.01)
    assert signals.prototypes_used(jnp.zeros(K)) == 1


def test_motion_is_relative_to_the_students_norm():
    student = {"a": jnp.full(4, 3.0), "b": jnp.full((2, 2), 4.0)}  # norm 10
    moved = jax.tree.map(lambda x: x + 0.5, student)  # by sqrt(8 * 0.25)
    found = signals.motion(moved, student, jax.tree.map(lambda x: x - 1, student))
    assert found["update_ratio"] == pytest.approx(np.sqrt(2) / 10, rel=1e-6)
    assert found["teacher_distance"] == pytest.approx(np.sqrt(8) / 10, rel=1e-6)

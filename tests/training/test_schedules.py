import jax
import numpy as np

from dino_jax.training import schedules


def values(schedule, steps):
    return np.asarray(jax.vmap(schedule)(np.arange(steps)))


def test_against_the_reference(golden):
    arrays, meta = golden("schedules")
    for name, c in meta["calls"].items():
        if name.startswith("cosine"):
            per_epoch = c["niter_per_ep"]
            ours = schedules.cosine(
                c["base_value"],
                c["final_value"],
                c["epochs"] * per_epoch,
                c["warmup_epochs"] * per_epoch,
                c["start_warmup_value"],
            )
            # float32 on the device against float64: 1e-6 of the largest value
            tolerance = {"rtol": 1e-5, "atol": 1e-6 * c["base_value"]}
            np.testing.assert_allclose(values(ours, len(arrays[name])), arrays[name], err_msg=name, **tolerance)
        else:
            ours = schedules.temperature(
                c["warmup_teacher_temp"], c["teacher_temp"], c["warmup_teacher_temp_epochs"], steps_per_epoch=3
            )
            expected = np.repeat(arrays[name], 3)  # constant within an epoch
            np.testing.assert_allclose(values(ours, len(expected)), expected, err_msg=name, rtol=1e-6)


def test_teacher_update_variants():
    ema, epoch, copy = (schedules.teacher_momentum(u, 0.9, 1.0, 8, 4) for u in schedules.TEACHER_UPDATES)
    assert values(ema, 8)[0] == np.float32(0.9)
    assert (np.diff(values(ema, 8)) > 0).all()
    np.testing.assert_array_equal(values(epoch, 8), [1, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal([copy(step) for step in range(8)], 0)

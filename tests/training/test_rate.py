from dino_jax.training.rate import Rate


def test_rate_counts_between_readings_what_the_devices_wait_for():
    now = [100.0]
    rate = Rate(clock=lambda: now[0])
    with rate.waiting(busy=lambda: False):
        now[0] += 1.0
    with rate.waiting(busy=lambda: True):  # behind a step that goes on
        now[0] += 1.0
    rate.add(64)
    now[0] += 2.0
    assert rate.read() == {"images_per_second": 16.0, "data_wait": 0.25}
    now[0] += 60.0  # an evaluation
    rate.reset()
    rate.add(10)
    now[0] += 1.0
    assert rate.read() == {"images_per_second": 10.0, "data_wait": 0.0}

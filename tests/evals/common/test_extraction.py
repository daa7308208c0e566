import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dino_jax.data.pipeline import EvalBatch
from dino_jax.distributed.sharding import make_mesh
from dino_jax.evals.common import extraction
from dino_jax.evals.common.extraction import extract_batches, raw_pixels

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def images_of(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 3), np.uint8)


def batches_of(images, sizes):
    """Consecutive batches of these sizes; labels are ten times the record number."""
    index = np.split(np.arange(len(images), dtype=np.int32), np.cumsum(sizes)[:-1])
    return [EvalBatch(images[i], i * 10, i) for i in index]


def mean_color(variables, images):
    return images.mean((1, 2)) * variables["scale"]


def expected(images):
    return 2 * ((images / 255 - MEAN) / STD).mean((1, 2))


@pytest.mark.parametrize("sizes", [(4, 4, 3), (4, 4, 4), (2,), (3, 4, 0, 1)])
def test_every_image_once_in_order(sizes):
    images = images_of(sum(sizes))
    table = extract_batches(mean_color, {"scale": np.float32(2)}, batches_of(images, sizes), make_mesh(), MEAN, STD)
    assert table.features.dtype == np.float32
    np.testing.assert_allclose(table.features, expected(images), atol=1e-5)
    assert np.array_equal(table.labels, 10 * np.arange(len(images)))
    assert np.array_equal(table.records, np.arange(len(images)))


def test_order_is_the_record_number():
    images = images_of(8)
    table = extract_batches(mean_color, {"scale": 2.0}, batches_of(images, (3, 3, 2))[::-1], make_mesh(), MEAN, STD)
    np.testing.assert_allclose(table.features, expected(images), atol=1e-5)


def test_one_program_for_all_batches_and_calls():
    traced = []

    def apply(variables, images):
        traced.append(images.shape)
        return images.mean((1, 2))

    for _ in range(2):
        extract_batches(apply, {}, batches_of(images_of(11), (4, 4, 3)), make_mesh(), MEAN, STD)
    assert traced == [(4, 4, 4, 3)]


def test_host_prepares_a_batch_while_one_is_computed(monkeypatch):
    events = []

    def batches():
        for number, batch in enumerate(batches_of(images_of(6), (2, 2, 2))):
            events.append(f"read {number}")
            yield batch

    fetch = extraction._fetch
    monkeypatch.setattr(extraction, "_fetch", lambda *args: (events.append("fetch"), fetch(*args))[1])
    extract_batches(mean_color, {"scale": 2.0}, batches(), make_mesh(), MEAN, STD)
    assert events == ["read 0", "read 1", "fetch", "read 2", "fetch", "fetch"]


def test_pixels():
    images = images_of(5)
    table = extract_batches(raw_pixels, {}, batches_of(images, (3, 2)), make_mesh(), MEAN, STD)
    np.testing.assert_allclose(table.features, ((images / 255 - MEAN) / STD).reshape(5, -1), rtol=1e-5, atol=1e-5)


PROGRAM = """
import sys, jax, numpy as np
process, processes, port, sizes = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, process)
from dino_jax.data.pipeline import EvalBatch
from dino_jax.evals.common import extraction
from dino_jax.evals import knn
from dino_jax.distributed.sharding import make_mesh, replicate
extraction.GATHER_ROWS = 4
images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
share = np.arange(23)[process::processes]
batches = [EvalBatch(images[i], i * 10, i) for i in np.split(share, np.cumsum(sizes[process])[:-1])]
mesh = make_mesh()
assert mesh.size == 4
variables = replicate({"scale": np.float32(2)}, mesh)
mean_color = lambda v, x: x.mean((1, 2)) * v["scale"]
table = extraction.extract_batches(mean_color, variables, batches, mesh, (0.5,) * 3, (0.5,) * 3)
np.testing.assert_allclose(table.features, 2 * (images.mean((1, 2)) / 255 - 0.5) / 0.5, atol=1e-5)
assert np.array_equal(table.labels, 10 * np.arange(23)) and np.array_equal(table.records, np.arange(23))
ranked = knn.knn_predict(table.features, table.labels // 80, table.features, (1,), mesh=mesh)[1]
assert np.array_equal(ranked[:, 0], table.labels // 80)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[(6, 6, 6, 5)], [(6, 6), (6, 5, 0)]])
def test_same_table_on_many_devices_and_processes(sizes):
    """One process with four devices; two with two each, which even have different numbers of batches."""
    processes = len(sizes)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    arguments = [str(processes), str(port), repr(sizes)]
    running = [subprocess.Popen([*command, str(i), *arguments], env=environment) for i in range(processes)]
    try:
        assert [process.wait(timeout=120) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from dino_jax.training.flops import count_flops, peak_flops


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_flops_of_matrix_products_in_loops_and_branches():
    a, b = struct(4, 8), struct(8, 16)
    product = 2 * 4 * 8 * 16
    square = jax.jit(lambda a, b: jnp.tanh(a @ b))
    assert count_flops(square, a, b) == product
    assert count_flops(lambda a, b: jnp.einsum("nij,njk->nik", a, b), struct(3, 4, 8), struct(3, 8, 16)) == 3 * product

    def loop(a, weights):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(lambda x: jax.nn.relu(x @ w))(x), None), a, weights)[0]

    assert count_flops(loop, a, struct(5, 8, 8)) == 5 * 2 * 4 * 8 * 8
    branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: (a @ b).sum(), lambda: 0.0)  # noqa: E731
    assert count_flops(branches, a, b) == product
    # Backward: one product for each of the two gradients; the forward product itself is still needed for tanh.
    assert count_flops(jax.grad(lambda a, b: square(a, b).sum(), (0, 1)), a, b) == 3 * product


def test_flops_of_convolutions_and_their_gradients():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = struct(2, 16, 16, 3), struct(4, 4, 3, 8)
    forward = 2 * (2 * 4 * 4 * 8) * (4 * 4 * 3)
    assert count_flops(conv, x, w) == forward
    assert count_flops(jax.grad(lambda x, w: conv(x, w).sum(), 1), x, w) == 2 * forward
    assert count_flops(jax.grad(lambda x, w: conv(x, w).sum(), 0), x, w) == pytest.approx(2 * forward, rel=0.5)
    grouped = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    assert count_flops(grouped, struct(1, 8, 8, 4), struct(3, 3, 1, 4)) == 2 * (8 * 8 * 4) * 9


def test_flops_of_a_shard_map_are_those_of_all_devices():
    devices = 4
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert count_flops(sharded, struct(8, 4), struct(4, 2)) == 2 * 8 * 4 * 2


def test_peak_flops_is_none_for_a_device_that_is_not_listed():
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert peak_flops(Device()) == 989e12
    assert peak_flops(jax.devices("cpu")[0]) is None

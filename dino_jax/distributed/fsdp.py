"""Fully sharded parameters: which are split over the "fsdp" axis, how they are gathered and their gradients reduced."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dino_jax.distributed.sharding import AXES, REPLICATED, replicated
from dino_jax.errors import UserError

# The axis of a parameter that is split, by the last part of its name. All other parameters are small and replicated.
SPLIT_AXIS = {"kernel": -1, "weight_v": 0}


def specs(tree: Any) -> Any:
    """How each array of a tree of parameters, or of a tree that contains one (a TrainState), is split."""
    return jax.tree.map_with_path(lambda path, x: _spec(path, len(x.shape)), tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`specs` on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def check_divides(tree: Any, fsdp: int) -> None:
    """Raises UserError unless each array (or shape) that would be split divides evenly over `fsdp` devices."""
    for path, x in jax.tree.leaves_with_path(tree):
        axis = _split_axis(path)
        if axis is not None and x.shape[axis] % fsdp:
            name = ".".join(str(getattr(key, "key", key)) for key in path)
            raise UserError(
                f"{name} {x.shape} does not divide over fsdp={fsdp} devices: set --config.fsdp to a divisor of "
                f"{x.shape[axis]}"
            )


def gather(params: Any, dtype: Any) -> Any:
    """Gathers the split parameters inside the sharded step, kernels in the `dtype` that they are used in.

    Outside of it, and without fsdp, it returns `params` as they are. Scanned blocks ("blocks" in the path) stay split:
    each block gathers its own parameters when its turn comes. The gradient is summed in float32 over the devices that
    share a parameter, and each keeps its part.
    """
    try:
        alone = jax.lax.axis_size("fsdp") == 1
    except NameError:
        alone = True
    if alone:
        return params

    def gather_one(path: Any, x: jax.Array) -> jax.Array:
        axis = _split_axis(path)
        if axis is None or any(getattr(key, "key", None) == "blocks" for key in path):
            return x
        return _gather(x, axis % x.ndim, jnp.dtype(dtype) if path[-1].key == "kernel" else x.dtype)

    return jax.tree.map_with_path(gather_one, params)


def mean(tree: Any) -> Any:
    """Mean over all devices. `gather` has already summed the gradients of split parameters over their fsdp group."""
    fsdp = jax.lax.axis_size("fsdp")
    leaves, structure = jax.tree.flatten_with_path(tree)
    split = [fsdp > 1 and _split_axis(path) is not None for path, _ in leaves]
    values = [x for _, x in leaves]
    full = iter(jax.lax.pmean([x for x, is_split in zip(values, split, strict=True) if not is_split], AXES))
    parts = iter(jax.lax.pmean([x / fsdp for x, is_split in zip(values, split, strict=True) if is_split], "data"))
    return jax.tree.unflatten(structure, [next(parts if is_split else full) for is_split in split])


def place(params: Any, mesh: Mesh) -> Any:
    """Puts host values of parameters (or of a tree that contains them) on the devices, split as `specs` says."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index]),
        params,
        shardings(params, mesh),
    )


def unshard(params: Any, mesh: Mesh) -> Any:
    """The same arrays, replicated: every device holds all of each."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)


def _split_axis(path: Any) -> int | None:
    return SPLIT_AXIS.get(getattr(path[-1], "key", "")) if path else None


def _spec(path: Any, ndim: int) -> PartitionSpec:
    axis = _split_axis(path)
    return REPLICATED if axis is None else PartitionSpec(*[None] * (axis % ndim), "fsdp")


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(x: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, None]:
    return _gather(x, axis, dtype), None


def _gather_backward(axis: int, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # The transpose of all_gather would sum in `dtype`.
    return (jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)

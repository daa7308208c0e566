"""Fully sharded parameters: which are split over the "fsdp" axis, how they are gathered and their gradients reduced."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dino_jax.distributed.sharding import AXES, REPLICATED, replicated
from dino_jax.errors import UserError

# Which axis of a parameter is split over `fsdp`, by the last part of its name. All others are small, and whole.
SPLIT_AXIS = {"kernel": -1, "weight_v": 0}


def specs(tree) -> Any:
    """Of a tree of parameters, or of anything with theirs in it (a TrainState): how each array is split."""
    return jax.tree.map_with_path(lambda path, x: _spec(path, len(x.shape)), tree)


def shardings(tree, mesh: Mesh) -> Any:
    """`specs` on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree))


def check_divides(tree, fsdp: int) -> None:
    """UserError unless each array (or shape) that would be split over `fsdp` devices can be."""
    for path, x in jax.tree.leaves_with_path(tree):
        axis = _split_axis(path)
        if axis is not None and x.shape[axis] % fsdp:
            name = ".".join(str(getattr(key, "key", key)) for key in path)
            raise UserError(
                f"{name} {x.shape} does not divide over fsdp={fsdp} devices: set --config.fsdp to a divisor of "
                f"{x.shape[axis]}"
            )


def gather(params, dtype) -> Any:
    """The whole of parameters of which each device holds its part, kernels in the `dtype` that they are used in.

    Inside the sharded step; elsewhere, and without fsdp, parameters are whole as they are. What belongs to scanned
    blocks ("blocks" in its path) stays in parts: each block gathers its own as its turn comes. The gradient flows back
    as a sum over the devices that share, in float32, of which each keeps its part.
    """
    try:
        alone = jax.lax.axis_size("fsdp") == 1
    except NameError:
        alone = True
    if alone:
        return params

    def whole(path, x):
        axis = _split_axis(path)
        if axis is None or any(getattr(key, "key", None) == "blocks" for key in path):
            return x
        return _gather(x, axis % x.ndim, jnp.dtype(dtype) if path[-1].key == "kernel" else x.dtype)

    return jax.tree.map_with_path(whole, params)


def mean(tree) -> Any:
    """Mean over all devices; of gradients that `gather` summed over those that share, the mean of parts."""
    fsdp = jax.lax.axis_size("fsdp")
    leaves, structure = jax.tree.flatten_with_path(tree)
    split = [fsdp > 1 and _split_axis(path) is not None for path, _ in leaves]
    values = [x for _, x in leaves]
    whole = iter(jax.lax.pmean([x for x, parted in zip(values, split, strict=True) if not parted], AXES))
    parts = iter(jax.lax.pmean([x / fsdp for x, parted in zip(values, split, strict=True) if parted], "data"))
    return jax.tree.unflatten(structure, [next(parts if parted else whole) for parted in split])


def _split_axis(path) -> int | None:
    return SPLIT_AXIS.get(getattr(path[-1], "key", "")) if path else None


def _spec(path, ndim: int) -> PartitionSpec:
    axis = _split_axis(path)
    return REPLICATED if axis is None else PartitionSpec(*[None] * (axis % ndim), "fsdp")


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axis: int, dtype) -> jax.Array:
    return jax.lax.all_gather(x.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(x, axis, dtype):
    return _gather(x, axis, dtype), None


def _gather_backward(axis, dtype, _, gradient):
    # all_gather's own transpose would add up in `dtype`.
    return (jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


def place(params, mesh: Mesh):
    """Host values of parameters (or of a tree with theirs in it) on the devices, split as `specs` says."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index]),
        params,
        shardings(params, mesh),
    )


def unshard(params, mesh: Mesh):
    """The same arrays, all of each on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)


_gather.defvjp(_gather_forward, _gather_backward)

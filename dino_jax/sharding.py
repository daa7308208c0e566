"""Devices: the mesh, and how host arrays become global ones."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError
from dino_jax.watchdog import deadline

# Batches are split over both axes; over `fsdp`, of size 1 by default, the large parameters are, too.
AXES = ("data", "fsdp")
# Which axis of a parameter is split over `fsdp`, by the last part of its name. All others are small, and whole.
SPLIT_AXIS = {"kernel": -1, "weight_v": 0}

T = TypeVar("T")

REPLICATED = PartitionSpec()
BATCH = PartitionSpec(AXES)


def one_device_a_core(batch_size: int, parts: int = 1) -> None:
    """Splits the CPU into devices, unless XLA_FLAGS is set: small operations, sorts above all, don't share cores well.

    At most one a core, as many as the batch's `parts` (over processes, in time) divide over, and no more than 8, since
    each holds all weights. Before anything else uses JAX. Accelerators are as many as there are.
    """
    if "XLA_FLAGS" not in os.environ:
        most = min(os.cpu_count() or 1, 8)
        fits = [n for n in range(1, most + 1) if batch_size % (n * max(parts, 1)) == 0]
        jax.config.update("jax_num_cpu_devices", max(fits, default=1))


def initialize(distributed) -> None:
    """Joins this process to the others, once, before anything touches a device. `distributed`: config.distributed.

    Cloud TPU pods, SLURM and MPI are detected (`auto`); elsewhere give coordinator, num_processes and process_id.
    """
    if jax.distributed.is_initialized() or not (distributed.auto or distributed.num_processes > 1):
        return
    if not distributed.auto and ":" not in distributed.coordinator:
        raise UserError(
            f"{distributed.num_processes} processes cannot meet at {distributed.coordinator!r}: "
            "set --config.distributed.coordinator=HOST:PORT of process 0"
        )
    if not 0 <= distributed.process_id < distributed.num_processes:
        raise UserError(
            f"distributed.process_id {distributed.process_id} is none of {distributed.num_processes} processes: "
            f"set --config.distributed.process_id to 0..{distributed.num_processes - 1}"
        )
    where = (
        {}
        if distributed.auto
        else {
            "coordinator_address": distributed.coordinator,
            "num_processes": distributed.num_processes,
            "process_id": distributed.process_id,
        }
    )
    timeout = distributed.timeout
    late = f"not all processes have met in {timeout} s: start each of them, or raise --config.distributed.timeout"
    try:
        # JAX's own time-outs abort with pages, so that they come after ours.
        with deadline(timeout, late):
            jax.distributed.initialize(
                **where, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=2 * distributed.heartbeat
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({' '.join(str(error).split())[:200]}): check --config.distributed"
        ) from error


def on_every_process(make: Callable[[], T], size: Callable[[T], int]) -> T:
    """make() on each process. A UserError on one is one on all, and so is a result of another size than elsewhere.

    Otherwise the others would wait for ever for the one that gave up.
    """
    problem = result = None
    try:
        result = make()
    except UserError as error:
        problem = error
    if jax.process_count() == 1:
        sizes = np.array([0])
    else:
        sizes = multihost_utils.process_allgather(np.int64(-1 if result is None else size(result)))
    if problem is not None:
        raise problem
    if (sizes < 0).any():
        raise UserError(f"process {int(sizes.argmin())} could not go on: its own message says why")
    if sizes.min() != sizes.max():
        raise UserError(f"the processes do not see the same data: {sizes.tolist()}, in the order of processes")
    return cast(T, result)


def make_mesh(devices: list | None = None, fsdp: int = 1) -> Mesh:
    """All devices (of all processes) as a ("data", "fsdp") mesh. `fsdp`: how many share the large parameters."""
    devices = jax.devices() if devices is None else devices
    shape, automatic = (len(devices) // fsdp, fsdp), (AxisType.Auto, AxisType.Auto)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, automatic, devices=devices)
    # Those that share parameters are in one slice: the network between slices carries the mean of gradients alone.
    within, across = (shape[0] // slices, fsdp), (slices, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=automatic)


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


_gather.defvjp(_gather_forward, _gather_backward)


def distribute(step: Callable, mesh: Mesh, donate: bool = True) -> Callable:
    """step(state, batch share) -> anything replicated, written for one device, as one program over the mesh.

    The state is replicated, and donated unless told otherwise. What crosses devices is what `step` itself writes down
    (`lax.pmean`): `check_vma=False` keeps JAX from adding gradient reductions where the replicated state is used.
    """
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(REPLICATED, BATCH), out_specs=REPLICATED, check_vma=False)
    return jax.jit(mapped, donate_argnums=0 if donate else ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, REPLICATED)


def replicate(tree, mesh: Mesh):
    """The same host values on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda _: np.asarray(x)), tree)


def place(params, mesh: Mesh):
    """Host values of parameters (or of a tree with theirs in it) on the devices, split as `specs` says."""
    return jax.tree.map(
        lambda x, where: jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index]),
        params,
        shardings(params, mesh),
    )


def whole(params, mesh: Mesh):
    """The same arrays, all of each on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(params)


def shard_batch(batch, mesh: Mesh):
    """This process's rows of each array -> global arrays split over the devices on the first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

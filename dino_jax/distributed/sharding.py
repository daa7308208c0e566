"""Devices: the mesh, and how host arrays become global ones."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Batches are split over both axes; over `fsdp`, of size 1 by default, the large parameters are, too.
AXES = ("data", "fsdp")

REPLICATED = PartitionSpec()

BATCH = PartitionSpec(AXES)


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


def shard_batch(batch, mesh: Mesh):
    """This process's rows of each array -> global arrays split over the devices on the first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

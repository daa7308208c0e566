"""Devices: the mesh, and how host arrays become global arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")  # batches are split over both; `fsdp.py` splits large parameters over the second
REPLICATED = PartitionSpec()
BATCH = PartitionSpec(AXES)


def make_mesh(devices: list[jax.Device] | None = None, fsdp: int = 1) -> Mesh:
    """All devices of all processes as a ("data", "fsdp") mesh. fsdp: the number that share each large parameter."""
    devices = jax.devices() if devices is None else devices
    shape, automatic = (len(devices) // fsdp, fsdp), (AxisType.Auto, AxisType.Auto)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":
        return jax.make_mesh(shape, AXES, automatic, devices=devices)
    # Devices that share parameters are in one slice, so that the network between slices carries only mean gradients.
    within, across = (shape[0] // slices, fsdp), (slices, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=automatic)


def distribute(step: Callable[..., Any], mesh: Mesh, donate: bool = True) -> Callable[..., Any]:
    """Turns step(state, share of the batch) -> replicated values, written for one device, into one program on the mesh.

    The state is replicated, and donated by default. `step` itself writes down what crosses devices (`lax.pmean`):
    check_vma=False keeps JAX from adding gradient reductions where the replicated state is used.
    """
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(REPLICATED, BATCH), out_specs=REPLICATED, check_vma=False)
    return jax.jit(mapped, donate_argnums=0 if donate else ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding under which every device holds the full array."""
    return NamedSharding(mesh, REPLICATED)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies host values to every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda _: np.asarray(x)), tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of each array -> global arrays, split over the devices along the first axis."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

"""Devices: the mesh, and how host arrays become global ones."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError

# Batches are split over both axes; `fsdp` has size 1 until parameters are sharded too.
AXES = ("data", "fsdp")

REPLICATED = PartitionSpec()
BATCH = PartitionSpec(AXES)


def initialize(distributed) -> None:
    """Joins this process to the others, once, before anything touches a device. `distributed`: config.distributed.

    Cloud TPU pods, SLURM and MPI are detected (`auto`); elsewhere give coordinator, num_processes and process_id.
    """
    if jax.distributed.is_initialized():
        return
    if distributed.auto:
        jax.distributed.initialize()
    elif distributed.num_processes > 1:
        if not distributed.coordinator:
            raise UserError(
                f"distributed.num_processes is {distributed.num_processes} but nobody knows where they meet: "
                "set --config.distributed.coordinator=HOST:PORT of process 0"
            )
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)


def make_mesh(devices: list | None = None) -> Mesh:
    """All devices (of all processes) as a ("data", "fsdp") mesh."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices), 1), AXES, (AxisType.Auto, AxisType.Auto), devices=devices)


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

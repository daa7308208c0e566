"""Devices: the mesh, and how host arrays become global ones."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dino_jax.errors import UserError

# Batches are split over both axes; `fsdp` has size 1 until parameters are sharded too.
AXES = ("data", "fsdp")

T = TypeVar("T")

REPLICATED = PartitionSpec()
BATCH = PartitionSpec(AXES)


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
    try:
        jax.distributed.initialize(**where, initialization_timeout=distributed.timeout)
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

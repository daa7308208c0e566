"""Processes: joining them, CPU devices, and calls that succeed or fail on all of them."""

import os
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.distributed.watchdog import deadline
from dino_jax.errors import UserError

T = TypeVar("T")


def set_cpu_device_count(batch_size: int, parts: int = 1) -> None:
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

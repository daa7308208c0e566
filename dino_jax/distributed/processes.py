"""Processes: joining them, CPU devices, and calls that succeed or fail on all of them."""

import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.distributed.watchdog import deadline
from dino_jax.errors import UserError

T = TypeVar("T")
REASON = 1_000  # bytes of an error that other processes are told


def set_cpu_device_count(batch_size: int, parts: int = 1) -> None:
    """Splits the CPU into devices, unless XLA_FLAGS sets their number. Call it before anything else uses JAX.

    Small operations, sorts above all, use one core each. There is at most one device per core and at most 8, since each
    holds all weights, and the number divides a batch in `parts` (over processes, in time). It does not affect
    accelerators.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        most = min(os.cpu_count() or 1, 8)
        fits = [n for n in range(1, most + 1) if batch_size % (n * max(parts, 1)) == 0]
        jax.config.update("jax_num_cpu_devices", max(fits, default=1))


def initialize(distributed: Any) -> None:
    """Joins this process to the others, once, before anything touches a device. distributed: config.distributed.

    Cloud TPU pods, SLURM and MPI are detected (`auto`); elsewhere set coordinator, num_processes and process_id.
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
    where = {
        "coordinator_address": distributed.coordinator,
        "num_processes": distributed.num_processes,
        "process_id": distributed.process_id,
    }
    timeout = distributed.timeout
    late = f"not all processes have met in {timeout} s: start each of them, or raise --config.distributed.timeout"
    try:
        # JAX's own time-outs abort with pages of text, so they come after ours, which a busy machine may double.
        with deadline(timeout, late):
            jax.distributed.initialize(
                **({} if distributed.auto else where),
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=4 * distributed.heartbeat,
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes do not find each other ({' '.join(str(error).split())[:200]}): check --config.distributed"
        ) from error


def on_every_process(make: Callable[[], T], size: Callable[[T], int]) -> T:
    """Calls make() on each process. An error on one ends all, and so does a result whose size differs.

    Without it, the other processes would wait forever for the one that gave up. They raise a UserError that tells its
    error.
    """
    problem = result = None
    try:
        result = make()
    except Exception as error:
        problem = error
    if jax.process_count() == 1:
        sizes = np.array([0])
    else:
        sizes = multihost_utils.process_allgather(np.int64(-1 if result is None else size(result)))
    reasons = _reasons(problem) if (sizes < 0).any() else []
    if problem is not None:
        raise problem
    if (sizes < 0).any():
        raise UserError(f"process {int(sizes.argmin())} could not go on: {reasons[int(sizes.argmin())]}")
    if sizes.min() != sizes.max():
        raise UserError(f"the processes do not see the same data: {sizes.tolist()}, in the order of processes")
    return cast(T, result)


def on_first(make: Callable[[], T]) -> T:
    """Calls make() on process 0 and returns its result on every process. An error there is raised on all of them."""
    if jax.process_count() == 1:
        return make()
    sent = on_every_process(lambda: pickle.dumps(make()) if jax.process_index() == 0 else b"", size=lambda _: 0)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    data = np.frombuffer(sent.ljust(length), np.uint8)
    return cast(T, pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes()))


def _reasons(problem: Exception | None) -> list[str]:
    """Returns each process's error, on one line; "" where there is none. All processes must call it."""
    text = "" if problem is None else " ".join(f"{problem}".split()) or type(problem).__name__
    if not isinstance(problem, UserError | None):
        text = f"{type(problem).__name__}: {text}"
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode()[:REASON].ljust(REASON), np.uint8)
    return [bytes(row).decode(errors="ignore").strip() for row in multihost_utils.process_allgather(encoded)]

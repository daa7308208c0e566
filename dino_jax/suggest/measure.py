"""Speed and memory of a recipe on this machine, from a few steps on its own images."""

import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dino_jax.data.sources import open_source
from dino_jax.distributed import sharding
from dino_jax.suggest.choices import Measured
from dino_jax.training import loop
from dino_jax.training.config_checks import check_config
from dino_jax.training.flops import peak_flops
from dino_jax.training.setup import build_setup, flops_per_image, init_state
from dino_jax.training.step import compile_lowered, lower_step

SECONDS = 6.0  # of steps that are timed
LEAST = 2  # steps that are timed at least
UTILIZATION = 0.3  # share of an accelerator's peak that a small run reaches
SIDE = 1_024  # of the matrices that tell a CPU's rate


def measure(config: ConfigDict) -> Measured:
    """Reads batches of config.data.source and runs steps on them, for a few seconds after compilation.

    Raises UserError as training would.
    """
    check_config(config, jax.device_count())
    source = open_source(config.data.source)
    mesh = sharding.make_mesh(fsdp=config.fsdp)
    setup = build_setup(config, loop.steps_in_epoch(source, config))
    state = init_state(setup, mesh)
    with loop.readable_out_of_memory(), loop.batches_from(0, source, config) as batches:
        program = compile_lowered(lower_step(setup, mesh, state))
        state, _ = program(state, loop.on_devices(next(batches), mesh))
        jax.block_until_ready(state)  # the first step allocates
        start, steps = time.perf_counter(), 0
        while steps < LEAST or time.perf_counter() - start < SECONDS:
            state, scalars = program(state, loop.on_devices(next(batches), mesh))
            scalars["loss"].block_until_ready()
            steps += 1
        seconds = time.perf_counter() - start
    return Measured(steps * config.batch_size / seconds, _peak(program))


def flops_of(config: ConfigDict) -> float:
    """Returns the FLOPs of a step per image."""
    return flops_per_image(build_setup(config, steps_per_epoch=1))


def flops_rate() -> float:
    """Returns the FLOP/s that all devices may reach together: a share of the vendor's peak, or measured on a CPU."""
    if peak := peak_flops(jax.devices()[0]):
        return UTILIZATION * peak * jax.device_count()
    matrix = jnp.ones((SIDE, SIDE))
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    start, repeats = time.perf_counter(), 10
    for _ in range(repeats):
        multiply(matrix, matrix).block_until_ready()
    return repeats * 2 * SIDE**3 / (time.perf_counter() - start)


def _peak(program: jax.stages.Compiled) -> int:
    """Returns the compiler's estimate of a device's peak memory, bytes; 0 where it gives none."""
    memory = program.memory_analysis()
    return getattr(memory, "peak_memory_in_bytes", 0) or 0

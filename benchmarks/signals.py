"""What the signals of a run's health cost: the demo's step beside one that returns only the loss.

    python -m benchmarks.signals [--rounds=11] [--steps=40]

The compiler removes from the second program what only the signals need. The two alternate, because machines drift.
"""

import statistics
import time
from functools import partial

import jax
from absl import app, flags

from benchmarks import environment
from dino_jax import recipes
from dino_jax.data.sources import open_source
from dino_jax.distributed import sharding
from dino_jax.distributed.processes import set_cpu_device_count
from dino_jax.training import loop
from dino_jax.training.setup import build_setup, init_state
from dino_jax.training.step import train_step

ROUNDS = flags.DEFINE_integer("rounds", 11, "timed rounds of each program; the median counts")
STEPS = flags.DEFINE_integer("steps", 40, "steps of a round")


def only_the_loss(setup, mesh, state, batch):
    """A step without its other metrics."""
    state, metrics = train_step(setup, mesh, state, batch)
    return state, {"loss": metrics["loss"]}


def main(arguments: list[str]) -> None:
    """Prints the table."""
    del arguments
    config = recipes.get_config("demo")
    set_cpu_device_count(config.batch_size)
    source, mesh = open_source(config.data.source), sharding.make_mesh()
    setup = build_setup(config, loop.steps_in_epoch(source, config))
    with loop.batches_from(0, source, config) as batches:
        batch = loop.on_devices(next(batches), mesh)
    programs, states, times = {}, {}, {}
    for name, step in (
        ("with signals", partial(train_step, setup, mesh)),
        ("loss", partial(only_the_loss, setup, mesh)),
    ):
        states[name], times[name] = init_state(setup, mesh), []
        programs[name] = jax.jit(step, donate_argnums=0).lower(states[name], batch).compile()
    for _ in range(ROUNDS.value + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(STEPS.value):
                states[name], _ = program(states[name], batch)
            jax.block_until_ready(states[name])
            times[name].append((time.perf_counter() - start) / STEPS.value)
    print(f"{environment.describe()}; batch {config.batch_size}, median of {ROUNDS.value} x {STEPS.value} steps\n")
    print("| program | ms a step |\n|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {1e3 * statistics.median(seconds[1:]):.2f} |")


if __name__ == "__main__":
    app.run(main)

"""The training loop, from a config to an exported backbone: restore, step, log, save, evaluate."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dino_jax import checkpoints
from dino_jax.data.multicrop import PICTURES
from dino_jax.data.pipeline import Batch, train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Source, open_source
from dino_jax.data.workers import Batches
from dino_jax.distributed import consistency, fsdp, processes, sharding
from dino_jax.distributed.preemption import Interrupted, StopSignal
from dino_jax.distributed.watchdog import Watchdog
from dino_jax.errors import Stopped, UserError
from dino_jax.health import signals
from dino_jax.lease import exclusive
from dino_jax.training.config_checks import check_config
from dino_jax.training.evaluators import build_evaluators
from dino_jax.training.flops import peak_flops
from dino_jax.training.init_from import start_from
from dino_jax.training.nonfinite import StepGuard
from dino_jax.training.rate import Rate
from dino_jax.training.resuming import resumed
from dino_jax.training.schedules import steps_of
from dino_jax.training.setup import (
    DeviceBatch,
    Setup,
    State,
    abstract_state,
    backbone_variables,
    build_setup,
    flops_per_image,
    init_state,
)
from dino_jax.training.step import compile_lowered, lower_step
from dino_jax.training.writers import Logger, RunInfo


def train(config: ConfigDict, workdir: str | Path) -> State:
    """Pretrains a model, or resumes from the last checkpoint in `workdir`. Returns the final state.

    workdir: a folder, or a path in an object store such as gs://bucket/run.

    Raises:
        UserError: a setting, the data or the workdir does not fit; the message says what to change.
        NotFiniteError: a UserError; the parameters are not finite, or too many steps in a row were skipped.
        Stopped: a signal asked the run to stop; the run saved a checkpoint first.
    """
    processes.initialize(config.distributed)
    with Watchdog(config.watchdog, config.distributed.heartbeat) as watchdog, ExitStack() as context:
        consistency.require_same(lambda: consistency.settings(config))
        check_config(config, jax.device_count())

        def own() -> checkpoints.Mirror:
            first = jax.process_index() == 0
            require_owned = context.enter_context(exclusive(workdir, "--workdir")) if first else None
            return context.enter_context(checkpoints.mirrored(workdir, require_owned))

        mirror = processes.on_every_process(own, size=lambda _: 1)
        return train_watched(config, mirror, watchdog)


def train_watched(config: ConfigDict, mirror: checkpoints.Mirror, watchdog: Watchdog) -> State:
    """Runs `train` in a workdir that this run owns."""
    workdir = mirror.local
    source = processes.on_every_process(lambda: open_source(config.data.source), size=len)
    consistency.require_same(lambda: consistency.data(source))
    steps_per_epoch = steps_in_epoch(source, config)
    total_steps = total_steps_of(config, steps_per_epoch)
    mesh = sharding.make_mesh(fsdp=config.fsdp)
    setup = build_setup(config, steps_per_epoch)
    shapes = abstract_state(setup, mesh)
    fsdp.check_divides(shapes, config.fsdp)

    with (
        checkpoints.open_manager(workdir, config.checkpoint) as manager,
        StopSignal(config.checkpoint.stop_within) as stop,
        ExitStack() as context,
    ):
        restored = checkpoints.restore(manager, shapes, config)
        (state, start), origin = resumed(*restored, setup, mesh, workdir) if restored else first_state(setup, mesh)
        checkpoints.write_config(workdir, config)
        logger = context.enter_context(
            Logger(RunInfo(workdir, config, total_steps, steps_per_epoch, start, len(source)))
        )
        logger.info(describe(setup, state, source, steps_per_epoch, start) + origin)
        evaluators = build_evaluators(setup, source, mesh, steps_per_epoch, logger.info)
        guard = StepGuard(config, workdir, source, last_saved=start)
        run, done, stopped = Run(setup, mesh, source, logger, watchdog, guard, total_steps), start, False

        def save() -> None:
            run.settle()  # raises if the state is not finite, so that such a state is never saved
            if done == total_steps:
                guard.finish(done)
            checkpoints.require_workdir(workdir)
            watchdog.beat("checkpoint", done)
            manager.wait_until_finished()
            mirror.flush()  # the checkpoint before, which the save of this one may remove
            checkpoints.save(manager, done, mirror.on_writer(state), config)
            guard.last_saved = done

        def evaluate() -> None:
            due = [evaluator for evaluator in evaluators if evaluator.due(done, total_steps)]
            if due:
                run.settle()
                watchdog.beat("evaluation", done)
                with stop.interruptible():
                    for evaluator in due:
                        logger.log(done, evaluator.evaluate(state))
                run.rate.reset()

        with batches_from(start, source, config) as batches:
            try:
                if start < total_steps:
                    watchdog.beat("compile", start + 1)
                    run.compile(state)  # while the readers start
                if start == 0:
                    evaluate()
                while done < total_steps:
                    if stop.requested(done):
                        raise Interrupted
                    watchdog.beat("data", done + 1)
                    with run.rate.waiting(run.busy), stop.interruptible():
                        batch = next(batches)
                    state, done = run.step(state, batch, done + 1), done + 1
                    if done == total_steps or done % config.checkpoint.every_steps == 0:
                        save()
                    evaluate()
            except Interrupted:
                stopped = True
                if done:
                    save()
                manager.wait_until_finished()
                mirror.flush()
                stop.saved()
                # Printed before the readers are closed, because a reader that hangs delays closing.
                logger.info(f"stopped by a signal after step {done:,}: the same command resumes here")
        watchdog.beat("export", done)
        manager.wait_until_finished()
        export_teacher(mirror, state, config)
        logger.info(logger.summary())
    if stopped:
        raise Stopped
    return state


class Run:
    """Runs steps: dispatches a step, then checks and logs the previous one while the devices work."""

    def __init__(
        self,
        setup: Setup,
        mesh: jax.sharding.Mesh,
        source: Source,
        logger: Logger,
        watchdog: Watchdog,
        guard: StepGuard,
        total_steps: int,
    ):
        self._last = total_steps
        self.rate = Rate()
        self._watchdog, self._guard = watchdog, guard
        self._setup, self._mesh, self._source, self._logger = setup, mesh, source, logger
        self._config = setup.config
        peak = peak_flops(jax.devices()[0])
        self._utilization = peak and flops_per_image(setup) / (peak * jax.device_count())  # at one image per second
        self._bad: set[int] = set()
        self._running: tuple[Any, ...] | None = None  # (step, metrics, batch) that has been dispatched but not checked
        self._started = time.perf_counter()
        self._first = True

    def compile(self, state: State) -> None:
        """Compiles the step. Raises UserError if processes compile different programs or memory runs out."""
        lowered = lower_step(self._setup, self._mesh, state)
        consistency.require_same(lambda: consistency.program(lowered))
        with readable_out_of_memory():
            self._train_step: Callable[..., Any] = compile_lowered(lowered)
        self._compiled = time.perf_counter()

    def step(self, state: State, batch: Any, done: int) -> State:
        """Trains on a batch. `done`: number of this step, from 1. Raises UserError for bad data or a bad loss."""
        self._watchdog.beat("step", done)
        self._note_bad(batch)
        with readable_out_of_memory():
            state, scalars = self._train_step(state, on_devices(batch, self._mesh))
            self.settle()
            self._running = done, scalars, batch
            if self._first:
                self.settle()
        if self._config.verify_every and done % self._config.verify_every == 0:
            consistency.require_same_state(state, self._mesh)
        return state

    def busy(self) -> bool:
        """Returns whether the devices are still working on the last dispatched step."""
        return self._running is not None and not self._running[1]["loss"].is_ready()

    def settle(self) -> None:
        """Waits for the last dispatched step, checks it, and logs it if due.

        Raises NotFiniteError if the parameters are not finite or too many steps in a row were skipped.
        """
        if self._running is None:
            return
        (done, scalars, batch), self._running = self._running, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        values |= self._guard.check(done, values, batch.index)
        self.rate.add(self._config.batch_size)
        if done % self._config.log_every == 0 or done in (1, self._last):
            values["repeated_images"] = signals.repeated_images(batch.canvas)
            self._logger.log(done, values | ({} if self._first else self._speed()))
        if self._first:
            self._first = False
            seconds = [moment - self._started for moment in (time.perf_counter(), self._compiled)]
            self._logger.info("first step after {:.1f} s, of which compilation {:.1f} s".format(*seconds))
            self.rate.reset()

    def _speed(self) -> dict[str, float]:
        speed = self.rate.read()
        if self._utilization:
            speed["model_flop_utilization"] = self._utilization * speed["images_per_second"]
        return speed

    def _note_bad(self, batch: Batch) -> None:
        for record in batch.bad[batch.bad >= 0].tolist():
            if record not in self._bad:
                self._bad.add(record)
                name = self._source.name(record)
                # Every process prints, because each one only knows its own share of the images.
                print(f"cannot decode {name}: using another image instead ({len(self._bad)} so far)", flush=True)
        limit = self._config.data.max_bad_fraction
        # Each process only meets its own share of the images.
        if len(self._bad) > limit * len(self._source) / jax.process_count():
            names = ", ".join(self._source.name(record) for record in sorted(self._bad)[:20])
            raise UserError(
                f"{len(self._bad)} of {len(self._source):,} images cannot be decoded, more than data.max_bad_fraction="
                f"{limit} allows: fix or remove them, or raise --config.data.max_bad_fraction; the first: {names}"
            )


def on_devices(batch: Any, mesh: jax.sharding.Mesh) -> DeviceBatch:
    """This process's `Batch` -> global DeviceBatch, sharded over the devices."""
    return sharding.shard_batch(DeviceBatch(batch.canvas, batch.size, batch.position), mesh)


@contextmanager
def readable_out_of_memory() -> Iterator[None]:
    """Turns XLA's out-of-memory report into a one-line UserError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"out of device memory ({str(error).splitlines()[0][:200]}): set a smaller --config.batch_size, "
            "--config.accum_steps=2 or more, or --config.model.remat=True"
        ) from error


def steps_in_epoch(source: Source, config: ConfigDict) -> int:
    """Returns the number of full batches per epoch. Raises UserError if the source has fewer images than a batch."""
    if len(source) < config.batch_size:
        raise UserError(
            f"data.source has {len(source)} images, fewer than a batch of {config.batch_size}: "
            f"set --config.batch_size to {len(source)} or less"
        )
    return len(source) // config.batch_size


def total_steps_of(config: ConfigDict, steps_per_epoch: int) -> int:
    """Returns the steps of a run. Raises UserError if there are none."""
    steps = steps_of(config.epochs, steps_per_epoch)
    if steps == 0:
        raise UserError(
            f"epochs {config.epochs:g} of {steps_per_epoch:,} steps each round to 0 steps: "
            f"set --config.epochs to {1 / steps_per_epoch:.2g} or more"
        )
    return steps


def first_state(setup: Setup, mesh: jax.sharding.Mesh) -> tuple[tuple[State, int], str]:
    """Returns ((state, 0), log line): the state before step 1, random or from config.init_from, and its origin."""
    state = init_state(setup, mesh)
    if not setup.config.init_from:
        return (state, 0), ""
    state, origin = start_from(state, setup.config, mesh)
    return (state, 0), f"\n{origin}"


def batches_from(step: int, source: Source, config: ConfigDict) -> Batches[Batch]:
    """Opens this process's stream of training batches after `step` completed steps."""
    return train_batches(
        source,
        batch_size=config.batch_size,
        canvas_size=config.data.canvas_size,
        pixels=Pixels.of_config(config),
        seed=config.seed,
        start_step=step,
        workers=config.data.workers,
        stall_timeout=config.data.stall_timeout,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def export_teacher(mirror: checkpoints.Mirror, state: State, config: ConfigDict) -> None:
    """Exports the teacher's backbone to the workdir's folder `export`."""
    card = checkpoints.model_card(config, int(state.step), state.teacher["backbone"])
    variables = mirror.on_writer(backbone_variables(state, "teacher"))
    checkpoints.write_export(mirror.local / "export", {"variables": variables}, card)


def describe(setup: Setup, state: State, source: Source, steps_per_epoch: int, start: int) -> str:
    """Describes the run in log lines."""
    config, device = setup.config, jax.devices()[0]
    count = sum(x.size for x in jax.tree.leaves(state.student["backbone"]))
    resumed = f"; resuming after step {start:,}" if start else ""
    if start >= steps_of(config.epochs, steps_per_epoch):
        resumed += ", which is the last: nothing left to train"
    uniform, channels = math.log(config.head.out_dim), config.model.in_channels
    augmented = ""
    if channels not in PICTURES:
        augmented = f"\n{channels} channels: each has its own brightness and contrast; none of the operations on colors"
    return (
        f"{config.model.arch}, {count / 1e6:.1f} M parameters, on {jax.device_count()} x {device.device_kind} "
        f"({setup.method.backbone.dtype}), {jax.process_count()} process(es)\n"
        f"{len(source):,} images, batch {config.batch_size}: {config.epochs:g} epochs of {steps_per_epoch:,} steps; "
        f"a loss that stays at ln K = {uniform:.2f} means collapse to uniform outputs{augmented}{resumed}"
    )

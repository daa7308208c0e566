"""Pretraining, from a config to an exported backbone: restore, step, log, save, evaluate."""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax import checkpoints
from dino_jax.data.pipeline import Batch, train_batches
from dino_jax.data.sources import Source, open_source
from dino_jax.distributed import consistency, fsdp, processes, sharding
from dino_jax.distributed.preemption import Interrupted, StopSignal
from dino_jax.distributed.watchdog import Watchdog
from dino_jax.errors import Stopped, UserError
from dino_jax.evals import knn
from dino_jax.evals.common.extraction import FeatureTable, tabulate
from dino_jax.training import metrics
from dino_jax.training.config_checks import check_config
from dino_jax.training.flops import peak_flops
from dino_jax.training.init_from import start_from
from dino_jax.training.nonfinite import Skipped
from dino_jax.training.setup import (
    DeviceBatch,
    Setup,
    State,
    abstract_state,
    build_setup,
    flops_per_image,
    init_state,
)
from dino_jax.training.step import compile_lowered, lower_step


def train(config: ConfigDict, workdir: str | Path) -> State:
    """Pretrains, or goes on where `workdir` stopped, and returns the state at the end.

    Raises UserError for what the user can mend: settings, data, a workdir of another run; NotFiniteError, which is one,
    for a loss, a gradient or parameters that are not finite; Stopped, after saving, where a signal asked for it.
    """
    processes.initialize(config.distributed)
    consistency.require(lambda: consistency.settings(config))
    check_config(config, jax.device_count())
    source = processes.on_every_process(lambda: open_source(config.data.source), size=len)
    consistency.require(lambda: consistency.data(source))
    steps_per_epoch = check_enough_images(source, config)
    total_steps = config.epochs * steps_per_epoch
    mesh = sharding.make_mesh(fsdp=config.fsdp)
    setup = build_setup(config, steps_per_epoch)
    shapes = abstract_state(setup, mesh)
    fsdp.check_divides(shapes, config.fsdp)

    with (
        Watchdog(config.watchdog, config.distributed.heartbeat) as watchdog,
        checkpoints.open_manager(workdir, config.checkpoint) as manager,
        StopSignal(config.checkpoint.stop_within) as stop,
    ):
        restored = checkpoints.restore(manager, shapes, config)
        (state, start), origin = (restored, "") if restored else first_state(setup, mesh)
        checkpoints.write_config(workdir, config)
        logger = metrics.Logger(workdir, total_steps, steps_per_epoch, start)
        logger.info(describe(setup, state, source, steps_per_epoch, start) + origin)
        evaluate = knn_evaluation(setup, source, mesh, logger)
        skipped = Skipped(config, workdir, source, saved=start)
        run, done, stopped = Run(setup, mesh, source, logger, watchdog, skipped), start, False

        def save():
            run.settle()  # nothing broken is ever saved
            watchdog.beat("checkpoint", done)
            checkpoints.save(manager, done, state, config)
            skipped.saved = done

        with batches_from(start, source, config) as batches:
            try:
                if start < total_steps:
                    watchdog.beat("compile", start + 1)
                    run.compile(state)  # while the readers start
                if start == 0:
                    watchdog.beat("evaluation", 0)
                    with stop.interruptible():
                        evaluate(state)
                while done < total_steps:
                    watchdog.beat("data", done + 1)
                    with run.rate.waiting(run.busy), stop.interruptible():
                        batch = next(batches)
                    state, done = run.step(state, batch, done + 1), done + 1
                    if stop.requested(done % config.log_every == 0):
                        raise Interrupted
                    if done == total_steps or done % config.checkpoint.every_steps == 0:
                        save()
                    if done == total_steps or done % (max(config.eval.knn_every_epochs, 1) * steps_per_epoch) == 0:
                        run.settle()
                        watchdog.beat("evaluation", done)
                        with stop.interruptible():
                            evaluate(state)
                        run.rate.reset()
            except Interrupted:
                stopped = True
                if done:
                    save()
                manager.wait_until_finished()
                # Said here, because what comes last is the end of the readers, who may hang.
                logger.info(f"stopped by a signal after step {done:,}: the same command resumes here")
        watchdog.beat("export", done)
        manager.wait_until_finished()
        export_teacher(workdir, state, config)
        logger.close()
    if stopped:
        raise Stopped
    return state


class Run:
    """One step after the other: fetch, dispatch, and look at the step before while the devices work on this one."""

    def __init__(
        self,
        setup: Setup,
        mesh: jax.sharding.Mesh,
        source: Source,
        logger: metrics.Logger,
        watchdog: Watchdog,
        skipped: Skipped,
    ):
        self.rate = metrics.Rate()
        self._watchdog, self._skipped = watchdog, skipped
        self._setup, self._mesh, self._source, self._logger = setup, mesh, source, logger
        self._config = setup.config
        peak = peak_flops(jax.devices()[0])
        self._utilization = peak and flops_per_image(setup) / (peak * jax.device_count())  # at one image a second
        self._bad: set[int] = set()
        self._running: tuple | None = None  # (step, metrics, images) that has been dispatched but not looked at
        self._started = time.perf_counter()
        self._first = True

    def compile(self, state: State) -> None:
        """Makes the program of the step. Raises UserError if processes make different ones, or it needs too much."""
        lowered = lower_step(self._setup, self._mesh, state)
        consistency.require(lambda: consistency.program(lowered))
        with readable_out_of_memory():
            self._train_step: Callable = compile_lowered(lowered)
        self._compiled = time.perf_counter()

    def step(self, state: State, batch, done: int) -> State:
        """Trains on a batch; `done` counts the steps with it. Raises UserError for bad data or a bad loss."""
        self._watchdog.beat("step", done)
        self._note_bad(batch)
        with readable_out_of_memory():
            state, scalars = self._train_step(state, on_devices(batch, self._mesh), self._skipped.max_grad_norm())
            self.settle()
            self._running = done, scalars, batch.index
            if self._first:
                self.settle()
        if self._config.verify_every and done % self._config.verify_every == 0:
            consistency.require_same_state(state, self._mesh)
        return state

    def busy(self) -> bool:
        """Whether the devices still work on the last dispatched step."""
        return self._running is not None and not self._running[1]["loss"].is_ready()

    def settle(self) -> None:
        """Waits for the last dispatched step, checks it and logs it if due.

        Raises NotFiniteError if the parameters after it are not finite, or where too many steps in a row were skipped.
        """
        if self._running is None:
            return
        (done, scalars, index), self._running = self._running, None
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        values |= self._skipped.look(done, values, index)
        self.rate.add(self._config.batch_size)
        if done % self._config.log_every == 0:
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
                # Each process knows only of its own share of the images.
                print(f"cannot decode {name}: another image stands in for it ({len(self._bad)} so far)", flush=True)
        limit = self._config.data.max_bad_fraction
        if len(self._bad) > limit * len(self._source):
            names = ", ".join(self._source.name(record) for record in sorted(self._bad)[:20])
            raise UserError(
                f"{len(self._bad)} of {len(self._source):,} images cannot be decoded, more than data.max_bad_fraction="
                f"{limit} allows: mend or remove them, or raise --config.data.max_bad_fraction; the first: {names}"
            )


def on_devices(batch, mesh: jax.sharding.Mesh) -> DeviceBatch:
    """This process's `Batch` -> what the devices need of the global one, split over them."""
    return sharding.shard_batch(DeviceBatch(batch.canvas, batch.size, batch.position), mesh)


@contextmanager
def readable_out_of_memory():
    """Turns XLA's page about a full device into one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"out of device memory ({str(error).splitlines()[0][:200]}): set a smaller --config.batch_size, "
            "--config.accum_steps=2 or more, or --config.model.remat=True"
        ) from error


def check_enough_images(source: Source, config: ConfigDict) -> int:
    """Whole batches in an epoch; UserError if there is not one."""
    if len(source) < config.batch_size:
        raise UserError(
            f"data.source has {len(source)} images, fewer than a batch of {config.batch_size}: "
            f"set --config.batch_size to {len(source)} or less"
        )
    return len(source) // config.batch_size


def first_state(setup: Setup, mesh: jax.sharding.Mesh) -> tuple[tuple[State, int], str]:
    """The state before step 1, random or from config.init_from, with the step, 0; and a line on where it is from."""
    state = init_state(setup, mesh)
    if not setup.config.init_from:
        return (state, 0), ""
    state, origin = start_from(state, setup.config, mesh)
    return (state, 0), f"\n{origin}"


def batches_from(step: int, source: Source, config: ConfigDict):
    """This process's stream of training batches from a step on."""
    return train_batches(
        source,
        batch_size=config.batch_size,
        canvas_size=config.data.canvas_size,
        channels=config.model.in_channels,
        seed=config.seed,
        start_step=step,
        workers=config.data.workers,
        stall_timeout=config.data.stall_timeout,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def export_teacher(workdir: str | Path, state: State, config: ConfigDict) -> None:
    """The teacher's backbone, what a run is for, to `workdir/export`."""
    card = checkpoints.model_card(config, int(state.step))
    variables = {"params": state.teacher["backbone"], "batch_stats": state.teacher_stats["backbone"]}
    checkpoints.write_export(Path(workdir) / "export", {"variables": variables}, card)


def feature_table(apply_fn, variables, source: Source, what: str, config: ConfigDict, mesh, mean, std) -> FeatureTable:
    """`tabulate` of a source with the evaluation settings of a run's config."""
    return tabulate(
        apply_fn,
        variables,
        source,
        what,
        mesh,
        batch_size=config.eval.batch_size,
        resize=config.eval.resize,
        crop=config.eval.crop,
        channels=config.model.in_channels,
        mean=mean,
        std=std,
        workers=config.data.workers,
    )


def knn_evaluation(setup: Setup, source: Source, mesh: jax.sharding.Mesh, logger: metrics.Logger):
    """evaluate(state): logs k-NN top-1 of teacher and student; does nothing where labels or settings are missing."""
    config = setup.config
    if not config.eval.knn_every_epochs or not config.eval.test:
        logger.info("no k-NN while training: eval.test or eval.knn_every_epochs is not set")
        return lambda state: None
    bank = processes.on_every_process(lambda: open_source(config.eval.train), size=len) if config.eval.train else source
    queries = processes.on_every_process(lambda: open_source(config.eval.test), size=len)
    if not (bank.num_classes and queries.num_classes):
        logger.info("no k-NN while training: eval.train or eval.test has no labels")
        return lambda state: None

    knn.check_classes(bank, queries)
    apply = setup.method.backbone.apply

    def both(variables, images):
        """Features of teacher and student side by side, so that each image is read once."""
        features: list = [apply(variables[who], images) for who in ("teacher", "student")]
        return jnp.concatenate(features, axis=-1)

    def table(source, variables, what):
        return feature_table(both, variables, source, what, config, mesh, config.data.mean, config.data.std)

    def evaluate(state):
        variables = {
            "teacher": {"params": state.teacher["backbone"], "batch_stats": state.teacher_stats["backbone"]},
            "student": {"params": state.student["backbone"], "batch_stats": state.student_stats["backbone"]},
        }
        variables = fsdp.unshard(variables, mesh)
        train, test = table(bank, variables, "k-NN bank"), table(queries, variables, "k-NN queries")
        scalars = {}
        for i, who in enumerate(variables):
            rows, answers = (np.split(t.features, 2, axis=1)[i] for t in (train, test))
            accuracy = knn.knn_accuracy(
                rows, train.labels, answers, test.labels, (config.eval.k,), num_classes=bank.num_classes, mesh=mesh
            )
            scalars[f"knn_top1_{who}"] = accuracy[config.eval.k][0]
        logger.log(int(state.step), scalars)

    return evaluate


def describe(setup: Setup, state: State, source: Source, steps_per_epoch: int, start: int) -> str:
    """What is about to run, in a line or two."""
    config, device = setup.config, jax.devices()[0]
    count = sum(x.size for x in jax.tree.leaves(state.student["backbone"]))
    resumed = f"; resuming after step {start:,}" if start else ""
    if start >= config.epochs * steps_per_epoch:
        resumed += ", which is the last: nothing left to train"
    uniform = math.log(config.head.out_dim)
    return (
        f"{config.model.arch}, {count / 1e6:.1f} M parameters, on {jax.device_count()} x {device.device_kind} "
        f"({setup.method.backbone.dtype}), {jax.process_count()} process(es)\n"
        f"{len(source):,} images, batch {config.batch_size}: {config.epochs} epochs of {steps_per_epoch:,} steps; "
        f"a loss that stays at ln K = {uniform:.2f} is collapse to uniform outputs{resumed}"
    )

"""Repeats a step with non-finite values, and reports which modules and images are affected.

    dino-jax replay WORKDIR/replay-STEP.json

A run that stops because of such a step writes this file. The replay starts from the last checkpoint before the step, or
from the initial state. It computes the same batches, because their order and all randomness are functions of the seed
and the step.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dino_jax import checkpoints, storage
from dino_jax.data.sources import open_source
from dino_jax.distributed import fsdp, processes, sharding
from dino_jax.errors import UserError
from dino_jax.progress import progress
from dino_jax.training import loop, nonfinite
from dino_jax.training.config_checks import check_config
from dino_jax.training.setup import Setup, State, abstract_state, build_setup, share_unit
from dino_jax.training.step import gradients, image_keys, train_step

USAGE = "WORKDIR/replay-STEP.json"
LISTED = 20  # modules and images that the report lists


class Report(NamedTuple):
    """The results of a replayed step."""

    metrics: dict[str, float]  # of `train_step`
    grad_norms: dict[str, float]  # of each module; non-finite ones first, then in descending order
    images: list[tuple[str, str]]  # (name, what is not finite: pixels, teacher, student)


def replay(file: str | Path) -> Report:
    """Repeats the step of a replay file on this process's devices, with progress on stderr.

    The result is bit-identical to the run's on devices of the same kind and number, and equal up to rounding on others.
    Raises UserError if the file is not a replay file, the checkpoint is missing or damaged, or the images have changed.
    """
    with storage.fetched(file) as path:
        recorded = nonfinite.read_replay_file(path)
    config, step, start = ConfigDict(recorded["config"]), recorded["step"], recorded["checkpoint"]
    try:
        check_config(config, jax.device_count())
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds the config of another version ({error}): replay it with that one") from error
    source = open_source(config.data.source)
    setup = build_setup(config, loop.steps_in_epoch(source, config))
    mesh = sharding.make_mesh(fsdp=config.fsdp)
    state = state_after(start, os.path.dirname(file) or ".", setup, mesh)

    run_step = jax.jit(partial(train_step, setup, mesh), donate_argnums=0)
    with loop.batches_from(start, source, config) as batches:
        for before in progress(range(start + 1, step), step - start - 1, "steps before", unit="steps"):
            skip = np.bool_(before in recorded["skipped"])  # on other devices a norm just below the limit may pass it
            state, _ = run_step(state, loop.on_devices(next(batches), mesh), skip)
        batch = next(batches)
    names = [source.name(int(record)) for record in batch.index]
    if names != [image["name"] for image in recorded["images"]]:
        raise UserError(
            f"{config.data.source} no longer has the images of step {step:,}: restore the data that the run used"
        )

    arrays = loop.on_devices(batch, mesh)
    grads, *_ = jax.jit(partial(gradients, setup, mesh))(state, arrays)
    broken = jax.device_get(jax.jit(partial(not_finite, setup, mesh))(state, arrays))
    _, metrics = run_step(state, arrays, np.bool_(False))
    images = [
        (name, ", ".join(kind for kind, rows in broken.items() if rows[row]))
        for row, name in enumerate(names)
        if any(rows[row] for rows in broken.values())
    ]
    return Report({name: float(value) for name, value in jax.device_get(metrics).items()}, module_norms(grads), images)


def state_after(step: int, workdir: str, setup: Setup, mesh: Mesh) -> State:
    """Returns the run's state after a saved step, or the initial state for step 0."""
    if not step:
        return loop.first_state(setup, mesh)[0][0]
    with storage.fetched(f"{workdir}/checkpoints/{step}") as folder:
        if not folder.is_dir() or (problem := checkpoints.damage(folder)):
            condition = f"damaged ({problem})" if folder.is_dir() else "missing"
            raise UserError(f"checkpoint {folder}, where the replay starts, is {condition}: restore a copy")
        target = abstract_state(setup, mesh)
        return fsdp.place(checkpoints.restore_arrays(folder.resolve() / "state", target), mesh)


def not_finite(setup: Setup, mesh: Mesh, state: State, batch: Any) -> dict[str, jax.Array]:
    """Returns, for each image, whether its crops, teacher logits or student logits have non-finite values.

    The keys are "pixels", "teacher" and "student", each bool [B]. There is no drop path, and the student of DINOv2 sees
    whole crops.
    """
    config, method = setup.config, setup.method

    def own(state: Any, batch: Any) -> dict[str, jax.Array]:
        keys = image_keys(config.seed, state.step, batch.position)
        groups = setup.augment(keys[:, 0], batch).groups
        gather = partial(fsdp.gather, dtype=method.backbone.dtype)
        nothing = [None] * len(groups)
        student, teacher = gather(state.student), gather(state.teacher)
        student_z, _ = method.embed(student, state.student_stats, groups, nothing)
        teacher_z, _ = method.embed(teacher, state.teacher_stats, groups[:1], [None])

        def broken(arrays: Any) -> jax.Array:
            return ~jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in arrays]).all(0)

        return {
            "pixels": broken(groups),
            "teacher": broken([method.prototypes(teacher["head"]["last_layer"], teacher_z)]),
            "student": broken([method.prototypes(student["head"]["last_layer"], student_z)]),
        }

    return jax.shard_map(
        own, mesh=mesh, in_specs=(fsdp.specs(state), sharding.BATCH), out_specs=sharding.BATCH, check_vma=False
    )(state, batch)


def module_norms(grads: Any) -> dict[str, float]:
    """Returns the L2 norm of each module's gradients by dotted path; non-finite ones first, then largest first."""
    modules: dict[str, list[Any]] = {}
    for path, gradient in jax.tree.leaves_with_path(grads):
        modules.setdefault(jax.tree_util.keystr(path[:-1], simple=True, separator="."), []).append(gradient)
    norms = {name: float(norm) for name, norm in jax.device_get(jax.jit(_norms)(modules)).items()}
    return dict(sorted(norms.items(), key=lambda item: (np.isfinite(item[1]), -item[1])))


def _norms(modules: dict[str, list[Any]]) -> dict[str, jax.Array]:
    return {name: optax.tree.norm(gradients) for name, gradients in modules.items()}


def define_flags(arguments: Sequence[str]) -> None:
    """Defines no flags, because the replay file has all settings."""


def main(arguments: Sequence[str]) -> None:
    """Replays the step of a file and prints the report."""
    if len(arguments) != 1:
        raise UserError(f"usage: dino-jax replay {USAGE}")
    [file] = arguments
    with storage.fetched(file) as path:
        config = nonfinite.read_replay_file(path)["config"]
    processes.set_cpu_device_count(config["batch_size"], share_unit(ConfigDict(config)))  # as the trainer does
    metrics, grad_norms, images = replay(file)
    print(", ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "grad_norm", "param_norm", "lr")))
    print(f"gradient norms, {min(LISTED, len(grad_norms))} of {len(grad_norms)} modules:")
    for name, norm in list(grad_norms.items())[:LISTED]:
        print(f"  {norm:10.4g}  {name}")
    print(f"images with non-finite values: {len(images)}")
    for name, kinds in images[:LISTED]:
        print(f"  {name}: {kinds}")

"""The train step: gradients over a sharded batch, the optimizer update, and the guard against non-finite values.

It runs any method that implements `Method`, such as `dino_jax.dino.DINO`. One program runs over the mesh. Gradients are
computed inside a `jax.shard_map`, written for one device's share of the batch; everything after that is written for
global arrays.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dino_jax.distributed import fsdp, sharding
from dino_jax.health import signals
from dino_jax.training import optimizers, recent
from dino_jax.training.setup import Setup, State, Tree, abstract_batch

Metrics = dict[str, jax.Array]


def train_step(
    setup: Setup, mesh: Mesh, state: State, batch: Any, skip: bool | jax.Array = False
) -> tuple[State, Metrics]:
    """Runs one step on the global batch: updates the student by gradient, then the rest of the state by `update`.

    The step is skipped if the loss or gradient is not finite, if the gradient norm exceeds the limit of config.optim's
    skip_above, or if `skip` is true. Then only `step` and `recent` change and metrics["skipped"] is 1. Returns the new
    state and scalar metrics.
    """
    now = setup.schedules.at(state.step)
    grads, losses, means, stats = gradients(setup, mesh, state, batch)

    frozen = now.last_layer_frozen, now.backbone_frozen
    optimizer = optimizers.build(setup.config.optim, now.lr, now.weight_decay, *frozen)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.student)
    student = optax.apply_updates(state.student, updates)
    new = state.replace(student=student, opt_state=opt_state, **stats)
    new = setup.method.update(new, means, now.teacher_momentum)

    loss, grad_norm = total_loss(setup, losses), optax.tree.norm(grads)
    limit = recent.max_grad_norm(state.recent, setup.config.optim.skip_above)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (grad_norm <= limit) & ~jnp.asarray(skip)
    new = jax.tree.map(partial(jnp.where, good), new, state)
    lately = recent.add(state.recent, state.step, now, grad_norm, ~good, means["winners"])
    new = new.replace(step=state.step + 1, recent=lately)
    new = jax.lax.with_sharding_constraint(new, fsdp.shardings(new, mesh))

    metrics = {"loss": loss} | {f"loss_{name}": value for name, value in losses.items()}
    metrics |= setup.method.signals(new, losses, means)
    metrics |= signals.motion(state.student, new.student, new.teacher)
    metrics |= {"prototypes_used": signals.prototypes_used(lately["winners"])}
    metrics |= {"grad_norm": grad_norm, "grad_norm_q99": recent.quantile(lately)}
    metrics |= {"param_norm": optax.tree.norm(new.student), "skipped": 1.0 - good}
    metrics |= {name: value for name, value in now._asdict().items() if not name.endswith("_frozen")}
    return new, metrics


def total_loss(setup: Setup, losses: dict[str, jax.Array]) -> jax.Array:
    """Returns the sum of the method's losses, weighted by config.loss_weights."""
    return sum((setup.config.loss_weights[name] * value for name, value in losses.items()), jnp.float32(0))


def gradients(setup: Setup, mesh: Mesh, state: State, batch: Any) -> tuple[Tree, Tree, Tree, Tree]:
    """Returns the student's gradient, losses by name, the method's means, and new batch norm statistics.

    All are over the global batch. Statistics are keyed by their field of the state.
    """
    # check_vma=False keeps JAX from adding its own gradient reductions for replicated parameters.
    return jax.shard_map(
        partial(share_of_gradients, setup),
        mesh=mesh,
        in_specs=(fsdp.specs(state), sharding.BATCH),
        out_specs=(fsdp.specs(state.student), *[sharding.REPLICATED] * 3),
        check_vma=False,
    )(state, batch)


def share_of_gradients(setup: Setup, state: State, batch: Any) -> tuple[Tree, Tree, Tree, Tree]:
    """Computes `gradients` on one device's share, inside `shard_map`; reduces over devices once, at the end."""
    config, method = setup.config, setup.method
    gather = partial(fsdp.gather, dtype=method.backbone.dtype)
    state = state.replace(teacher=gather(state.teacher))
    teacher_temp = setup.schedules.at(state.step).teacher_temp
    taught = None
    if centered := setup.batch_centered:

        def teach(rows: Any) -> Any:
            return centered.teach(state, crops_of(setup, state.step, rows)[0])

        taught = in_parts(teach, batch, config.accum_steps)
        state = centered.center_on(state, taught, teacher_temp)

    def part(stats: Tree, rows: Any) -> tuple[Tree, Tree]:
        """Returns new statistics, and the values to average over the batch, for a part of the share's images."""
        rows, taught = rows
        crops, drop_paths = crops_of(setup, state.step, rows)
        known = () if taught is None else (taught,)

        def loss(student: Tree) -> tuple[jax.Array, tuple[Tree, Tree, Tree]]:
            outputs = method.losses(gather(student), state.replace(**stats), crops, drop_paths, teacher_temp, *known)
            return total_loss(setup, outputs[0]), outputs

        grads, (losses, means, new_stats) = jax.grad(loss, has_aux=True)(state.student)
        return new_stats, {"grads": grads, "losses": losses, "means": means}

    stats = {"student_stats": state.student_stats, "teacher_stats": state.teacher_stats}
    stats, sums = accumulate(part, stats, (batch, taught), config.accum_steps)
    means = fsdp.mean(jax.tree.map(lambda x: x / config.accum_steps, sums))  # the only reduction over devices
    return means["grads"], means["losses"], means["means"], stats


def crops_of(setup: Setup, step: jax.Array, rows: Any) -> tuple[Any, list[Any]]:
    """Returns the crops of some rows of a batch and, for each of their groups, the drop path factors or None."""
    keys = image_keys(setup.config.seed, step, rows.position)
    crops, rate = setup.augment(keys[:, 0], rows), setup.config.model.drop_path_rate
    depth = setup.method.backbone.depth if rate else 0
    return crops, [
        setup.drop_path(keys[:, 1 + i], rate, depth, group.shape[1]) if rate else None
        for i, group in enumerate(crops.groups)
    ]


def in_parts(function: Callable[..., Any], rows: Any, steps: int) -> Any:
    """Splits `rows` into `steps` parts, runs function(rows) on each in turn, and joins the results."""
    if steps == 1:
        return function(rows)
    results = jax.lax.map(function, jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def accumulate(part: Callable[..., tuple[Any, Any]], carry: Any, rows: Any, steps: int) -> tuple[Any, Any]:
    """Splits `rows` into `steps` parts, runs part(carry, rows) -> (carry, values) on each in turn, sums the values."""
    if steps == 1:  # XLA would keep a loop of one iteration, which costs a fifth of the step on a CPU
        return part(carry, rows)
    parts = jax.tree.map(lambda x: x.reshape(steps, -1, *x.shape[1:]), rows)
    shapes = jax.eval_shape(lambda carry, parts: part(carry, jax.tree.map(lambda x: x[0], parts)), carry, parts)[1]

    def add(carried: tuple[Any, Any], rows: Any) -> tuple[tuple[Any, Any], None]:
        carry, new = part(carried[0], rows)
        return (carry, jax.tree.map(jnp.add, carried[1], new)), None

    (carry, sums), _ = jax.lax.scan(add, (carry, jax.tree.map(jnp.zeros_like, shapes)), parts)
    return carry, sums


def image_keys(seed: int, step: jax.Array, position: jax.Array) -> jax.Array:
    """Returns keys [B, 3], three per image: for its crops, its drop paths in global crops, and those in local crops.

    The randomness of an image only depends on seed, step and its position in the *global* batch, so a run does not
    depend on the number of devices or hosts.
    """
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda place: jax.random.split(jax.random.fold_in(step_key, place), 3))(position)


def lower_step(setup: Setup, mesh: Mesh, state: State) -> jax.stages.Lowered:
    """Lowers `train_step` for the setup's batches. The compiled program donates its state.

    state: arrays, or the result of `setup.abstract_state`.
    """
    step = jax.jit(partial(train_step, setup, mesh), donate_argnums=0)
    return step.lower(state, abstract_batch(setup.config, mesh))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles the step, and returns the half GiB of host memory that compilation leaves allocated to the system."""
    program = lowered.compile()
    with suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return program

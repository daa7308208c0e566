"""From a config to what the train step needs: modules, schedules, crops, a state, and the shape of a batch."""

import ctypes
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax import dino, schedules, sharding
from dino_jax.data.multicrop import multicrop
from dino_jax.flops import count_flops
from dino_jax.models import DINOHead, build_backbone


class DeviceBatch(NamedTuple):
    """What of a `Batch` the devices need."""

    canvas: jax.Array  # uint8 [B, S, S, C]
    size: jax.Array  # float32 [B, 2]
    position: jax.Array  # int32 [B]


def build_recipe(config: ConfigDict, steps_per_epoch: int) -> dino.Recipe:
    """Modules, schedules and augmentation of a config."""
    dtype = compute_dtype(config.dtype)
    backbone = build_backbone(
        config.model.arch,
        patch_size=config.model.patch_size,
        image_size=config.crops.global_size,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=config.model.attention,
        dtype=dtype,
        axis_name=sharding.AXES,
        gather=sharding.gather if config.fsdp > 1 else None,
    )
    head = DINOHead(**config.head, axis_name=sharding.AXES, dtype=dtype)

    def augment(keys, batch):
        with jax.named_scope("crops"):
            return multicrop(keys, batch.canvas, batch.size, config.crops, config.data.mean, config.data.std, dtype)

    return dino.Recipe(config, dino.Network(backbone, head), schedules.from_config(config, steps_per_epoch), augment)


def lower_step(recipe: dino.Recipe, mesh: jax.sharding.Mesh, state: dino.TrainState) -> jax.stages.Lowered:
    """`dino.train_step` for the recipe's batches, ready to be compiled; it gives up the state that it is called with.

    state: arrays, or `abstract_state`.
    """
    step = jax.jit(partial(dino.train_step, recipe, mesh), donate_argnums=0)
    return step.lower(state, abstract_batch(recipe.config, mesh), np.float32(np.inf))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program. What making it left allocated, half a GiB of the host's memory, goes back to the system."""
    program = lowered.compile()
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return program


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> DeviceBatch:
    """Shapes, dtypes and shardings of a global batch."""
    B, side = config.batch_size, config.data.canvas_size
    rows: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.NamedSharding(mesh, sharding.BATCH))
    return DeviceBatch(
        canvas=rows((B, side, side, config.model.in_channels), np.uint8),
        size=rows((B, 2), np.float32),
        position=rows((B,), np.int32),
    )


def compute_dtype(name: str) -> jnp.dtype:
    """`auto` is bfloat16 where matrix units want it, float32 on a CPU, which only emulates it."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def init_state(recipe: dino.Recipe, mesh: jax.sharding.Mesh) -> dino.TrainState:
    """A fresh state on the devices, a function of config.seed."""
    config = recipe.config
    shape = (config.crops.global_size, config.crops.global_size, config.model.in_channels)
    init = partial(dino.init_state, network=recipe.network, optim=config.optim, image_shape=shape)
    key = jax.random.key(config.seed)
    return jax.jit(init, out_shardings=sharding.shardings(jax.eval_shape(init, key), mesh))(key)


def abstract_state(recipe: dino.Recipe, mesh: jax.sharding.Mesh) -> dino.TrainState:
    """Shapes, dtypes and shardings of the state, for restoring one without making a fresh one first."""
    shapes = jax.eval_shape(lambda: init_state(recipe, mesh))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def flops_per_image(recipe: dino.Recipe) -> float:
    """Model FLOPs of a step for one image: student forward and backward (3 x forward), teacher forward."""
    countable = recipe.config.copy_and_resolve_references()
    countable.model.attention = "xla"  # a fused kernel shows no products
    crops, network = recipe.config.crops, build_recipe(countable, steps_per_epoch=1).network
    channels = recipe.config.model.in_channels

    def forward(size):
        images = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
        backbone = jax.eval_shape(network.backbone.init, jax.random.key(0), images)
        features = jax.eval_shape(network.backbone.apply, backbone, images)
        head = jax.eval_shape(network.head.init, jax.random.key(0), features)
        return sum(
            count_flops(module.apply, variables, x)
            for module, variables, x in ((network.backbone, backbone, images), (network.head, head, features))
        )

    teacher = 2 * forward(crops.global_size)
    return 3 * (teacher + crops.local_number * forward(crops.local_size)) + teacher

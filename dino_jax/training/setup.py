"""Builds what the train step needs from a config: the method with its modules, schedules, augmentation, and a state."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dino_jax import dino, dino_variants, dinov2
from dino_jax.data import masks
from dino_jax.data.multicrop import Crops, multicrop
from dino_jax.distributed import fsdp, sharding
from dino_jax.models import DINOHead, build_backbone
from dino_jax.models.drop_path import drop_path_factors, drop_path_subsets
from dino_jax.models.registry import given_sizes, given_variant
from dino_jax.training import chunked_loss, optimizers, recent, schedules
from dino_jax.training.flops import count_flops

Tree = dict[str, Any]
State = Any  # a method's dataclass of arrays: step, student, teacher, *_stats, opt_state, recent, and more


class Method(Protocol):
    """The interface of a method that the train step uses; `dino.DINO` documents each function."""

    @property
    def backbone(self) -> Any:
        """The backbone's module."""

    @property
    def head(self) -> Any:
        """The head's module."""

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> State:
        """Returns the state before the first step, without opt_state and recent."""

    def losses(
        self, student: Tree, state: State, crops: Any, drop_paths: list[Any], teacher_temp: jax.Array
    ) -> tuple[Tree, Tree, Tree]:
        """Returns losses by name, means over the batch (`winners` [K] among them), and new batch norm statistics."""

    def embed(self, params: Tree, stats: Tree, groups: list[Any], drop_paths: list[Any]) -> tuple[jax.Array, Tree]:
        """Groups of crops -> unit vectors [B, V, bottleneck], new batch norm statistics."""

    def prototypes(self, last_layer: Tree, z: jax.Array) -> jax.Array:
        """Unit vectors [..., bottleneck] -> logits [..., K]."""

    def update(self, state: State, means: Tree, teacher_momentum: jax.Array) -> State:
        """Updates the parts of the state that are not trained by gradient."""

    def signals(self, state: State, losses: Tree, means: Tree) -> Tree:
        """Returns further scalars to log with the losses."""


class BatchCentered(Method, Protocol):
    """A method that centers the targets of a batch on the batch itself; `losses` then takes what `teach` returns."""

    def teach(self, state: State, crops: Any) -> Tree:
        """Returns the teacher's outputs for a part of the batch."""

    def center_on(self, state: State, taught: Tree, teacher_temp: jax.Array) -> State:
        """Returns the state with the center of a batch, given the teacher's outputs for a device's share of it."""


class Setup(NamedTuple):
    """The constants of a run, shared by all steps.

    `augment(keys [B], batch)` -> crops is applied first to each batch, a pytree whose leaves have `B` rows and whose
    `position` (int32 [B]) is the index of each image in the *global* batch.
    """

    config: ConfigDict
    method: Method
    schedules: schedules.Schedules
    augment: Callable[..., Any]
    drop_path: Callable[..., jax.Array] = drop_path_factors  # (keys [B], rate, depth, views) -> factors
    batch_centered: BatchCentered | None = None  # the method, if it is one


class DeviceBatch(NamedTuple):
    """Fields of a `Batch` that are sent to the devices."""

    canvas: jax.Array  # data.dtype [B, S, S, C]
    size: jax.Array  # float32 [B, 2]
    position: jax.Array  # int32 [B]


def build_dino(
    config: ConfigDict, backbone: Any, head: Any, variant: type[dino.DINO] = dino.DINO, **fields: Any
) -> dino.DINO:
    """Builds the DINO method of config.dino, with the loss that never holds all logits in memory.

    variant: DINO or one of `dino_variants`. fields: those that the variant adds.
    """
    momentum, loss = _center_momentum(config), chunked_loss.loss_from_head
    return variant(backbone, head, config.dino.student_temp, momentum, loss, **fields)


def build_dinov2(config: ConfigDict, backbone: Any, head: Any) -> dinov2.DINOv2:
    """Builds the DINOv2 method of config.dino and config.dinov2."""
    settings, patch_head = config.dinov2, None
    if settings.separate_head:
        sizes = {"out_dim": settings.patch_out_dim, "bottleneck_dim": settings.patch_bottleneck_dim}
        patch_head = DINOHead(**(config.head.to_dict() | sizes), axis_name=sharding.AXES, dtype=head.dtype)
    return dinov2.DINOv2(
        backbone,
        head,
        patch_head,
        config.dino.student_temp,
        _center_momentum(config),
        sinkhorn=settings.targets == "sinkhorn",
        group_images=settings.group_images,
        axes=sharding.AXES,
        loss_from_head=chunked_loss.loss_from_head,
        ibot_from_head=chunked_loss.ibot_from_head,
    )


def _center_momentum(config: ConfigDict) -> float:
    return config.dino.center_momentum if config.dino.centering else 1.0


# config.method -> (config, backbone, head) -> method
METHODS: dict[str, Callable[..., Method]] = {
    "dino": build_dino,
    "dino_mse": partial(build_dino, variant=dino_variants.DINOWithMSE),
    "dino_predictor": partial(build_dino, variant=dino_variants.DINOWithPredictor),
    "dino_sinkhorn": partial(build_dino, variant=dino_variants.DINOWithSinkhorn, axes=sharding.AXES),
    "dino_sinkhorn_predictor": partial(
        build_dino, variant=dino_variants.DINOWithSinkhornAndPredictor, axes=sharding.AXES
    ),
    "dinov2": build_dinov2,
}
SINKHORN = ("dino_sinkhorn", "dino_sinkhorn_predictor")  # methods that always center targets on the batch
TARGETS = ("center", "sinkhorn")  # config.dinov2.targets


def build_setup(config: ConfigDict, steps_per_epoch: int) -> Setup:
    """Builds the method with its modules, the schedules and the augmentation of a config."""
    dtype = compute_dtype(config.dtype)
    backbone = build_backbone(
        config.model.arch,
        **given_sizes(config.model),
        **given_variant(config.model),
        patch_size=config.model.patch_size,
        image_size=config.crops.global_size,
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention=config.model.attention,
        dtype=dtype,
        axis_name=sharding.AXES,
        gather=fsdp.gather if config.fsdp > 1 else None,
        mask_token=config.method == "dinov2",
    )
    head = DINOHead(**config.head, axis_name=sharding.AXES, dtype=dtype)

    def augment(keys: jax.Array, batch: DeviceBatch) -> Crops:
        with jax.named_scope("crops"):
            return multicrop(keys, batch.canvas, batch.size, config.crops, config.data.mean, config.data.std, dtype)

    method: Any = METHODS[config.method](config, backbone, head)
    schedule = schedules.from_config(config, steps_per_epoch)
    if config.method != "dinov2":
        return Setup(config, method, schedule, augment, batch_centered=method if config.method in SINKHORN else None)
    settings = mask_settings(config)
    return Setup(
        config,
        method,
        schedule,
        augment=lambda keys, batch: masks.mask_crops(keys, augment(keys, batch), settings),
        drop_path=partial(drop_path_subsets, images=settings.images),
        batch_centered=method if config.dinov2.targets == "sinkhorn" else None,
    )


def mask_settings(config: ConfigDict) -> masks.MaskSettings:
    """Returns the settings of the masks of config.dinov2."""
    size, patch, settings = config.crops.global_size, config.model.patch_size, config.dinov2
    return masks.MaskSettings(
        grid=(size // patch, size // patch),
        largest=masks.largest_block(size, patch),
        images=settings.group_images,
        probability=settings.mask_probability,
        ratio=tuple(settings.mask_ratio),
    )


def _patch_head_flops(method: Any, settings: masks.MaskSettings) -> float:
    """Returns the FLOPs of the head on the masked patches of an image, forward."""
    head, features = method.patch_head or method.head, jax.ShapeDtypeStruct((1, method.backbone.embed_dim), np.float32)
    variables = jax.eval_shape(head.init, jax.random.key(0), features)
    return count_flops(head.apply, variables, features) * settings.bound / settings.images


def share_unit(config: ConfigDict) -> int:
    """Returns the number that a device's share of a batch must be a multiple of."""
    return config.accum_steps * (config.dinov2.group_images if config.method == "dinov2" else 1)


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> DeviceBatch:
    """Returns the shapes, dtypes and shardings of a global batch."""
    B, side = config.batch_size, config.data.canvas_size
    rows: Any = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.NamedSharding(mesh, sharding.BATCH))
    return DeviceBatch(
        canvas=rows((B, side, side, config.model.in_channels), np.dtype(config.data.dtype)),
        size=rows((B, 2), np.float32),
        position=rows((B,), np.int32),
    )


def compute_dtype(name: str) -> jnp.dtype:
    """Returns the dtype of activations. `auto`: bfloat16 on accelerators, float32 on CPUs, which emulate bfloat16."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def init_state(setup: Setup, mesh: jax.sharding.Mesh) -> State:
    """Creates a fresh state on the devices, as a function of config.seed."""
    config = setup.config
    shape = (config.crops.global_size, config.crops.global_size, config.model.in_channels)
    key = jax.random.key(config.seed)

    def init(key: jax.Array) -> State:
        state = setup.method.init(key, shape)
        opt_state = optimizers.build(config.optim).init(state.student)
        return state.replace(opt_state=opt_state, recent=recent.init(config.head.out_dim))

    return jax.jit(init, out_shardings=fsdp.shardings(jax.eval_shape(init, key), mesh))(key)


def abstract_state(setup: Setup, mesh: jax.sharding.Mesh) -> State:
    """Returns the shapes, dtypes and shardings of the state, to restore a state without creating a fresh one first."""
    shapes = jax.eval_shape(lambda: init_state(setup, mesh))
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        fsdp.shardings(shapes, mesh),
    )


def backbone_variables(state: State, who: str) -> Tree:
    """The variables {"params", "batch_stats"} of the backbone of the "teacher" or "student"."""
    return {"params": getattr(state, who)["backbone"], "batch_stats": getattr(state, f"{who}_stats")["backbone"]}


def flops_per_image(setup: Setup) -> float:
    """Returns the model FLOPs of a step per image: student forward and backward (3 x forward) and teacher forward."""
    countable = setup.config.copy_and_resolve_references()
    countable.model.attention = "xla"  # products inside a fused kernel cannot be counted
    crops, method = setup.config.crops, build_setup(countable, steps_per_epoch=1).method
    channels = setup.config.model.in_channels

    def forward(size: int) -> int:
        images = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
        backbone = jax.eval_shape(method.backbone.init, jax.random.key(0), images)
        features = jax.eval_shape(method.backbone.apply, backbone, images).cls
        head = jax.eval_shape(method.head.init, jax.random.key(0), features)
        return sum(
            count_flops(module.apply, variables, x)
            for module, variables, x in ((method.backbone, backbone, images), (method.head, head, features))
        )

    teacher = 2.0 * forward(crops.global_size)
    if setup.config.method == "dinov2":
        teacher += _patch_head_flops(method, mask_settings(setup.config))
    return 3 * (teacher + crops.local_number * forward(crops.local_size)) + teacher

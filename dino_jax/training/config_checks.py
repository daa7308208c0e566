"""Validates a config before anything is read or compiled. Errors are one line with the setting and how to fix it."""

from typing import Any

import jax
from ml_collections import ConfigDict

from dino_jax import recipes
from dino_jax.data.pixels import WHITE
from dino_jax.errors import UserError, listed
from dino_jax.limits import (
    COUNT,
    COUNT_OR_NONE,
    EPOCHS,
    FACTOR,
    PIXELS,
    SECONDS,
    SEED,
    SHARE,
    TEMPERATURE,
    Above,
    Limits,
    check_numbers,
)
from dino_jax.models.blocks import FFNS
from dino_jax.models.registry import ARCHITECTURES, CONFIGURED, SIZES, check_patch_size, check_sizes, family_of
from dino_jax.provenance import flat
from dino_jax.training.init_from import ADAPTATIONS
from dino_jax.training.optimizers import CLIPS, FREEZES, OPTIMIZERS
from dino_jax.training.schedules import LR_RULES, TEACHER_UPDATES, TEMPERATURE_STEPS
from dino_jax.training.setup import METHODS, TARGETS, mask_settings
from dino_jax.training.writers import WRITERS

CHOICES = {
    "model.arch": tuple(ARCHITECTURES),
    "method": tuple(METHODS),
    "optim.name": OPTIMIZERS,
    "dino.teacher_update": TEACHER_UPDATES,
    "dino.teacher_temp_changes": TEMPERATURE_STEPS,
    "dinov2.targets": TARGETS,
    "optim.lr_rule": tuple(LR_RULES),
    "optim.clip_by": CLIPS,
    "optim.freeze_by": FREEZES,
    "data.dtype": tuple(WHITE),
    "dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("xla", "cudnn"),
    "model.ffn": tuple(FFNS),
}
# Every numeric setting of configs/default.py.
LIMITS: Limits = {
    "seed": SEED,
    "batch_size": (1, 1_000_000),
    "epochs": Above(0, 1e6),
    "accum_steps": (1, 100_000),
    "fsdp": (1, 100_000),
    "log_every": COUNT,
    "verify_every": COUNT_OR_NONE,
    **{f"model.{name}": (0, 100_000) for name in SIZES},
    "model.patch_size": PIXELS,
    "model.registers": (0, 1_024),
    "model.layer_scale": (0, 100),
    "model.in_channels": (1, 1_024),
    "model.drop_path_rate": SHARE,
    "head.out_dim": (2, 10_000_000),
    "head.hidden_dim": (1, 1_000_000),
    "head.bottleneck_dim": (1, 1_000_000),
    "head.layers": (1, 100),
    "dino.student_temp": TEMPERATURE,
    "dino.teacher_temp": TEMPERATURE,
    "dino.warmup_teacher_temp": TEMPERATURE,
    "dino.warmup_teacher_temp_epochs": EPOCHS,
    "dino.teacher_momentum": SHARE,
    "dino.teacher_momentum_end": SHARE,
    "dino.center_momentum": SHARE,
    "dinov2.group_images": (2, 1_000_000),
    "dinov2.mask_probability": SHARE,
    "dinov2.mask_ratio": SHARE,
    "dinov2.patch_out_dim": (2, 10_000_000),
    "dinov2.patch_bottleneck_dim": (1, 1_000_000),
    "optim.lr": Above(0, 1e38),  # what float32 holds
    "optim.layer_decay": Above(0, 1),
    "optim.patch_embed_lr": FACTOR,
    "optim.min_lr": FACTOR,
    "optim.weight_decay": FACTOR,
    "optim.weight_decay_end": FACTOR,
    "optim.clip_grad": FACTOR,
    "optim.warmup_epochs": EPOCHS,
    "optim.freeze_last_layer_epochs": EPOCHS,
    "optim.freeze_backbone_epochs": EPOCHS,
    "optim.max_skipped": COUNT_OR_NONE,
    "optim.skip_above": FACTOR,
    "crops.global_size": PIXELS,
    "crops.local_size": PIXELS,
    "crops.local_number": (0, 1_000),
    "crops.global_scale": Above(0, 1),
    "crops.local_scale": Above(0, 1),
    "crops.flip": SHARE,
    "crops.jitter": SHARE,
    "crops.grayscale": SHARE,
    "crops.global_blur": SHARE,
    "crops.local_blur": SHARE,
    "crops.global_solarize": SHARE,
    "crops.brightness": (0, 100),
    "crops.contrast": (0, 100),
    "crops.saturation": (0, 100),
    "crops.hue": (0, 0.5),
    "crops.blur_sigma": Above(0, 1_000),
    "crops.blur_taps": (0, 1_001),
    "data.canvas_size": PIXELS,
    "data.workers": (0, 1_024),
    "data.stall_timeout": SECONDS,
    "data.max_bad_fraction": SHARE,
    "data.range": (-(2**32), 2**32),
    "data.shown": (0, 1_023),
    "data.mean": (-1_000, 1_000),
    "data.std": Above(0, 1_000),
    "eval.resize": PIXELS,
    "eval.crop": PIXELS,
    "eval.batch_size": (1, 1_000_000),
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every_steps": COUNT_OR_NONE,
    "checkpoint.stop_within": Above(0, 1e8),
    "distributed.num_processes": (1, 100_000),
    "distributed.process_id": (0, 99_999),
    "distributed.timeout": (1, 1e6),
    "distributed.heartbeat": (1, 1e6),
    "watchdog.seconds": SECONDS,
    "watchdog.slow_seconds": (1, 1e8),
    "loss_weights.dino": (0, 1e6),
    "loss_weights.mse": (0, 1e6),
    "loss_weights.ibot": (0, 1e6),
    "loss_weights.koleo": (0, 1e6),
    "evals.knn.every_epochs": COUNT_OR_NONE,
    "evals.knn.k": COUNT,
    "evals.probe.every_epochs": COUNT_OR_NONE,
    "evals.pictures.every_epochs": COUNT_OR_NONE,
    "evals.probe.images": (2, 1_000_000),
    "evals.probe.pairs": (1, 32),
}
OPTIONAL = "evals."  # sections that a recipe may leave out
# Pairs in config.crops: a smaller and a larger number, and one probability for each global crop.
RANGES = ("global_scale", "local_scale", "blur_sigma")
PAIRS = ("global_blur", "global_solarize")
# Settings of config.model that only some families have: name in an error message, and the value that disables it.
FAMILY_SETTINGS = {
    "drop_path_rate": ("drop path", 0),
    "remat": ("rematerialization", False),
    "unroll": ("loop over its blocks", False),
    "attention": ("attention", "xla"),
    "registers": ("registers", CONFIGURED["registers"]),
    "layer_scale": ("LayerScale", CONFIGURED["layer_scale"]),
    "ffn": ("feed-forward networks", CONFIGURED["ffn"]),
    "antialias": ("positions", CONFIGURED["antialias"]),
}


def check_config(config: ConfigDict, devices: int) -> None:
    """Raises UserError for the first setting that is invalid, or does not work on this number of devices."""
    _check_names(config)
    if not config.data.source:
        raise UserError("data.source is not set: give --config.data.source=folder:PATH (or tfds:NAME, demo)")
    _check_values(config)
    _check_crops(config.crops)
    _check_channels(config)
    _check_model(config)
    _check_batch(config, devices)
    if config.method == "dinov2":
        _check_dinov2(config, devices)
    _check_epochs(config)
    if config.eval.crop > config.eval.resize:
        raise UserError(
            f"eval.crop {config.eval.crop} is larger than eval.resize {config.eval.resize}: "
            f"set --config.eval.resize to {config.eval.crop} or more"
        )


def _check_names(config: ConfigDict) -> None:
    """Checks that a recipe has the settings of configs/default.py, with values of the same types."""
    known, given = (flat(settings.to_dict()) for settings in (recipes.get_config("default"), config))
    missing = [name for name in known if name not in given and not name.startswith(OPTIONAL)]
    if missing:
        raise UserError(
            f"the recipe lacks {listed(missing)}: start it from another one with dino_jax.get_config('default')"
        )
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"unknown setting {unknown[0]}: `dino-jax train --help` lists all settings")
    for name, value in given.items():
        expected = type(known[name])
        if not isinstance(
            value, (int, float) if expected is float else (tuple, list) if expected is tuple else expected
        ):
            raise UserError(f"{name} is {value!r}: set --config.{name} to a value of type {expected.__name__}")


def _check_values(config: ConfigDict) -> None:
    for name, options in CHOICES.items():
        if (value := _get(config, name)) not in options:
            raise UserError(f"{name} {value!r} is unknown: set --config.{name} to one of {', '.join(options)}")
    if unknown := [name for name in config.init_adapt.split(",") if name not in ("", *ADAPTATIONS)]:
        raise UserError(
            f"init_adapt {unknown[0]!r} is unknown: set --config.init_adapt to a subset of {','.join(ADAPTATIONS)}"
        )
    if config.health.stop not in ("never", "collapse"):
        raise UserError(f"health.stop {config.health.stop!r} is unknown: set --config.health.stop to never or collapse")
    if unknown := [name for name in config.writers.split(",") if name not in ("", *WRITERS)]:
        raise UserError(f"writers {unknown[0]!r} is unknown: set --config.writers to a subset of {','.join(WRITERS)}")
    check_numbers(config, LIMITS)
    if config.model.drop_path_rate == 1:
        raise UserError("model.drop_path_rate is 1: set --config.model.drop_path_rate below 1")


def _check_epochs(config: ConfigDict) -> None:
    """Checks that no part of the schedules takes the whole run."""
    longest = f"the run of {config.epochs:g} epochs"
    for name in ("optim.warmup_epochs", "optim.freeze_last_layer_epochs", "optim.freeze_backbone_epochs"):
        if (part := _get(config, name)) >= config.epochs:
            raise UserError(
                f"{name} {part:g} is not shorter than {longest}: set --config.{name} below {config.epochs:g}"
            )
    name = "dino.warmup_teacher_temp_epochs"
    if (part := _get(config, name)) > config.epochs:
        raise UserError(
            f"{name} {part:g} is longer than {longest}, which never reaches dino.teacher_temp: "
            f"set --config.{name} to {config.epochs:g} or less"
        )


def _check_crops(crops: ConfigDict) -> None:
    for key in (*RANGES, *PAIRS):
        values = tuple(crops[key])
        if len(values) != 2:
            raise UserError(f"crops.{key} has {len(values)} values: set --config.crops.{key} to two, like '(0.1,1.0)'")
        if key in RANGES and values[0] > values[1]:
            raise UserError(f"crops.{key} is {values}: set --config.crops.{key} to a smaller and a larger number")

    smallest = min(crops.global_size, crops.local_size)
    if crops.blur_taps and (crops.blur_taps % 2 == 0 or crops.blur_taps // 2 >= smallest):
        raise UserError(
            f"crops.blur_taps is {crops.blur_taps}: set --config.crops.blur_taps to 0 or to an odd number below "
            f"{2 * smallest}"
        )


def _check_channels(config: ConfigDict) -> None:
    for key in ("mean", "std"):
        if len(config.data[key]) != config.model.in_channels:
            raise UserError(
                f"data.{key} has {len(config.data[key])} values for model.in_channels={config.model.in_channels}: "
                f"set --config.data.{key} to one value per channel"
            )
    bounds = tuple(config.data.range)
    if not (bounds == (0, 0) or (len(bounds) == 2 and bounds[0] < bounds[1])):
        raise UserError(f"data.range is {bounds}: set --config.data.range to a smaller and a larger number")
    shown = tuple(config.data.shown)
    if config.model.in_channels > 3 and (len(shown) != 3 or max(shown) >= config.model.in_channels):
        raise UserError(
            f"data.shown is {shown}: set --config.data.shown to three channels from 0 to {config.model.in_channels - 1}"
        )


def _check_model(config: ConfigDict) -> None:
    model, crops, family = config.model, config.crops, family_of(config.model.arch)
    check_sizes(model.arch, model)
    check_patch_size(model.arch, model.patch_size)
    for key, (what, without) in FAMILY_SETTINGS.items():
        if key not in family.settings and model[key] != without:
            raise UserError(f"{model.arch} has no {what}: set --config.model.{key}={without}")
    for key in ("layer_decay", "patch_embed_lr"):
        if config.optim[key] != 1 and not family.block_tokens:
            raise UserError(f"optim.{key} is for ViTs, and {model.arch} is not one: set --config.optim.{key}=1")
    if model.remat and model.unroll:
        raise UserError(
            "model.remat needs the loop over the blocks: set --config.model.unroll=False or --config.model.remat=False"
        )
    if model.attention == "cudnn":
        _check_cudnn(config.dtype)
    if not family.square_patches:
        return
    sizes = {"crops.global_size": crops.global_size, "eval.crop": config.eval.crop}
    if crops.local_number:
        sizes["crops.local_size"] = crops.local_size
    for name, size in sizes.items():
        patch = model.patch_size
        if size % patch or size < patch:
            below = max(size // patch, 1) * patch
            raise UserError(
                f"{name} {size} is not a multiple of the patch size {patch}: "
                f"set --config.{name} to {below} or {below + patch}"
            )


def _check_cudnn(dtype: str) -> None:
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" on a Hopper; a name on AMD devices
    if not (capability[:1].isdigit() and float(capability) >= 8):
        raise UserError(
            f"model.attention=cudnn needs an NVIDIA GPU, Ampere or newer, not {device.device_kind}: "
            "set --config.model.attention=xla"
        )
    if dtype == "float32":
        raise UserError(
            "model.attention=cudnn computes in bfloat16, but dtype is float32: "
            "set --config.dtype=bfloat16 or --config.model.attention=xla"
        )


def _check_batch(config: ConfigDict, devices: int) -> None:
    if devices % config.fsdp:
        raise UserError(
            f"fsdp {config.fsdp} does not divide {devices} devices: set --config.fsdp to a divisor of {devices}"
        )
    share = devices * config.accum_steps
    if config.batch_size % share:
        below = config.batch_size // share * share
        options = " or ".join(str(size) for size in (below, below + share) if size)
        parts = f"{devices} devices" + (f" x {config.accum_steps} accum_steps" if config.accum_steps > 1 else "")
        raise UserError(f"batch {config.batch_size} does not divide over {parts}: set --config.batch_size to {options}")


def _check_dinov2(config: ConfigDict, devices: int) -> None:
    """Checks what the masks and the groups of images of DINOv2 need."""
    if not family_of(config.model.arch).masks:
        raise UserError(
            f"method=dinov2 needs a ViT, and {config.model.arch} is not one: set --config.model.arch to a ViT"
        )
    if config.head.use_bn:
        raise UserError("method=dinov2 has heads without batch norm: set --config.head.use_bn=False")
    share, group = config.batch_size // (devices * config.accum_steps), config.dinov2.group_images
    if share < 2:
        raise UserError(
            "method=dinov2 compares images, but a device processes one at a time: set --config.batch_size to "
            f"{2 * devices * config.accum_steps} or more, or fewer --config.accum_steps"
        )
    if share % group:
        raise UserError(
            f"dinov2.group_images {group} does not divide the {share} images that a device processes at a time: "
            f"set --config.dinov2.group_images to one of {', '.join(_divisors(share))}"
        )
    ratio = tuple(config.dinov2.mask_ratio)
    if len(ratio) != 2 or ratio[0] > ratio[1]:
        raise UserError(
            f"dinov2.mask_ratio is {ratio}: set --config.dinov2.mask_ratio to a smaller and a larger number"
        )
    settings = mask_settings(config)
    if min(settings.grid) < 4:  # most blocks would not fit
        raise UserError(
            f"crops.global_size {config.crops.global_size} has {settings.grid[0]} patches a side, too few for masks: "
            f"set --config.crops.global_size to {4 * config.model.patch_size} or more"
        )
    if settings.bound == 0:
        raise UserError(
            f"dinov2.mask_probability {settings.probability} and dinov2.mask_ratio {ratio} mask no patch of "
            f"{settings.patches}: set --config.dinov2.mask_probability or the end of --config.dinov2.mask_ratio higher"
        )


def _divisors(number: int) -> list[str]:
    return [str(part) for part in range(2, number + 1) if number % part == 0]


def _get(config: ConfigDict, name: str) -> Any:
    for key in name.split("."):
        config = config[key]
    return config

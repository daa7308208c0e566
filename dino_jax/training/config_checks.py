"""Validates a config before anything is read or compiled. Errors are one line with the setting and how to fix it."""

from typing import Any

import jax
from ml_collections import ConfigDict

from dino_jax.errors import UserError
from dino_jax.models.registry import ARCHITECTURES, SIZES, check_sizes, family_of
from dino_jax.training.evaluators import EVALUATORS
from dino_jax.training.init_from import ADAPTATIONS
from dino_jax.training.optimizers import OPTIMIZERS
from dino_jax.training.schedules import TEACHER_UPDATES
from dino_jax.training.setup import METHODS
from dino_jax.training.writers import WRITERS

CHOICES = {
    "model.arch": tuple(ARCHITECTURES),
    "method": tuple(METHODS),
    "optim.name": OPTIMIZERS,
    "dino.teacher_update": TEACHER_UPDATES,
    "dtype": ("auto", "float32", "bfloat16"),
    "model.attention": ("xla", "cudnn"),
}
AT_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "epochs": 1,
    "accum_steps": 1,
    "fsdp": 1,
    "log_every": 1,
    "verify_every": 0,
    "model.patch_size": 1,
    "model.in_channels": 1,
    **{f"model.{name}": 0 for name in SIZES},
    "head.out_dim": 1,
    "head.hidden_dim": 1,
    "head.bottleneck_dim": 1,
    "head.layers": 1,
    "optim.min_lr": 0,
    "optim.weight_decay": 0,
    "optim.weight_decay_end": 0,
    "optim.clip_grad": 0,
    "optim.max_skipped": 0,
    "optim.skip_above": 0,
    "optim.warmup_epochs": 0,
    "optim.freeze_last_layer_epochs": 0,
    "dino.warmup_teacher_temp_epochs": 0,
    "crops.local_number": 0,
    "crops.brightness": 0,
    "crops.contrast": 0,
    "crops.saturation": 0,
    "crops.hue": 0,
    "data.canvas_size": 1,
    "data.workers": 0,
    "data.stall_timeout": 0,
    "eval.batch_size": 1,
    "evals.knn.k": 1,
    "evals.knn.every_epochs": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every_steps": 0,
    "distributed.num_processes": 1,
    "distributed.timeout": 1,
    "distributed.heartbeat": 1,
    "watchdog.seconds": 0,
    "watchdog.slow_seconds": 1,
}
POSITIVE = ("optim.lr", "dino.student_temp", "dino.teacher_temp", "dino.warmup_teacher_temp")
SHARES = ("dino.teacher_momentum", "dino.teacher_momentum_end", "dino.center_momentum", "data.max_bad_fraction")
# Keys of config.crops: probabilities, pairs of probabilities, and (below) pairs of numbers.
PROBABILITIES = ("flip", "jitter", "grayscale", "local_blur")
PAIRS_OF_PROBABILITIES = ("global_blur", "global_solarize")
# Settings of config.model that only some families have: name in an error message, and the value that disables it.
FAMILY_SETTINGS = {
    "drop_path_rate": ("drop path", 0),
    "remat": ("rematerialization", False),
    "unroll": ("loop over its blocks", False),
    "attention": ("attention", "xla"),
}
RANGES = ("global_scale", "local_scale", "blur_sigma")


def check_config(config: ConfigDict, devices: int) -> None:
    """Raises UserError for the first setting that is invalid, or does not work on this number of devices."""
    if not config.data.source:
        raise UserError("data.source is not set: give --config.data.source=folder:PATH (or tfds:NAME, demo)")
    _check_values(config)
    _check_crops(config.crops)
    _check_channels(config)
    _check_model(config)
    _check_batch(config, devices)
    if config.optim.warmup_epochs >= config.epochs:
        raise UserError(
            f"optim.warmup_epochs {config.optim.warmup_epochs} is not shorter than the run of {config.epochs} epochs: "
            f"set --config.optim.warmup_epochs below {config.epochs}"
        )
    if config.eval.crop > config.eval.resize:
        raise UserError(
            f"eval.crop {config.eval.crop} is larger than eval.resize {config.eval.resize}: "
            f"set --config.eval.resize to {config.eval.crop} or more"
        )


def _check_values(config: ConfigDict) -> None:
    for name, options in CHOICES.items():
        if (value := _get(config, name)) not in options:
            raise UserError(f"{name} {value!r} is unknown: set --config.{name} to one of {', '.join(options)}")
    for name, least in AT_LEAST.items():
        if not (value := _get(config, name)) >= least:  # also true for NaN
            raise UserError(f"{name} is {value}: set --config.{name} to {least} or more")
    for name in POSITIVE:
        if not 0 < (value := _get(config, name)) < float("inf"):
            raise UserError(f"{name} is {value}: set --config.{name} above 0")
    for name in SHARES:
        if not 0 <= (value := _get(config, name)) <= 1:
            raise UserError(f"{name} is {value}: set --config.{name} to a value from 0 to 1")
    if unknown := [name for name in config.init_adapt.split(",") if name not in ("", *ADAPTATIONS)]:
        raise UserError(
            f"init_adapt {unknown[0]!r} is unknown: set --config.init_adapt to a subset of {','.join(ADAPTATIONS)}"
        )
    if unknown := [name for name in config.writers.split(",") if name not in ("", *WRITERS)]:
        raise UserError(f"writers {unknown[0]!r} is unknown: set --config.writers to a subset of {','.join(WRITERS)}")
    if unknown := [name for name in config.evals if name not in EVALUATORS]:
        raise UserError(f"evals.{unknown[0]} is unknown: config.evals has settings of {', '.join(EVALUATORS)}")
    if not 0 <= (rate := config.model.drop_path_rate) < 1:
        raise UserError(f"model.drop_path_rate is {rate}: set --config.model.drop_path_rate to 0 or more and below 1")


def _check_crops(crops: ConfigDict) -> None:
    for key in (*PROBABILITIES, *PAIRS_OF_PROBABILITIES, *RANGES):
        values = (crops[key],) if key in PROBABILITIES else tuple(crops[key])
        if key not in PROBABILITIES and len(values) != 2:
            raise UserError(f"crops.{key} has {len(values)} values: set --config.crops.{key} to two, like '(0.1,1.0)'")
        if key in RANGES and not 0 < values[0] <= values[1]:
            raise UserError(
                f"crops.{key} is {values}: set --config.crops.{key} to a smaller and a larger number above 0"
            )
        if key in ("global_scale", "local_scale") and values[1] > 1:
            raise UserError(f"crops.{key} is {values}, in shares of an image: set --config.crops.{key} to at most 1")
        if key not in RANGES and not all(0 <= value <= 1 for value in values):
            raise UserError(f"crops.{key} is {crops[key]}: set --config.crops.{key} to probabilities from 0 to 1")


def _check_channels(config: ConfigDict) -> None:
    for key in ("mean", "std"):
        if len(config.data[key]) != config.model.in_channels:
            raise UserError(
                f"data.{key} has {len(config.data[key])} values for model.in_channels={config.model.in_channels}: "
                f"set --config.data.{key} to one value per channel"
            )
    if min(config.data.std) <= 0:
        raise UserError(f"data.std is {tuple(config.data.std)}: set --config.data.std to values above 0")


def _check_model(config: ConfigDict) -> None:
    model, crops, family = config.model, config.crops, family_of(config.model.arch)
    check_sizes(model.arch, model)
    for key, (what, without) in FAMILY_SETTINGS.items():
        if key not in family.settings and model[key] != without:
            raise UserError(f"{model.arch} has no {what}: set --config.model.{key}={without}")
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


def _get(config: ConfigDict, name: str) -> Any:
    for key in name.split("."):
        config = config[key]
    return config

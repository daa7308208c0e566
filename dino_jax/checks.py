"""What is wrong with a config, found before anything is read or compiled: one line with the knob and the way out."""

from dino_jax.errors import UserError
from dino_jax.models import RESNETS, VITS
from dino_jax.optimizers import OPTIMIZERS
from dino_jax.schedules import TEACHER_UPDATES


def check_config(config, devices: int) -> None:
    """Raises UserError for the first setting that cannot work on this many devices."""
    model, crops = config.model, config.crops
    _one_of("model.arch", model.arch, [*VITS, *RESNETS])
    _one_of("optim.name", config.optim.name, OPTIMIZERS)
    _one_of("dino.teacher_update", config.dino.teacher_update, TEACHER_UPDATES)
    _one_of("dtype", config.dtype, ("auto", "float32", "bfloat16"))
    for name in ("batch_size", "epochs", "accum_steps", "log_every"):
        _at_least_1(name, config[name])
    for name in ("model.patch_size", "model.in_channels", "head.out_dim", "head.layers", "checkpoint.every_steps"):
        section, key = name.split(".")
        _at_least_1(name, config[section][key])

    share = devices * config.accum_steps
    if config.batch_size % share:
        below = config.batch_size // share * share
        options = " or ".join(str(size) for size in (below, below + share) if size)
        parts = f"{devices} devices" + (f" x {config.accum_steps} accum_steps" if config.accum_steps > 1 else "")
        raise UserError(f"batch {config.batch_size} does not divide over {parts}: set --config.batch_size to {options}")

    if model.arch in VITS:
        for key in ("global_size", "local_size"):
            if key == "local_size" and not crops.local_number:
                continue
            _multiple_of_patch(f"crops.{key}", crops[key], model.patch_size)
        _multiple_of_patch("eval.crop", config.eval.crop, model.patch_size)
    elif model.drop_path_rate:
        raise UserError(f"{model.arch} has no drop path: set --config.model.drop_path_rate=0")

    for key in ("mean", "std"):
        if len(config.data[key]) != model.in_channels:
            raise UserError(
                f"data.{key} has {len(config.data[key])} values for model.in_channels={model.in_channels}: "
                f"set --config.data.{key} to one value a channel"
            )
    if config.optim.warmup_epochs >= config.epochs:
        raise UserError(
            f"optim.warmup_epochs {config.optim.warmup_epochs} leaves nothing of {config.epochs} epochs: "
            f"set --config.optim.warmup_epochs below {config.epochs}"
        )
    if not config.data.source:
        raise UserError("data.source is not set: give --config.data.source=folder:PATH (or tfds:NAME, demo)")


def _one_of(name: str, value: str, options) -> None:
    if value not in options:
        raise UserError(f"{name} {value!r} is unknown: set --config.{name} to one of {', '.join(options)}")


def _at_least_1(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}: set --config.{name} to 1 or more")


def _multiple_of_patch(name: str, size: int, patch: int) -> None:
    if size % patch or size < patch:
        below = max(size // patch, 1) * patch
        raise UserError(
            f"{name} {size} is not a multiple of the patch size {patch}: "
            f"set --config.{name} to {below} or {below + patch}"
        )

"""Rules from facts to settings, each with its reason.

The rules follow the papers where data and time are large (ViT-S/16 with the official code's values), and our runs on
the bundled images and lightly-train's defaults where they are small: see benchmarks/results.md, "Suggested settings".
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dino_jax import recipes
from dino_jax.models.registry import ARCHITECTURES
from dino_jax.suggest.facts import Images, Machine

PASSES_PER_IMAGE = 100  # how often a network should see each image before a larger one pays off,
PASSES = (300_000, 20_000_000)  # but at least and at most so many passes in all
MOST_EPOCHS = 1_000  # beyond it, the network learns the images by heart
TRAINING = 0.9  # share of the time that is left to training by evaluations and checkpoints
EVALUATIONS = 10  # during the run
SMALL = 20_000  # images up to which lightly-train sharpens more
MEMORY = 0.8  # share of a device's memory that a step may use


class Size(NamedTuple):
    """A network and the size of its input."""

    arch: str
    crop: int  # side of a global crop, pixels
    patch: int
    least_images: int  # smallest number of images that the network suits


class Measured(NamedTuple):
    """A few steps of a config on this machine."""

    images_per_second: float
    peak_bytes: int  # memory of one device; 0: unknown


class Choice(NamedTuple):
    """A setting, its value, and the reason."""

    setting: str
    value: Any
    reason: str


# From the largest to the smallest. Images that are smaller than a crop lower the size of the crop.
SIZES = (
    Size("vit_base", 224, 16, 500_000),
    Size("vit_small", 224, 16, 20_000),
    Size("vit_tiny", 224, 16, 0),
    Size("vit_tiny", 128, 16, 0),
    Size("vit_tiny", 64, 8, 0),
    Size("vit_nano", 64, 8, 0),
    Size("vit_nano", 32, 8, 0),
)
_NO_BLUR = "blur would erase what such small crops show"
_HEAD = "a head in proportion to the network"
HEADS = {"vit_nano": (256, 64), "vit_tiny": (1_024, 128)}  # width of the head's hidden layers, and of its bottleneck


def suggest(
    images: Images,
    machine: Machine,
    hours: float,
    test: str,
    flops_rate: float,
    flops_of: Callable[[ConfigDict], float],
    measure: Callable[[ConfigDict], Measured],
) -> list[Choice]:
    """Returns the settings that differ from configs/default.py, with their reasons.

    Args:
        images: facts on the images.
        machine: facts on the devices.
        hours: time for the training.
        test: labeled images for k-NN; "": none.
        flops_rate: FLOP/s that the devices may reach together, to guess which sizes are worth measuring.
        flops_of: FLOPs of a step per image.
        measure: runs a few steps of a config.
    """
    sizes = candidates(images)
    least = passes_wanted(images)
    while True:
        size = sizes.pop(0)
        chosen = [Choice("model.arch", size.arch, ""), *of_data(images, machine), *of_size(size, images, machine)]
        if sizes and passes(flops_rate / flops_of(config_of(chosen)), hours) < least:
            continue
        speed = measure(config_of(chosen))
        chosen += of_memory(speed, machine)
        if speed.peak_bytes > MEMORY * machine.memory:
            speed = measure(config_of(chosen))
        if not sizes or 2 * passes(speed.images_per_second, hours) >= least:
            chosen[0] = arch_choice(size, images, speed, hours)
            return chosen + of_schedule(config_of(chosen), images, speed, hours) + of_evaluation(images, size, test)


def config_of(choices: list[Choice]) -> ConfigDict:
    """Returns configs/default.py with the choices."""
    config = recipes.get_config("default")
    config.update_from_flattened_dict({choice.setting: choice.value for choice in choices})
    return config


def passes(images_per_second: float, hours: float) -> float:
    """Returns how many images a run reads, repetitions included, in the share of its time that it trains."""
    return TRAINING * images_per_second * hours * 3_600


def passes_wanted(images: Images) -> float:
    """Returns the passes below which a smaller network learns more."""
    least, most = PASSES
    return min(max(PASSES_PER_IMAGE * images.number, least), most)


def candidates(images: Images) -> list[Size]:
    """Returns the sizes that suit the images, from the largest to the smallest, without repetitions."""
    fitting: list[Size] = []
    # 0.9 of the shorter side in steps of 16, because crops of the whole image are rare.
    largest = max(32, 16 * round(0.9 * images.short_side / 16))
    for size in SIZES:
        crop = min(size.crop, largest)
        patch = 16 if crop >= 112 else 8
        if images.number >= size.least_images:
            fitting.append(size._replace(crop=crop, patch=min(size.patch, patch), least_images=0))
    return list(dict.fromkeys(fitting))


def arch_choice(size: Size, images: Images, speed: Measured, hours: float) -> Choice:
    """Returns the network with the figures that led to it."""
    seen = passes(speed.images_per_second, hours)
    reason = (
        f"{speed.images_per_second:,.0f} images/s here, {seen:,.0f} passes in {hours:g} h: each image "
        f"{seen / images.number:,.0f} times; a larger network gains from {passes_wanted(images):,.0f} passes on"
    )
    return Choice("model.arch", size.arch, reason)


def of_data(images: Images, machine: Machine) -> Iterator[Choice]:
    """How the images are read."""
    yield Choice("data.source", images.source, f"{images.number:,} images, {_labels(images)}")
    color = {1: "gray", 3: "color"}.get(images.channels, f"{images.channels} channels")
    yield Choice("model.in_channels", images.channels, f"the images are {color}")
    scale = 1.0
    if images.white and images.brightest <= images.white / 2:
        white = float(2 ** math.ceil(math.log2(images.brightest + 1)) - 1)
        reason = f"the brightest pixel is {images.brightest:g}, far below {images.white:g}"
        yield Choice("data.range", (0.0, white), reason)
        scale = images.white / white
    for setting, values in (("data.mean", images.mean), ("data.std", images.std)):
        scaled = tuple(float(f"{scale * value:.3g}") for value in values)
        yield Choice(setting, scaled, f"measured on {images.sampled:,} images")
    canvas = min(512, max(32, images.long_side))
    yield Choice("data.canvas_size", canvas, f"9 of 10 images have no side of more than {images.long_side} pixels")
    if images.channels != 3:
        yield Choice("crops.global_solarize", (0.0, 0.0), "inverted intensities are not natural outside photographs")
        yield Choice("crops.grayscale", 0.0, "only color images can lose their color")
    if machine.platform == "cpu" and canvas < 64:
        yield Choice("data.workers", 0, "such small images are decoded faster than processes exchange them")


def of_size(size: Size, images: Images, machine: Machine) -> Iterator[Choice]:
    """The network, its crops and its batch."""
    yield Choice("model.patch_size", size.patch, f"{(size.crop // size.patch) ** 2} patches in a global crop")
    yield Choice("crops.global_size", size.crop, f"the median image has a shorter side of {images.short_side} pixels")
    local = max(2 * size.patch, size.patch * round(size.crop * 96 / 224 / size.patch))
    yield Choice("crops.local_size", local, "as 96 to 224 pixels in the paper, at least 2 x 2 patches")
    if size.crop < 64:
        yield Choice("crops.global_blur", (0.0, 0.0), _NO_BLUR)
        yield Choice("crops.local_blur", 0.0, _NO_BLUR)
    if size.arch in HEADS:
        hidden, bottleneck = HEADS[size.arch]
        yield Choice("head.hidden_dim", hidden, _HEAD)
        yield Choice("head.bottleneck_dim", bottleneck, _HEAD)
        yield Choice("model.drop_path_rate", 0.0, "so small a network does not overfit")
    prototypes = 2 ** int(math.log2(min(max(images.number / 8, 64), 65_536)))
    if images.number <= SMALL:
        for setting in ("dino.teacher_temp", "dino.warmup_teacher_temp"):
            yield Choice(setting, 0.02, f"sharper targets suit {SMALL:,} images or fewer")
    yield Choice("head.out_dim", prototypes, "8 images or more a prototype; the paper's 65,536 at most, 64 at least")
    if machine.platform == "cpu":
        yield Choice("crops.local_number", 4, "half of the paper's 8: on a CPU, more images pay more than more crops")
    batch = _batch(images, machine)
    yield Choice("batch_size", batch, "small: on few images, more steps pay more than larger batches")
    lr, rule = _learning_rate(size, batch)
    yield Choice("optim.lr", lr, rule)


def of_memory(speed: Measured, machine: Machine) -> list[Choice]:
    """Accumulation, where a step takes more than a device has."""
    if speed.peak_bytes <= MEMORY * machine.memory:
        return []
    parts = 2 ** math.ceil(math.log2(speed.peak_bytes / (MEMORY * machine.memory)))
    reason = f"a step in one part takes {speed.peak_bytes / 2**30:.1f} GiB, a device has {machine.memory / 2**30:.1f}"
    return [Choice("accum_steps", parts, reason)]


def of_schedule(config: ConfigDict, images: Images, speed: Measured, hours: float) -> list[Choice]:
    """The length of the run, and what depends on it."""
    batch, per_epoch = config.batch_size, max(1, images.number // config.batch_size)
    fitting = passes(speed.images_per_second, hours) / (batch * per_epoch)
    epochs = float(f"{max(min(fitting, MOST_EPOCHS), 1 / per_epoch):.3g}")
    steps = epochs * per_epoch
    reason = f"fit {hours:g} h at {speed.images_per_second:,.0f} images/s: {steps:,.0f} steps"
    if fitting > MOST_EPOCHS:
        reason = f"beyond {MOST_EPOCHS:,}, a network learns {images.number:,} images by heart: {steps:,.0f} steps"
    warmup = float(f"{min(10, 0.05 * epochs):.3g}")
    momentum = _momentum(steps)
    choices = [
        Choice("epochs", epochs, reason),
        Choice("optim.warmup_epochs", warmup, "5% of the run, at most the paper's 10 epochs"),
        Choice("optim.freeze_last_layer_epochs", min(1.0, warmup), "at most the warmup"),
        Choice("dino.teacher_momentum", momentum, f"the teacher averages {1 / (1 - momentum):,.0f} steps"),
        Choice("evals.probe.every_epochs", max(1, round(epochs / EVALUATIONS)), f"{EVALUATIONS} evaluations"),
        Choice("evals.knn.every_epochs", max(1, round(epochs / EVALUATIONS)), f"{EVALUATIONS} evaluations"),
        Choice("evals.pictures.every_epochs", max(1, round(epochs / 2)), "at the start, in the middle and at the end"),
        Choice("checkpoint.every_steps", _every(600, speed, batch), "about 10 minutes"),
        Choice("log_every", max(1, min(50, int(steps // 50))), "50 rows or more"),
    ]
    if steps < 50_000:
        choices.append(Choice("optim.weight_decay_end", 0.04, "constant: a rising weight decay harms short runs"))
    return choices


def of_evaluation(images: Images, size: Size, test: str) -> list[Choice]:
    """What is measured during training."""
    resize = max(size.crop, round(size.crop * 256 / 224)) if size.crop >= 64 else size.crop
    choices = [
        Choice("eval.crop", size.crop, "the size of a global crop"),
        Choice("eval.resize", resize, "as 256 to 224 pixels in the paper; small images as a whole"),
    ]
    if test:
        choices.append(Choice("evals.knn.test", test, "labeled images that training does not see"))
    return choices


def _labels(images: Images) -> str:
    parts = [f"{images.classes:,} classes" if images.classes else "no labels"]
    if images.copies:
        parts.append(f"{images.copies:,} copies among {images.sampled:,}: see `dino-jax check`")
    if images.undecodable:
        parts.append(f"{images.undecodable:,} of {images.sampled:,} cannot be decoded: see `dino-jax check`")
    return ", ".join(parts)


def _batch(images: Images, machine: Machine) -> int:
    """Returns a power of two that the devices divide, where their number is one, and never more than the images."""
    wanted = 32 if machine.platform == "cpu" else min(1_024, 64 * machine.devices)
    most = min(wanted, max(32, images.number // 16), images.number)
    return max(1, most // machine.devices) * machine.devices


def _learning_rate(size: Size, batch: int) -> tuple[float, str]:
    """Returns optim.lr, which is the rate at a batch of 256, and its rule."""
    width = ARCHITECTURES[size.arch].sizes["embed_dim"]
    wide = max(1.0, 384 / width)  # narrow networks take larger steps
    small = max(1.0, math.sqrt(256 / batch))  # Adam: with the root of the batch below 256, linearly above
    lr = float(f"{5e-4 * wide * small:.2g}")
    return lr, f"{lr * batch / 256:.1e} at batch {batch}: the paper's rate, more for a narrow network or a small batch"


def _momentum(steps: float) -> float:
    """Returns a momentum that averages about 1/200 of the run: from 100 steps to 250, the paper's 0.996.

    Fewer let the targets collapse (33 steps did, with the bundled images), and more leave short runs behind.
    """
    return float(f"{1 - 1 / min(250, max(100, steps / 200)):.4g}")


def _every(seconds: float, speed: Measured, batch: int) -> int:
    steps = seconds * speed.images_per_second / batch
    return max(10, int(float(f"{steps:.1g}")))

"""What the settings of a run depend on: the images and the machine."""

import os
from typing import Any, NamedTuple

import jax
import numpy as np

from dino_jax.data.array_files import read_array
from dino_jax.data.decoding import MAX_MEMORY, DecodeError, to_canvas
from dino_jax.data.examination import check
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Source, read_example, spread
from dino_jax.data.summary import mean_and_std, tally
from dino_jax.errors import UserError

LOOKED_AT = 5_000  # most images that are read
COLORS_OF = 500  # images whose channels are compared
CANVAS = 256  # side to which larger images are squeezed


class Images(NamedTuple):
    """Facts on the images of a source. `sampled` of them, evenly spread, were read."""

    source: str  # its specification
    number: int
    classes: int  # 0: no labels
    sampled: int
    undecodable: int  # of the sampled ones
    copies: int  # sampled images with the content of another one
    short_side: int  # median of the shorter side, pixels
    long_side: int  # 0.9 quantile of the longer side, pixels
    channels: int
    mean: tuple[float, ...]  # of pixels in [0, 1], by channel
    std: tuple[float, ...]
    brightest: float  # value of the brightest pixel of images of more than 8 bits; 0: all have 8 bits
    white: float  # the value of white that their type implies; 0: all have 8 bits


class Machine(NamedTuple):
    """Facts on the devices of this process."""

    platform: str  # cpu, gpu, tpu
    kind: str
    devices: int
    memory: int  # bytes that one device may use
    cores: int


def of_images(spec: str, source: Source, workers: int) -> Images:
    """Reads up to `LOOKED_AT` images. Raises UserError if there are none that can be decoded."""
    if not len(source):
        raise UserError(f"{spec} holds no images")
    sample = spread(source, LOOKED_AT)
    channels = _channels(spread(sample, COLORS_OF))
    findings = check(sample, canvas_size=CANVAS, pixels=Pixels(channels), workers=workers)
    good = [finding for finding in findings if not finding.problem]
    if not good:
        raise UserError(f"{spec}: none of {len(sample):,} images can be decoded; the first: {findings[0].problem}")
    mean, std = mean_and_std(tally(sample, good))
    deep = [finding.values for finding in good if finding.values]
    return Images(
        source=spec,
        number=len(source),
        classes=source.num_classes or 0,
        sampled=len(sample),
        undecodable=len(findings) - len(good),
        copies=len(good) - len({finding.digest for finding in good}),
        short_side=int(np.median([min(finding.size) for finding in good])),
        long_side=int(np.quantile([max(finding.size) for finding in good], 0.9)),
        channels=channels,
        mean=mean,
        std=std,
        brightest=max((values.most for values in deep), default=0.0),
        white=max((values.white for values in deep), default=0.0),
    )


def of_machine() -> Machine:
    """Returns the facts on this process's devices."""
    device = jax.local_devices()[0]
    cores = os.cpu_count() or 1
    stats: dict[str, Any] = device.memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = host // jax.local_device_count()  # CPU devices share the memory of the host
    return Machine(device.platform, device.device_kind, jax.device_count(), int(stats.get("bytes_limit", share)), cores)


def _channels(source: Source) -> int:
    """Returns the largest number of channels among the readable images. Images whose channels are equal have one."""
    return max({_bands(source, record) for record in range(len(source))} - {0}, default=3)


def _bands(source: Source, record: int) -> int:
    try:
        image = read_example(source, record).image
        if isinstance(image, np.ndarray):
            return image.shape[2] if image.ndim == 3 else 1
        color, _ = to_canvas(image, CANVAS, Pixels(3))
    except (DecodeError, OSError):
        return _bands_of_array(source, record)
    return 1 if np.all(color == color[..., :1]) else 3


def _bands_of_array(source: Source, record: int) -> int:
    """Returns the channels of a file that is no picture, 0 if it cannot be read."""
    try:
        image = read_example(source, record).image
        found = read_array(image, Pixels(channels=0), MAX_MEMORY) if isinstance(image, bytes) else None
    except UserError:
        raise
    except Exception:  # damaged files can make readers raise anything
        return 0
    return found[0].shape[2] if found else 0

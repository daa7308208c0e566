"""Reads and writes video files frame by frame, with PyAV (`pip install 'dino_jax[video]'`)."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_jax import atomic
from dino_jax.errors import UserError


class Video(NamedTuple):
    """A video that `read_video` opened."""

    frames: Iterator[np.ndarray]  # uint8 [H, W, 3], upright, decoded lazily
    rate: Fraction  # frames per second
    length: int  # number of frames according to the file, 0 if unknown


def read_video(path: Path) -> Video:
    """Opens the first video stream of a file. Frames of another size than the first are scaled to it.

    If the file is damaged at some point, the frames before it are read, and a line is printed to stderr.

    Raises:
        UserError: PyAV is missing, or the file is missing, not a video or empty.
    """
    av = _pyav()
    if not path.is_file():
        raise UserError(f"--config.video: no such file: {path}")
    try:
        container = av.open(str(path))
        if not container.streams.video:
            raise UserError(f"--config.video: {path} has no pictures in it: give a video")
        stream = container.streams.video[0]
        frames = _decode(av, container, path)
        first = next(frames, None)
    except av.error.FFmpegError as error:
        raise UserError(f"--config.video: {path} can't be read as a video ({error.strerror})") from error
    if first is None:
        raise UserError(f"--config.video: {path} has no frames: give a video that plays")
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    return Video(itertools.chain([first], frames), rate, stream.frames)


def _decode(av: Any, container: Any, path: Path) -> Iterator[np.ndarray]:
    size: dict[str, int] = {}
    done = 0
    with container:
        try:
            for frame in container.decode(video=0):
                size = size or {"width": frame.width, "height": frame.height}
                pixels = frame.reformat(**size, format="rgb24").to_ndarray()
                # Phones store frames as the sensor sees them, with the counterclockwise rotation to apply.
                yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
                done += 1
        except av.error.FFmpegError as error:
            if not done:
                raise
            print(f"{path}: damaged after {done} frames ({error.strerror}): the rest is skipped", file=sys.stderr)


@contextlib.contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends a frame, uint8 [H, W, 3], all of one size. H.264, or MPEG-4 if PyAV lacks it.

    The file appears when the block ends.

    Raises:
        UserError: PyAV is missing, or the disk refuses.
    """
    av = _pyav()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with atomic.file(path) as unfinished, av.open(str(unfinished), "w", format=path.suffix[1:]) as container:
        stream: Any = container.add_stream(codec, rate=rate.limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}

        def write(pixels: np.ndarray) -> None:
            height, width = pixels.shape[:2]
            # Sides must be even, because colors are stored for squares of 2 x 2 pixels.
            even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")))

        yield write
        container.mux(stream.encode())


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("videos need PyAV: pip install 'dino_jax[video]'") from error
    return av

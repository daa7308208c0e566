"""Video object segmentation by propagating the first frame's masks: DAVIS 2017, or any video.

    dino-jax evaluate video_segmentation --checkpoint=runs/a --config.data=DAVIS
    dino-jax evaluate video_segmentation --checkpoint=runs/a --config.video=clip.mp4 --config.mask=first.png

Differences from the reference: pixels are normalized as in training (the reference has .228 instead of .225 as the
third standard deviation), and frames are resized with antialiasing.
"""

import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dino_jax import atomic
from dino_jax.data.decoding import decode
from dino_jax.errors import UserError
from dino_jax.evals.common.davis_metrics import score_objects, statistics
from dino_jax.evals.common.images import map_images, patch_grid, patch_size, read_image, resize
from dino_jax.evals.common.label_maps import read_labels, read_objects, tint_objects, write_labels
from dino_jax.evals.common.label_propagation import hard_labels, propagate
from dino_jax.evals.common.video import read_video, write_video
from dino_jax.limits import COUNT, COUNT_OR_NONE, PIXELS, TEMPERATURE
from dino_jax.progress import progress
from dino_jax.weights.backbone import Backbone

VOID = 255  # DAVIS counts it as background
Scores = dict[str, tuple[np.ndarray, np.ndarray]]  # J and F of each video, [objects, T]
SETTINGS = ("size", "multiple", "context", "radius", "topk", "temperature")  # that masks depend on


LIMITS = {
    "size": PIXELS,
    "multiple": PIXELS,
    "context": COUNT_OR_NONE,
    "radius": COUNT_OR_NONE,
    "topk": COUNT,
    "temperature": TEMPERATURE,
}


def default_config() -> ml_collections.ConfigDict:
    """Every knob of `dino-jax evaluate video_segmentation`."""
    return ml_collections.ConfigDict(
        {
            "data": "",  # folder of DAVIS 2017 (trainval, 480p) with JPEGImages, Annotations and ImageSets
            "split": "val",  # a list in ImageSets/2017
            "video": "",  # or a video file (pip install 'dino_jax[video]')
            "mask": "",  # image of the objects in the first frame of that video: one color each, black elsewhere
            "size": 480,  # pixels of the shorter side of a frame for the backbone
            "multiple": 64,  # the longer side is rounded down to a multiple of this
            "context": 7,  # number of latest frames to take labels from, besides the first
            "radius": 12,  # of the neighborhood to take labels from, in patches
            "topk": 5,  # number of nearest patches to take labels from
            "temperature": 0.1,  # of their weights
        }
    )


class AnnotatedVideo(NamedTuple):
    """A video of DAVIS: its name and its files in the order of the frames."""

    name: str
    frames: list[Path]
    annotations: list[Path]  # of all frames, or of only the first one in the test sets


def run(backbone: Backbone, config: ml_collections.ConfigDict, out: Path) -> dict[str, Any]:
    """Writes the masks of each video to `out`/masks/VIDEO as palette PNGs; scores those of DAVIS and prints a table.

    An interrupted run continues with the unfinished videos. With config.video, also writes VIDEO_masks.mp4.

    Returns:
        The content of results.json: {"figures", "videos", "objects", "settings", "images", "seconds",
        "images_per_second"}, where images and rate count the frames of this run. Figures are in percent, averaged over
        objects as in the benchmark: J&F_mean, J_mean, J_recall, J_decay, F_mean, F_recall, F_decay; none without
        annotations.

    Raises:
        UserError: neither or both of data and video are set; a folder or file is missing, unreadable or of another size
            than its frame; `out` has masks of other settings; a setting is out of range; the backbone is a convnet.
    """
    start = time.monotonic()
    _check_settings(config, patch_size(backbone))
    if bool(config.data) == bool(config.video):
        raise UserError("set either --config.data to DAVIS 2017's folder, or --config.video and --config.mask")
    if config.video:
        frames, scores = _segment_own(backbone, config, out), Scores()
    else:
        frames, scores = _segment_davis(backbone, config, out)
    seconds = time.monotonic() - start
    figures = benchmark_figures(scores)
    print(_table(scores, figures) if scores else f"{frames:,} frames: masks are in {out / 'masks'}")
    return {
        "figures": figures,
        "videos": {name: {"J": 100 * J.mean(), "F": 100 * F.mean()} for name, (J, F) in scores.items()},
        "objects": {
            f"{name}_{i}": {"J": 100 * j.mean(), "F": 100 * f.mean()}
            for name, (J, F) in scores.items()
            for i, (j, f) in enumerate(zip(J, F, strict=True), start=1)
        },
        "settings": config.to_dict(),
        "images": frames,
        "seconds": round(seconds, 1),
        "images_per_second": round(frames / seconds, 2),
    }


def segment(
    backbone: Backbone, frames: Iterable[np.ndarray], first: np.ndarray, config: ml_collections.ConfigDict
) -> Iterator[np.ndarray]:
    """Yields the labels of each frame, uint8 [H, W], one frame after the other; those of the first frame are given.

    Args:
        backbone: a vision transformer.
        frames: uint8 [H, W, C]. Only one frame per device is held in memory, and the features of the context.
        first: labels of the first frame, uint8 [H, W], 0 for the background.
        config: see `default_config`.

    Raises:
        UserError: a frame has another size than `first`.
    """
    patch, (height, width) = patch_size(backbone), first.shape
    rows, columns = network_size(height, width, config.size, config.multiple)
    small = resize(first[..., None], rows // patch, columns // patch, Image.Resampling.NEAREST)[..., 0]
    images = (resize(frame, rows, columns, Image.Resampling.BILINEAR) for frame in _same_size(frames, first))
    features = (one for _, one in map_images(images, patch_grid, backbone))
    opening = next(features)  # raises for a mask of another size before anything is written
    yield first
    soft = propagate(
        itertools.chain([opening], features),
        jax.nn.one_hot(small, int(first.max()) + 1),
        context=config.context,
        radius=config.radius,
        topk=config.topk,
        temperature=config.temperature,
    )
    for labels in soft:
        fine = np.asarray(hard_labels(labels, patch))
        yield resize(fine[..., None], height, width, Image.Resampling.NEAREST)[..., 0]


def network_size(height: int, width: int, size: int, multiple: int) -> tuple[int, int]:
    """Returns height and width of the backbone's input: the shorter side is `size`, the longer is rounded down."""
    if height > width:
        return size * height // width // multiple * multiple, size
    return size, size * width // height // multiple * multiple


def benchmark_figures(scores: Scores) -> dict[str, float]:
    """Returns the figures of DAVIS 2017 in percent, averaged over all objects of all videos."""
    if not scores:
        return {}
    figures: dict[str, float] = {}
    for name, part in (("J", 0), ("F", 1)):
        objects = [statistics(one) for video in scores.values() for one in video[part]]
        figures |= {f"{name}_{key}": 100 * float(np.mean([one[key] for one in objects])) for key in objects[0]}
    return {"J&F_mean": (figures["J_mean"] + figures["F_mean"]) / 2, **figures}


def list_videos(root: Path, split: str) -> list[AnnotatedVideo]:
    """Returns the videos in the order of the list. Raises UserError if a folder, frames or an annotation is missing."""
    images, annotations = root / "JPEGImages" / "480p", root / "Annotations" / "480p"
    listing = root / "ImageSets" / "2017" / f"{split}.txt"
    for needed in (images, annotations, listing):
        if not needed.exists():
            raise UserError(
                f"--config.data={root} is not DAVIS 2017's folder: {needed.relative_to(root)} is missing there"
            )
    videos = []
    for name in listing.read_text().split():
        frames, masks = sorted((images / name).glob("*.jpg")), sorted((annotations / name).glob("*.png"))
        if not frames:
            raise UserError(f"--config.data: {name} is in {listing.name}, but no frames (*.jpg) are in {images / name}")
        wanted = [annotations / name / f"{frame.stem}.png" for frame in frames]
        if masks not in (wanted, wanted[:1]):
            missing = next((path for path in wanted if path not in masks), annotations / name)
            raise UserError(
                f"--config.data: {name} has {len(frames)} frames and {len(masks)} annotations: see {missing}"
            )
        videos.append(AnnotatedVideo(name, frames, masks))
    if not videos:
        raise UserError(f"--config.split={split}: {listing} is empty")
    return videos


def _segment_davis(backbone: Backbone, config: ConfigDict, out: Path) -> tuple[int, Scores]:
    """Returns the number of frames computed, and J and F of each video, [objects, frames except the first and last]."""
    videos, masks, pixels = (
        list_videos(Path(config.data), config.split),
        out / "masks",
        backbone.pixels,
    )
    _claim(masks, {**{key: config[key] for key in SETTINGS}, "model": backbone.card})
    done, scores = 0, Scores()
    for place, video in enumerate(videos, start=1):
        first = _davis_labels(video.annotations[0])
        if not first.any():
            raise UserError(f"--config.data: no object in {video.annotations[0]}")
        folder, partial = masks / video.name, masks / f"{video.name}.partial"
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            pictures = (read_image(path, pixels, "--config.data") for path in video.frames)
            counted = progress(segment(backbone, pictures, first, config), len(video.frames), video.name, "frames")
            for path, labels in zip(video.frames, counted, strict=True):
                write_labels(partial / f"{path.stem}.png", labels)
            partial.rename(folder)
            done += len(video.frames)
        if len(video.annotations) > 2:
            inner = video.annotations[1:-1]  # the first is given, and the benchmark ignores the last
            ours, theirs = (map(_davis_labels, paths) for paths in ([folder / path.name for path in inner], inner))
            scores[video.name] = score_objects(ours, theirs, int(first.max()))
        print(f"{place} of {len(videos)} videos: {video.name}", file=sys.stderr)
    return done, scores


def _segment_own(backbone: Backbone, config: ConfigDict, out: Path) -> int:
    """Writes the masks, and a video of them over the frames; returns the number of frames."""
    if not config.mask:
        raise UserError("--config.mask is empty: set it to a picture of the objects in the video's first frame")
    video, pixels = read_video(path := Path(config.video)), backbone.pixels
    first, folder, done = read_objects(Path(config.mask), "--config.mask"), out / "masks" / path.stem, 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shown, frames = itertools.tee(progress(video.frames, video.length, path.name, "frames"))
    labels = segment(backbone, (decode(frame, pixels) for frame in frames), first, config)
    with write_video(out / f"{path.stem}_masks.mp4", video.rate) as write:
        for frame, one in zip(shown, labels, strict=True):
            write_labels(folder / f"{done:05d}.png", one)
            write(tint_objects(frame, one))
            done += 1
    return done


def _same_size(frames: Iterable[np.ndarray], first: np.ndarray) -> Iterator[np.ndarray]:
    for place, frame in enumerate(frames):
        if frame.shape[:2] != first.shape:
            sizes = (f"{width} x {height}" for height, width in (frame.shape[:2], first.shape))
            raise UserError("frame {} has {} pixels, the first mask {}: give a mask of that size".format(place, *sizes))
        yield frame


def _davis_labels(path: Path) -> np.ndarray:
    labels = read_labels(path, "--config.data")
    return np.where(labels == VOID, 0, labels)


def _claim(masks: Path, settings: dict[str, Any]) -> None:
    """Records settings and model beside the masks. Raises UserError if there are masks of others."""
    note, text = masks / "settings.json", atomic.to_json(settings)
    if note.exists() and note.read_text(errors="replace") != text:
        raise UserError(
            f"{masks} holds masks of another model or other settings: set --out to another folder, or delete it"
        )
    atomic.write_json(note, settings)


def _check_settings(config: ml_collections.ConfigDict, patch: int) -> None:
    for knob in ("size", "multiple"):
        if config[knob] < 1 or config[knob] % patch:
            raise UserError(
                f"{knob} {config[knob]} is not a multiple of the patch size, {patch} pixels: set --config.{knob} to one"
            )
    if config.multiple > config.size:
        raise UserError(f"multiple {config.multiple} is above size {config.size}: set --config.multiple lower")
    for knob in ("context", "radius", "topk"):
        if config[knob] < 1:
            raise UserError(f"{knob} {config[knob]}: set --config.{knob} to 1 or more")
    if config.temperature <= 0:
        raise UserError(f"temperature {config.temperature}: set --config.temperature above 0")


def _table(scores: Scores, figures: dict[str, float]) -> str:
    lines = [f"{'percent':<22}{'objects':>8}{'J':>8}{'F':>8}{'J&F':>8}"]
    for name, (J, F) in scores.items():
        j, f = 100 * J.mean(), 100 * F.mean()
        lines.append(f"{name:<22}{len(J):>8}{j:>8.1f}{f:>8.1f}{(j + f) / 2:>8.1f}")
    lines.append("over all objects: " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    return "\n".join(lines)

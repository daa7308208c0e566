"""Writes a data set to ArrayRecord files, in parallel: a few large files instead of a million small ones.

    dino-jax prepare folder:photos prepared --canvas_size=512

SOURCE has the form of --config.data.source. OUT is a folder, also in a bucket; train from it with
--config.data.source=array_record:OUT/*.array_record, which has the same images in the same order, so training sees the
same batches. Images are stored unchanged, or resized with --canvas_size. The same command resumes after an
interruption. OUT/manifest.json records the source and the files.

--beam runs it on the workers of Apache Beam instead of on this machine, and writes the same files (docs/data.md).
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from PIL import Image

from dino_jax import atomic
from dino_jax.commands import cli
from dino_jax.data import beam
from dino_jax.data.decoding import DecodeError, decode
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Example, Source, files, names_digest, open_source, read_example
from dino_jax.data.sources.array_record import write_examples
from dino_jax.data.workers import iterate
from dino_jax.errors import UserError
from dino_jax.lease import exclusive
from dino_jax.progress import progress
from dino_jax.storage import is_remote

USAGE = "SOURCE OUT [--canvas_size=512]"
MANIFEST = "manifest.json"
EXTENSION = ".array_record"
RECORDS = ".written"  # folder in OUT, with a JSON file per shard that a worker of Beam has finished
JPEG = {"quality": 95, "subsampling": 0}  # keeps the full chroma resolution, which is visible at the canvas's size


class Shard(NamedTuple):
    """A file of the data set, with the images first .. last - 1 of the source."""

    name: str
    first: int
    last: int


class Stored(NamedTuple):
    """How images are stored."""

    canvas_size: int  # shorter side, pixels; 0: unchanged, without decoding
    pixels: Pixels  # channels (1 or 3) and range of resized images


class Written(NamedTuple):
    """A finished shard."""

    name: str
    images: int
    bytes: int
    left_out: dict[str, str]  # name of the image -> why it cannot be read or decoded


def smaller(image: bytes | np.ndarray, canvas_size: int, pixels: Pixels) -> bytes | np.ndarray:
    """Returns the image upright, with a shorter side of `canvas_size` pixels, as a JPEG.

    An image that is not larger than that is returned unchanged. The aspect ratio is kept, because crop boxes are
    sampled in it. Raises like `decoding.decode`.
    """
    decoded = decode(image, pixels)
    height, width = decoded.shape[:2]
    scale = canvas_size / min(height, width)
    if scale >= 1:
        return image
    if pixels.channels not in (1, 3):
        raise UserError(
            f"--canvas_size={canvas_size} makes JPEGs of 1 or 3 channels: omit it for {pixels.channels} channels"
        )
    picture = Image.fromarray(decoded[..., 0] if pixels.channels == 1 else decoded)
    buffer = io.BytesIO()
    size = round(width * scale), round(height * scale)
    picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "JPEG", **JPEG)
    return buffer.getvalue()


def prepare(
    spec: str,
    out: str | Path,
    *,
    canvas_size: int,
    pixels: Pixels,
    shard_images: int,
    workers: int,
    beam_options: str = "",
) -> dict[str, Written]:
    """Writes the missing files of the data set, and returns all files by name.

    Args:
        spec: the source (see `open_source`).
        out: the folder to write to.
        canvas_size: shorter side of the stored images, pixels; 0 stores them unchanged, without decoding.
        pixels: channels (1 or 3) and range of resized images.
        shard_images: images per file; the last file may have fewer.
        workers: number of processes; 0 uses only this one.
        beam_options: pipeline options of Apache Beam, whose workers then write the files. They need `spec` and `out`
            under the same paths as this process.

    Raises:
        UserError: `out` holds another data set, or cannot be written.
    """
    source, stored = open_source(spec), Stored(canvas_size, pixels)
    out = str(out).rstrip("/") if is_remote(out) else os.path.abspath(out)
    plan: dict[str, Any] = {
        "source": spec,
        "names": names_digest(source),
        "images": len(source),
        "classes": source.num_classes,
        "canvas_size": canvas_size,
        "channels": pixels.channels,
        "range": list(pixels.range),
        "shard_images": shard_images,
    }
    done = _finished(out, plan)
    shards = _shards(len(source), shard_images)
    missing = [number for number, shard in enumerate(shards) if shard.name not in done]
    if missing and beam_options:
        record = partial(_write_and_record, spec=spec, names=plan["names"], out=out, stored=stored, size=shard_images)
        beam.for_each(record, missing, beam_options)
        done = _finished(out, plan)
        beam.require_results(len(done), len(shards), out)
        return done
    write = partial(_write, source=source, out=out, stored=stored)
    to_write = grain.MapDataset.source([shards[number] for number in missing]).map(write)
    with iterate(to_write, workers, stall_timeout=0) as written:  # no limit on the time to write a file
        sizes = {shard.name: shard.last - shard.first for shard in shards}
        total = sum(sizes[shards[number].name] for number in missing)
        for result in progress(written, total, "prepare", size=lambda result: sizes[result.name]):
            done[result.name] = result
            _write_manifest(out, plan, done)
    return done


def describe(out: str, done: dict[str, Written]) -> str:
    """Describes the written data set, and how to train from it."""
    images, size = sum(shard.images for shard in done.values()), sum(shard.bytes for shard in done.values())
    left_out = {name: reason for shard in done.values() for name, reason in shard.left_out.items()}
    lines = [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    lines += [f"{images:,} images in {len(done):,} files, {size / 1e9:,.2f} GB; {len(left_out):,} left out"]
    return "\n".join([*lines, f"train from them with --config.data.source='array_record:{out}/*{EXTENSION}'"])


def main(arguments: Sequence[str]) -> None:
    """Writes SOURCE to OUT."""
    if len(arguments) != 2:
        raise UserError(f"usage: dino-jax prepare {USAGE}, where SOURCE has the form of --config.data.source")
    values, [spec, out] = flags.FLAGS, arguments
    with exclusive(out, "OUT"):
        done = prepare(
            spec,
            out,
            canvas_size=values.canvas_size,
            pixels=Pixels(values.channels, range=cli.range_of(values.range)),
            shard_images=values.shard_images,
            workers=values.workers,
            beam_options=values.beam,
        )
    print(describe(out, done))


def define_flags(arguments: Sequence[str]) -> None:
    """Defines the flags for the stored images and the number of processes."""
    flags.DEFINE_integer("canvas_size", 0, "shorter side of the stored images, pixels; 0: unchanged", lower_bound=0)
    flags.DEFINE_list(
        "range",
        [],
        "values of black and white in resized images of more than 8 bits: LOW,HIGH; by default as their type implies",
    )
    flags.DEFINE_integer("channels", 3, "channels of resized images: 1 or 3", lower_bound=1)
    flags.DEFINE_integer("shard_images", 1024, "images per file", lower_bound=1)
    flags.DEFINE_integer("workers", os.cpu_count(), "processes that read, encode and write", lower_bound=0)
    flags.DEFINE_string("beam", "", beam.HELP)


def _shards(images: int, shard_images: int) -> list[Shard]:
    count = -(-images // shard_images)
    firsts = range(0, images, shard_images)
    return [
        Shard(f"shard-{k:05d}-of-{count:05d}{EXTENSION}", first, min(first + shard_images, images))
        for k, first in enumerate(firsts)
    ]


def _write(shard: Shard, *, source: Source, out: str, stored: Stored) -> Written:
    left_out: dict[str, str] = {}

    def examples() -> Iterator[Example]:
        for record in range(shard.first, shard.last):
            try:
                image, label = read_example(source, record)
                image = smaller(image, *stored) if stored.canvas_size else image
            except (DecodeError, OSError) as error:
                left_out[source.name(record)] = getattr(error, "strerror", None) or str(error)
            else:
                yield Example(image, label)

    with files.written(f"{out}/{shard.name}") as path:
        images = write_examples(examples(), source.num_classes, str(path))
        size = path.stat().st_size
    return Written(shard.name, images, size, left_out)


def _write_and_record(number: int, *, spec: str, names: str, out: str, stored: Stored, size: int) -> None:
    """Writes a shard on a worker of Beam, unless it is there, and a record of it that `_finished` reads."""
    source = beam.reopened(spec, names)
    shard = _shards(len(source), size)[number]
    record = f"{out}/{RECORDS}/{shard.name}.json"
    if files.read(record) is None:
        written = _write(shard, source=source, out=out, stored=stored)
        files.write(record, atomic.to_json(written._asdict()).encode())


def _finished(out: str, plan: dict[str, Any]) -> dict[str, Written]:
    """Returns the files that an earlier run finished, on this machine or on the workers of Beam.

    Raises UserError if it had other settings.
    """
    found, recorded = files.sizes(out), [name for name in files.sizes(f"{out}/{RECORDS}") if name.endswith(".json")]
    for name in found:
        if name.startswith(".") and name.endswith(".unfinished"):  # of a local run that was killed
            Path(out, name).unlink(missing_ok=True)
    path = f"{out}/{MANIFEST}"
    try:
        content = files.read(path)
        manifest = json.loads(content or b'{"shards": []}')
        written = [Written(**shard) for shard in manifest.pop("shards")]
        records = [files.read(f"{out}/{RECORDS}/{name}") for name in recorded]
        written += [Written(**json.loads(record)) for record in records if record]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"can't read {path} ({error}): remove {out} or give another OUT") from error
    if content is None:
        if any(name.endswith(EXTENSION) for name in found):
            raise UserError(f"{out} holds files of another origin: give another OUT")
        _write_manifest(out, plan, {})
        return {}
    if differing := [key for key in plan if manifest.get(key) != plan[key]]:
        was, now = manifest.get(differing[0]), plan[differing[0]]
        raise UserError(
            f"{out} was started with another {differing[0]} ({was}, now {now}): remove it or give another OUT"
        )
    done = {shard.name: shard for shard in written if found.get(shard.name) == shard.bytes}
    if recorded:
        _write_manifest(out, plan, done)
        files.remove_files(f"{out}/{RECORDS}")
    return done


def _write_manifest(out: str, plan: dict[str, Any], done: dict[str, Written]) -> None:
    shards = [done[name]._asdict() for name in sorted(done)]
    files.write(f"{out}/{MANIFEST}", atomic.to_json({**plan, "shards": shards}).encode())

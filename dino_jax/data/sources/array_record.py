"""ArrayRecord files of images: a reader, and a writer for any other source.

A record is an encoded image, alone or after a header of 12 bytes with its label:

    bytes 0-3    b"DJX1"
    bytes 4-7    label, int32 little-endian (-1 = none)
    bytes 8-11   number of classes of the whole set, int32 little-endian (0 = no labels)
    bytes 12-    the image: JPEG, PNG, ...
"""

import io
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from dino_jax.data.array_files import NPY, NPZ, TIFF
from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.files import local_copies, matching_files
from dino_jax.errors import UserError

HEADER = struct.Struct("<4sii")  # magic, label, number of classes
MAGIC = b"DJX1"


class ArrayRecordSource(Source):
    """ArrayRecord files, in the sorted order of their names; see the module for the layout of a record."""

    syntax = "array_record:GLOB"

    def __init__(self, pattern: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if os.path.isdir(pattern):
            raise UserError(
                f"{KNOB}=array_record:{pattern} is a folder: write array_record:{os.path.join(pattern, '*')}, or a "
                "narrower pattern in quotes"
            )
        what = f"{KNOB}=array_record:{pattern}"
        names = matching_files(pattern, what)
        paths = local_copies(names, what)
        try:
            self.records = ArrayRecordDataSource(paths)
            first = self.records[0]
            _require_image(_split_record(first)[2])
        except Exception as error:  # its C++ reader raises bare RuntimeErrors
            raise UserError(
                f"{KNOB}=array_record:{pattern}: {names[0]} does not start with an image or a labeled image "
                "(layout: dino_jax.data.sources.array_record; datasets of TFDS are read with tfds:FOLDER)"
            ) from error
        self.num_classes = _split_record(first)[1]
        self.title = os.path.basename(names[0]) + (f" .. {os.path.basename(names[-1])}" if len(names) > 1 else "")

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """GLOB, which may begin with ~."""
        return cls(os.path.expanduser(rest)) if rest else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        label, _, image = _split_record(self.records[i])
        return Example(image, label)

    def name(self, i: int) -> str:
        """The files and the record number over all of them."""
        return f"{self.title} record {i}"


def _split_record(record: bytes) -> tuple[int, int, bytes]:
    """Splits a record into label, number of classes and encoded image."""
    if not record.startswith(MAGIC):
        return -1, 0, record
    if len(record) < HEADER.size:
        raise OSError(f"a record of {len(record)} bytes is cut off")
    _, label, num_classes = HEADER.unpack_from(record)
    return label, num_classes, record[HEADER.size :]


def write_array_record(source: Source, path: str) -> None:
    """Writes all examples of a source to one file that `array_record:PATH` reads; arrays are stored as PNG or .npy.

    `dino-jax prepare` writes a large source in parallel, to many files.
    """
    write_examples((source[i] for i in range(len(source))), source.num_classes, path)


def write_examples(examples: Iterable[Example], num_classes: int, path: str) -> int:
    """Writes examples of a set with `num_classes` classes to one such file and returns their number.

    Raises: OSError if the file cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    written = 0
    with as_os_error():
        writer = ArrayRecordWriter(path, "group_size:1")  # one record a group: random access costs no more
    for image, label in examples:
        if isinstance(image, np.ndarray):
            image = _encoded(image)
        with as_os_error():
            writer.write(HEADER.pack(MAGIC, label, num_classes) + image)
        written += 1
    with as_os_error():
        writer.close()
    return written


def _encoded(image: np.ndarray) -> bytes:
    """Returns an array [H, W] or [H, W, C] as a PNG, which is smaller, or as .npy if PNG cannot hold it."""
    buffer = io.BytesIO()
    try:
        Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer, "PNG")
    except (TypeError, OSError):
        buffer = io.BytesIO()
        np.save(buffer, image, allow_pickle=False)
    return buffer.getvalue()


def _require_image(content: bytes) -> None:
    """Raises an error of any type if the content begins neither like an image nor like an array."""
    if not content.startswith((NPY, NPZ, *TIFF)):  # Pillow does not know every TIFF
        Image.open(io.BytesIO(content))


@contextmanager
def as_os_error() -> Iterator[None]:
    """Turns an error of the C++ writer into an OSError."""
    try:
        yield
    except RuntimeError as error:  # the only exception of the C++ writer
        raise OSError(str(error).splitlines()[0]) from error

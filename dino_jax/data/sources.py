"""Where images come from: anything with a length that gives the i-th example.

Sources return images as they are stored (encoded bytes); decoding is `dino_jax.data.pipeline`'s. They are picklable,
because grain's workers are spawned.
"""

import glob
import hashlib
import io
import os
import re
import struct
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from dino_jax.data import demo_images
from dino_jax.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line ends, bytes that are not UTF-8
RECORD_HEADER = struct.Struct("<4sii")  # magic, label, number of classes: see ArrayRecordSource
RECORD_MAGIC = b"DJX1"
KNOB = "data.source (or evals.knn.train, evals.knn.test)"


class Example(NamedTuple):
    """One image as stored: an encoded file (bytes) or an array [H, W] or [H, W, C]; label -1 where there is none."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """What the input pipeline asks of a set of images."""

    num_classes: int  # 0 = no labels

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, i: int) -> Example:
        """The i-th example, 0 <= i < len. Raises OSError where it cannot be read."""

    def label(self, i: int) -> int:
        """The i-th label, -1 where there is none (cheaper than the example where the source can)."""

    def name(self, i: int) -> str:
        """What to call the i-th example in a message."""


def open_source(spec: str) -> Source:
    """The images that a specification names.

    folder:PATH          an image folder, any depth; class folders give labels      folder:/data/imagenet/train
    tfds:NAME[:SPLIT]    a prepared TFDS dataset, by name or by its folder;         tfds:imagenet2012:train[:10%]
                         SPLIT defaults to train                                    tfds:/data/my_set/1.0.0:train
    array_record:GLOB    ArrayRecord files (layout: ArrayRecordSource)              array_record:/data/train-*
    demo[:SPLIT]         the bundled demo images, train (default) or test           demo:test

    Any of these followed by `:N` keeps only the first N images of each class: demo:train:30, tfds:mnist:train:10.

    Raises: UserError saying what was found instead.
    """
    if limited := re.fullmatch(r"(.+):(\d+)", spec):
        return few_labels(open_source(limited[1]), int(limited[2]))
    kind, _, rest = spec.partition(":")
    if kind == "folder" and rest:
        return FolderSource(os.path.expanduser(rest))
    # A name may carry a version (mnist:3.0.1), a split may carry a colon (train[:50%]).
    if kind == "tfds" and (parts := re.fullmatch(r"([^:]+(?::\d+\.[\d.*]+)?)(?::(.+))?", rest)):
        return TfdsSource(parts[1], parts[2] or "train")
    if kind == "array_record" and rest:
        return ArrayRecordSource(os.path.expanduser(rest))
    if kind == "demo":
        return DemoSource(rest or "train")
    raise UserError(f"{KNOB}={spec!r}: expected folder:PATH, tfds:NAME[:SPLIT], array_record:GLOB or demo[:SPLIT]")


class FolderSource:
    """Image files under a folder, at any depth, in the order of their relative paths.

    Where every image lies in some sub-folder, the first-level folders are the classes, numbered in sorted order
    (`class_names`); otherwise there are no labels. Links are followed, but each real folder is visited once; one that
    leads nowhere stays in the list as an image that cannot be read. Names that start with a dot are passed over (macOS
    and editors leave files there that only look like images), and so is what is neither file nor folder.
    """

    def __init__(self, root: str):
        self.root = root
        self.paths = _image_paths(root)
        folders = [path.partition(os.sep)[0] if os.sep in path else "" for path in self.paths]
        self.class_names = sorted(set(folders)) if all(folders) else []
        self.num_classes = len(self.class_names)
        number = {name: k for k, name in enumerate(self.class_names)}
        self.labels = np.array([number.get(folder, -1) for folder in folders], np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Example:
        with open(os.path.join(self.root, self.paths[i]), "rb") as file:
            return Example(file.read(), self.label(i))

    def label(self, i: int) -> int:
        """The number of the image's class folder, or -1."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """The image's path relative to the folder, on one line: what is no character is written as Python would."""
        return UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], self.paths[i])


def _image_paths(root: str) -> list[str]:
    """Paths of all images under root, relative to it, sorted."""
    if not os.path.isdir(root):
        raise UserError(f"{KNOB}=folder:{root}: {'a file, not a folder' if os.path.exists(root) else 'no such folder'}")
    paths: list[str] = []
    others: Counter[str] = Counter()
    seen = set()
    # Breadth first and real folders before links: a folder keeps its own place when links point to it as well.
    pending = deque([""])
    while pending:
        folder = pending.popleft()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as found:
                entries = sorted(found, key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            raise UserError(f"{KNOB}=folder:{root}: cannot read {folder or root}: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            extension = os.path.splitext(entry.name)[1].lower()
            if _is_folder(entry):
                pending.append(os.path.join(folder, entry.name))
            elif extension not in IMAGE_EXTENSIONS:
                others[extension or "no extension"] += 1
            elif _is_file(entry):
                paths.append(os.path.join(folder, entry.name))
    if not paths:
        listing = ", ".join(f"{count} x {extension}" for extension, count in others.most_common(4)) or "nothing"
        raise UserError(f"{KNOB}=folder:{root}: no images ({' '.join(IMAGE_EXTENSIONS)}) there, found {listing}")
    return sorted(paths)


def _is_file(entry: os.DirEntry) -> bool:
    """Whether this is a file, or a link to one or to nothing."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link that leads to itself
        return True


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


class TfdsSource:
    """A prepared TensorFlow Datasets split, read without TensorFlow; images stay encoded.

    The image is the feature `image` (else the first image feature); labels are the class feature `label`, if any.
    """

    def __init__(self, name: str, split: str):
        # Imported here because it takes seconds, which the users of other sources should not pay.
        import tensorflow_datasets as tfds

        try:
            folder = os.path.expanduser(name)
            builder = tfds.builder_from_directory(folder) if os.path.isdir(folder) else tfds.builder(name)
            features = builder.info.features
            images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
            self.image_key = "image" if "image" in images or not images else images[0]
            self.records = builder.as_data_source(split, decoders={self.image_key: tfds.decode.SkipDecoding()})
        except Exception as error:  # TFDS raises many kinds here, all about a dataset that is not there as asked
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
            raise UserError(
                f"{KNOB}=tfds:{name}:{split}: {reason} -- prepare it for random access with "
                "`tfds build NAME --file_format=array_record`, or name the folder that holds its dataset_info.json"
            ) from error
        if not images:
            raise UserError(f"{KNOB}=tfds:{name}:{split}: no image among its features: {', '.join(features)}")
        labeled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
        self.num_classes = features["label"].num_classes if labeled else 0
        self.title = f"{name}:{split}"

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        return Example(record[self.image_key], int(record["label"]) if self.num_classes else -1)

    def label(self, i: int) -> int:
        """The record's class, or -1."""
        return self[i].label

    def name(self, i: int) -> str:
        """The dataset, its split and the record's number."""
        return f"{self.title} record {i}"


class ArrayRecordSource:
    """ArrayRecord files, in the sorted order of their names.

    A record is an encoded image, alone or behind a header of 12 bytes that holds its label:

        bytes 0-3    b"DJX1"
        bytes 4-7    label, int32 little-endian (-1 = none)
        bytes 8-11   number of classes of the whole set, int32 little-endian (0 = no labels)
        bytes 12-    the image: JPEG, PNG, ...

    `write_array_record` makes such files from any other source.
    """

    def __init__(self, pattern: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = sorted(glob.glob(pattern))
        if not paths:
            raise UserError(f"{KNOB}=array_record:{pattern}: no such files")
        try:
            self.records = ArrayRecordDataSource(paths)
            first = self.records[0]
            Image.open(io.BytesIO(_split_record(first)[2]))
        except Exception as error:  # its C++ reader raises bare RuntimeErrors
            raise UserError(
                f"{KNOB}=array_record:{pattern}: {paths[0]} does not start with an image or a labeled image "
                "(layout: dino_jax.data.sources.ArrayRecordSource; datasets of TFDS are read with tfds:FOLDER)"
            ) from error
        self.num_classes = _split_record(first)[1]
        self.title = os.path.basename(paths[0]) + (f" .. {os.path.basename(paths[-1])}" if len(paths) > 1 else "")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        label, _, image = _split_record(self.records[i])
        return Example(image, label)

    def label(self, i: int) -> int:
        """The label in the record's header, or -1."""
        return self[i].label

    def name(self, i: int) -> str:
        """The files and the record's number over all of them."""
        return f"{self.title} record {i}"


def _split_record(record: bytes) -> tuple[int, int, bytes]:
    """(label, number of classes, encoded image) of an ArrayRecord's record."""
    if not record.startswith(RECORD_MAGIC):
        return -1, 0, record
    _, label, num_classes = RECORD_HEADER.unpack_from(record)
    return label, num_classes, record[RECORD_HEADER.size :]


def names_digest(source: Source) -> str:
    """A hash of the names of all records, in order."""
    digest = hashlib.sha256()
    for record in range(len(source)):
        digest.update(source.name(record).encode() + b"\0")
    return digest.hexdigest()[:32]


def write_array_record(source: Source, path: str) -> None:
    """Write all examples of a source to one file that `array_record:PATH` reads; arrays are stored as PNG.

    `python -m dino_jax.commands.prepare` writes a large source in parallel, to many files.
    """
    write_examples((source[i] for i in range(len(source))), source.num_classes, path)


def write_examples(examples: Iterable[Example], num_classes: int, path: str) -> int:
    """Write some examples of a set with this many classes to one such file, and return how many.

    Raises: OSError where the disk refuses.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    written = 0
    with _refused_writes():
        writer = ArrayRecordWriter(path, "group_size:1")  # one record a group: read in any order at no extra cost
    for image, label in examples:
        if isinstance(image, np.ndarray):
            image = _png(image)
        with _refused_writes():
            writer.write(RECORD_HEADER.pack(RECORD_MAGIC, label, num_classes) + image)
        written += 1
    with _refused_writes():
        writer.close()
    return written


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    try:
        Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(buffer, "PNG")
    except (TypeError, OSError) as error:
        raise UserError(f"data.source: arrays {image.dtype} {list(image.shape)} cannot be stored as PNG") from error
    return buffer.getvalue()


@contextmanager
def _refused_writes():
    try:
        yield
    except RuntimeError as error:  # all that the C++ writer knows
        raise OSError(str(error).splitlines()[0]) from error


class DemoSource:
    """The bundled demo images (dino_jax.data.demo_images), in memory: gray uint8 [CANVAS, CANVAS, 1], 10 classes."""

    num_classes = demo_images.NUM_CLASSES

    def __init__(self, split: str):
        if split not in demo_images.SPLITS:
            raise UserError(f"{KNOB}=demo:{split}: the demo set has the splits {' and '.join(demo_images.SPLITS)}")
        self.split = split
        self.images = demo_images.demo_images(split)
        self.labels = demo_images.demo_labels(split)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Example:
        return Example(self.images[i], self.label(i))

    def label(self, i: int) -> int:
        """Garment class 0..9."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """Split and number."""
        return f"demo:{self.split} image {i}"


class Subset:
    """The images of another source with these record numbers, int [n], in this order."""

    def __init__(self, source: Source, records: np.ndarray):
        self.source = source
        self.records = records
        self.num_classes = source.num_classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        return self.source[int(self.records[i])]

    def label(self, i: int) -> int:
        """The label in the underlying source."""
        return self.source.label(int(self.records[i]))

    def name(self, i: int) -> str:
        """The name in the underlying source."""
        return self.source.name(int(self.records[i]))


def few_labels(source: Source, count: int) -> Subset:
    """The first `count` images of each class of another source, in that source's order."""
    if not (source.num_classes and count):
        what = "keeps no image" if source.num_classes else "keeps N images of each class, but there are no labels"
        raise UserError(f"{KNOB}: the suffix :{count} {what}")
    records: list[int] = []
    left = dict.fromkeys(range(source.num_classes), count)
    for i in range(len(source)):
        label = source.label(i)
        if left.get(label):
            records.append(i)
            left[label] -= 1
            if not any(left.values()):
                break
    return Subset(source, np.array(records, np.int64))

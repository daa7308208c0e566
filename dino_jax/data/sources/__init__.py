"""Sources of images: sequences with random access that `open_source` opens by a specification.

A new source is a file here with a subclass of `Source`, and a line in `SCHEMES`. Sources return images as they are
stored (encoded bytes); `dino_jax.data.decoding` decodes them.
"""

import hashlib
import re

import numpy as np

from dino_jax.data.sources.array_record import ArrayRecordSource
from dino_jax.data.sources.base import KNOB, Example, Source, SourceType, read_example
from dino_jax.data.sources.demo import DemoSource
from dino_jax.data.sources.folder import FolderSource
from dino_jax.data.sources.huggingface import HuggingFaceSource
from dino_jax.data.sources.labeled import LabeledSource
from dino_jax.data.sources.parquet import ParquetSource
from dino_jax.data.sources.subset import Subset, spread
from dino_jax.data.sources.tar import TarSource
from dino_jax.data.sources.tfds import TfdsSource
from dino_jax.data.sources.zip import ZipSource
from dino_jax.errors import UserError

__all__ = [
    "SCHEMES",
    "Example",
    "Source",
    "Subset",
    "few_labels",
    "names_digest",
    "open_source",
    "read_example",
    "spread",
]

LABELS = "?labels="
SCHEMES: dict[str, SourceType] = {
    "folder": FolderSource,
    "tfds": TfdsSource,
    "array_record": ArrayRecordSource,
    "wds": TarSource,
    "parquet": ParquetSource,
    "hf": HuggingFaceSource,
    "zip": ZipSource,
    "demo": DemoSource,
}


def open_source(spec: str) -> Source:
    """Opens the source that a specification names.

    folder:PATH          an image folder, any depth; class folders give labels      folder:/data/imagenet/train
    tfds:NAME[:SPLIT]    a prepared TFDS dataset, by name or by its folder, which   tfds:imagenet2012:train[:10%]
                         may be in a bucket; SPLIT defaults to train                tfds:/data/my_set/1.0.0:train
    array_record:GLOB    ArrayRecord files (layout: sources/array_record.py)        array_record:/data/train-*
    wds:SHARDS.tar       WebDataset shards, with {000..127} or *; labels of         wds:/data/train-{000..127}.tar
                         .cls or .json
    parquet:FILES        rows of Parquet files; ?image=COLUMN and ?label=COLUMN     parquet:/data/train-*.parquet
                         name the columns where they are not found by themselves
    hf:NAME[:SPLIT]      a data set in the local cache of Hugging Face's datasets,  hf:cifar10:train
                         or a folder that save_to_disk wrote
    zip:PATH             images in a zip archive; folders give labels               zip:/data/photos.zip
    demo[:SPLIT]         the bundled demo images, train (default) or test           demo:test

    A suffix `?labels=FILE.csv` takes labels from a file with the columns name and label: see `LabeledSource`.
    A suffix `:N` keeps only the first N images of each class: demo:train:30, tfds:mnist:train:10.

    Raises: UserError if there is no such source; the message says what was found instead.
    """
    if limited := re.fullmatch(r"(\w+:.+|demo):([0-9]+)", spec):
        return few_labels(open_source(limited[1]), int(limited[2]))
    unlabeled, mark, labels = spec.partition(LABELS)
    if mark:
        return LabeledSource(open_source(unlabeled), labels)
    scheme, _, rest = spec.partition(":")
    source = SCHEMES[scheme].from_spec(rest) if scheme in SCHEMES else None
    if source is None:
        *first, last = (known.syntax for known in SCHEMES.values())
        raise UserError(f"{KNOB}={spec!r}: expected {', '.join(first)} or {last}")
    return source


def few_labels(source: Source, count: int) -> Subset:
    """Returns the first `count` images of each class of another source, in the order of that source."""
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


def names_digest(source: Source) -> str:
    """Returns a hash of the names of all records, in order: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for record in range(len(source)):
        digest.update(source.name(record).encode() + b"\0")
    return digest.hexdigest()[:32]

"""TensorFlow Datasets, read without TensorFlow."""

import hashlib
import os
import re
from contextlib import suppress

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.files import cache_folder, local_copies, sizes
from dino_jax.errors import UserError, missing_extras
from dino_jax.storage import is_remote

RECORDS = "array_record"  # extension of the files that hold the images

# A name may contain a version (mnist:3.0.1) or be a URL, and a split may contain a colon (train[:50%]).
SPEC = re.compile(r"((?:\w+://)?[^:]+(?::\d+\.[\d.*]+)?)(?::(.+))?")


class TfdsSource(Source):
    """A split of a prepared dataset; images stay encoded.

    The image is the feature `image`, or the first image feature if there is no `image`; labels are the class feature
    `label`, if there is one. Of a folder in a store, the files of the split are copied first (`local_copies`), because
    the reader of ArrayRecord files needs local ones.
    """

    syntax = "tfds:NAME[:SPLIT]"

    def __init__(self, name: str, split: str):
        # Imported here because it takes seconds, which the users of other sources should not pay.
        with missing_extras():
            import tensorflow_datasets as tfds

        folder = _copied(name, split) if is_remote(name) else os.path.expanduser(name)
        try:
            builder = tfds.builder_from_directory(folder) if os.path.isdir(folder) else tfds.builder(name)
            features = builder.info.features
            images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
            self.image_key = "image" if "image" in images or not images else images[0]
            self.records = builder.as_data_source(split, decoders={self.image_key: tfds.decode.SkipDecoding()})
        except Exception as error:  # TFDS raises many types here, all because the dataset is not there as specified
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

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """NAME[:SPLIT]; NAME may be the folder of a dataset, SPLIT defaults to train."""
        parts = SPEC.fullmatch(rest)
        return cls(parts[1], parts[2] or "train") if parts else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Example:
        record = self.records[i]
        return Example(record[self.image_key], int(record["label"]) if self.num_classes else -1)

    def name(self, i: int) -> str:
        """The dataset, its split and the record number."""
        return f"{self.title} record {i}"


def _copied(url: str, split: str) -> str:
    """Returns a local folder of the data set at a URL, with its description and the files of a split.

    Raises UserError if it is not there, or there is no room on the disk.
    """
    what = f"{KNOB}=tfds:{url}:{split}"
    splits = [re.sub(r"\[.*", "", part).strip() for part in split.split("+")]
    wanted = [
        f"{url.rstrip('/')}/{name}"
        for name in sizes(url)
        if RECORDS not in name or any(part == "all" or f"-{part}.{RECORDS}" in name for part in splits)
    ]
    if not any(path.endswith("/dataset_info.json") for path in wanted):
        raise UserError(f"{what}: no dataset_info.json: name the folder that holds it, such as gs://BUCKET/mnist/3.0.1")
    copies = local_copies(wanted, what)
    folder = cache_folder("tfds") / hashlib.sha256("\n".join(copies).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for path, copy in zip(wanted, copies, strict=True):
        link = folder / path.rpartition("/")[2]
        if not link.exists():
            link.unlink(missing_ok=True)
            with suppress(FileExistsError):  # another process was faster
                link.symlink_to(copy)
    return str(folder)

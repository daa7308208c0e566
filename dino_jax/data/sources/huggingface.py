"""Data sets in the local cache of Hugging Face's `datasets`, or saved by it to a folder. Nothing is downloaded."""

import os
import re
from typing import Any

import numpy as np

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.folder import read_file
from dino_jax.errors import UserError, missing_extras

SPEC = re.compile(r"([^:]+)(?::(.+))?")


class HuggingFaceSource(Source):
    """The rows of a split, in its order: random access to Arrow files.

    NAME is a data set in the local cache, or a folder that `save_to_disk` wrote. The image column is the first of type
    Image; the labels are those of the first ClassLabel.
    """

    syntax = "hf:NAME[:SPLIT]"

    def __init__(self, name: str, split: str):
        what = f"{KNOB}=hf:{name}:{split}"
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read once, when it is imported
        with missing_extras():
            import datasets
        try:
            rows: Any = _load(datasets, os.path.expanduser(name), split)
        except Exception as error:  # of many types, all because the data set is not there as specified
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{what}: {reason} -- load it once with datasets.load_dataset({name!r}), which keeps it, or name a "
                "folder that save_to_disk wrote"
            ) from error
        images = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise UserError(f"{what}: no column of type Image among {', '.join(rows.features)}")
        classes = [key for key, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        self.image = images[0]
        self.class_names = list(rows.features[classes[0]].names) if classes else []
        self.num_classes = len(self.class_names)
        values = rows[classes[0]][:] if classes else []
        self.labels = np.array([-1 if value is None else value for value in values], np.int32)
        self.rows = rows.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))
        self.title = f"{name}:{split}"

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """NAME[:SPLIT]; SPLIT defaults to train."""
        parts = SPEC.fullmatch(rest)
        return cls(parts[1], parts[2] or "train") if parts else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        image = self.rows[i][self.image]
        if image is None or not (image["bytes"] or image["path"]):
            raise OSError("the row has no image")
        return Example(image["bytes"] or read_file(image["path"]), self.label(i))

    def label(self, i: int) -> int:
        """The number of the class, -1 if there is none."""
        return int(self.labels[i]) if len(self.labels) else -1

    def name(self, i: int) -> str:
        """The data set, its split and the row number."""
        return f"{self.title} row {i}"


def _load(datasets: Any, name: str, split: str) -> Any:
    if os.path.isdir(name) and any(file in os.listdir(name) for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        return saved[split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(name, split=split)

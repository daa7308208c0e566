"""Data sets in the local cache of Hugging Face's `datasets`, or saved by it to a folder. Nothing is downloaded."""

import os
import re
from collections.abc import Mapping
from typing import Any

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.columns import find_columns, label_numbers, split_options, stored_image
from dino_jax.data.sources.folder import read_file
from dino_jax.errors import UserError, missing_extras

SPEC = re.compile(r"([^:]+)(?::(.+))?")  # a split may contain a colon (train[:50%])
SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` writes


class HuggingFaceSource(Source):
    """The rows of a split, in its order: random access to Arrow files, which are mapped into memory.

    NAME is a data set in the local cache, or a folder that `save_to_disk` wrote. The columns of images and labels are
    found, or named in the specification (`columns`). An image that a row only points to is read from its file.
    """

    syntax = "hf:NAME[:SPLIT]"

    def __init__(self, name: str, split: str, options: Mapping[str, str]):
        self.title = f"{name}:{split}"
        what = f"{KNOB}=hf:{self.title}"
        with missing_extras():
            import datasets  # noqa: F401 (imported here because other sources do not need it)
        folder = os.path.expanduser(name)
        saved = any(os.path.isfile(os.path.join(folder, file)) for file in SAVED)
        rows = _saved(folder, split, what) if saved else _cached(name, split, options.get("config"), what)
        if not len(rows):
            raise UserError(f"{what}: no rows")
        self.columns = find_columns(rows.features.arrow_schema, options, what)
        self.labels, self.num_classes = None, 0
        if label := self.columns.label:
            column = rows.select_columns([label]).with_format("arrow")[:][label]
            self.labels, self.class_names, self.num_classes = label_numbers([column], self.columns, what)
        self.rows = rows.select_columns([self.columns.image]).with_format("arrow")

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """NAME[:SPLIT], by default train; then ?config=NAME, ?image=COLUMN and ?label=COLUMN. NAME may be a folder."""
        place, options = split_options(rest, ("config", "image", "label"), f"{KNOB}=hf:")
        parts = SPEC.fullmatch(place)
        return cls(parts[1], parts[2] or "train", options) if parts else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        image = self.rows[i][self.columns.image][0].as_py()
        if isinstance(image, dict):
            path = image.get("path")
            image = read_file(path) if image["bytes"] is None and path else image["bytes"]
        return Example(stored_image(image), self.label(i))

    def label(self, i: int) -> int:
        """The number in the label column, or that of its text; -1 if there is none."""
        return -1 if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        """The data set, its split and the row number."""
        return f"{self.title} row {i}"


def _saved(folder: str, split: str, what: str) -> Any:
    """Returns a `datasets.Dataset` of a folder. Raises UserError, which begins with `what`."""
    import datasets

    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:  # of many types, all because the folder is not as `save_to_disk` wrote it
        raise UserError(
            f"{what}: the folder is damaged ({_reason(error)}): write it with save_to_disk again"
        ) from error
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise UserError(f"{what}: no split {split}, only {', '.join(map(str, found))}")
    return found[split]


def _cached(name: str, split: str, config: str | None, what: str) -> Any:
    """Returns a `datasets.Dataset` of the cache. Raises UserError, which begins with `what`."""
    from datasets.config import HF_DATASETS_CACHE

    # `load_dataset` ends up with this builder where there is no connection. It would ask the network first, also in
    # offline mode if that was not set before `datasets` was imported.
    from datasets.packaged_modules.cache.cache import Cache

    repository = name if "/" in name else None
    dataset = name.split("/")[-1]
    try:
        builder = Cache(dataset_name=dataset, repo_id=repository, config_name=config, version="auto", hash="auto")
        return builder.as_dataset(split=split)
    except Exception as error:  # of many types, all because the data set is not there as specified
        load = f"datasets.load_dataset({name!r}{f', {config!r}' if config else ''})"
        raise UserError(
            f"{what}: the cache {HF_DATASETS_CACHE} does not have it ({_reason(error)}): load it once with {load} "
            "where there is a connection, or name a folder that save_to_disk wrote"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

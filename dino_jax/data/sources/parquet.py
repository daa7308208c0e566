"""Images in Parquet files, as Hugging Face data sets have them."""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dino_jax.data.sources.base import KNOB, WINDOW, Example, Source
from dino_jax.data.sources.files import matching_files, opened, status
from dino_jax.data.sources.folder import check_file_size
from dino_jax.errors import UserError, missing_extras
from dino_jax.progress import progress
from dino_jax.storage import is_remote

COLUMN = re.compile(r"\?(image|label)=([^?]+)")
LABELS = ("label", "labels", "cls", "class")  # names of a label column that are found by themselves
READERS = 8  # footers that are read at a time


class Footer(NamedTuple):
    """What the source keeps of a file."""

    rows: list[int]  # of each row group
    labels: list[int | str | None]  # of each row, empty without a label column


class ParquetSource(Source):
    """The rows of Parquet files, in the order of the files' names.

    The image column is a struct with a field `bytes`, or binary; the label column holds integers, whose names are those
    of Hugging Face's metadata, or texts, which become classes in sorted order. A row group is read as a whole: training
    shuffles groups and, within windows, their rows (`groups`), and each reader keeps the rows of one window.
    """

    syntax = "parquet:FILES"
    groups: np.ndarray

    def __init__(self, pattern: str, image: str = "", label: str = ""):
        self.what = f"{KNOB}=parquet:{pattern}"
        with missing_extras():
            import pyarrow.parquet  # noqa: F401 (imported here because other sources do not need it)
        self.paths = matching_files(pattern, self.what)
        schema = self._opened(self.paths[0]).schema_arrow
        self.image = image or _image_column(schema, self.what)
        self.column = _bytes_path(schema, self.image, self.what)
        self.label_column = label or next((name for name in LABELS if name in schema.names), "")
        if self.label_column and self.label_column not in schema.names:
            raise UserError(f"{self.what}: no column {self.label_column} among {', '.join(schema.names)}")
        with ThreadPoolExecutor(READERS) as pool:
            read = progress(pool.map(self._footer, self.paths), len(self.paths), "footers", "files")
            footers = list(read)
        self.groups = np.array([rows for footer in footers for rows in footer.rows], np.int64)
        self.places = [(file, group) for file, footer in enumerate(footers) for group in range(len(footer.rows))]
        self.first = np.cumsum(self.groups) - self.groups
        self.files = np.cumsum([0] + [sum(footer.rows) for footer in footers])
        if not self.groups.sum():
            raise UserError(f"{self.what}: no rows in {len(self.paths):,} files")
        values = [value for footer in footers for value in footer.labels]
        self.class_names, self.labels = _classes(values, _stated_names(schema, self.label_column))
        self.num_classes = len(self.class_names) or int(self.labels.max(initial=-1)) + 1
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """Names of files with {000..999} or *, separated by commas; then ?image=COLUMN and ?label=COLUMN."""
        pattern = COLUMN.sub("", rest)
        return cls(pattern, **dict(COLUMN.findall(rest))) if pattern else None

    def __len__(self) -> int:
        return int(self.files[-1])

    def __getitem__(self, i: int) -> Example:
        group = int(np.searchsorted(self.first, i, side="right")) - 1
        while self.groups[group] == 0:  # an empty group begins where the next one does
            group -= 1
        content = self._group(group)[i - int(self.first[group])].as_py()
        if content is None:
            raise OSError("the row has no image")
        check_file_size(len(content))
        return Example(content, self.label(i))

    def label(self, i: int) -> int:
        """The number in the label column, or that of its text; -1 if there is none."""
        return int(self.labels[i]) if len(self.labels) else -1

    def name(self, i: int) -> str:
        """The file's name and the number of the row in it."""
        file = int(np.searchsorted(self.files, i, side="right")) - 1
        return f"{os.path.basename(self.paths[file])}/{i - self.files[file]}"

    def identity(self, i: int) -> str:
        """Name, label, and the file's size and modification time."""
        path = self.paths[int(np.searchsorted(self.files, i, side="right")) - 1]
        try:
            size, changed = status(path)
        except OSError:
            return f"{self.name(i)} is not there"
        return f"{self.name(i)} {self.label(i)} {size} {changed}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _cache=OrderedDict(), _lock=threading.Lock())

    def _group(self, group: int) -> Any:
        """Returns the encoded images of a row group, and keeps those of as many rows as training shuffles together."""
        with self._lock:
            if group not in self._cache:
                file, number = self.places[group]
                table = self._opened(self.paths[file]).read_row_group(number, columns=[self.column])
                images = table.column(0).combine_chunks()
                self._cache[group] = images.field("bytes") if "." in self.column else images
                while len(self._cache) > 1 and sum(map(len, self._cache.values())) > 2 * WINDOW:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _opened(self, path: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(opened(path) if is_remote(path) else path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{self.what}: {path} is no whole Parquet file: copy it again") from error
        except OSError as error:
            raise UserError(f"{self.what}: {path} cannot be read: {error.strerror or error}") from error

    def _footer(self, path: str) -> Footer:
        file = self._opened(path)
        if self.image not in file.schema_arrow.names:
            raise UserError(f"{self.what}: {path} has no column {self.image}, which {self.paths[0]} has")
        labels = file.read(columns=[self.label_column]).column(0).to_pylist() if self.label_column else []
        return Footer([file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)], labels)


def _image_column(schema: Any, what: str) -> str:
    """Returns the name of the only column that can hold images."""
    found = [field.name for field in schema if _holds_images(field.type)]
    if named := [name for name in found if name in ("image", "img")]:
        return named[0]
    if len(found) != 1:
        which = f"several columns of bytes, {', '.join(found)}" if found else "no column of bytes"
        raise UserError(f"{what}: {which} among {', '.join(schema.names)}: name one with ?image=COLUMN")
    return found[0]


def _bytes_path(schema: Any, name: str, what: str) -> str:
    """Returns the path of the bytes of an image column: NAME or NAME.bytes."""
    if name not in schema.names or not _holds_images(schema.field(name).type):
        raise UserError(f"{what}: no column {name} of bytes among {', '.join(schema.names)}")
    return f"{name}.bytes" if _is_struct(schema.field(name).type) else name


def _holds_images(type_: Any) -> bool:
    import pyarrow.types as types

    if _is_struct(type_):
        type_ = type_.field("bytes").type if type_.get_field_index("bytes") >= 0 else None
    return type_ is not None and (types.is_binary(type_) or types.is_large_binary(type_))


def _is_struct(type_: Any) -> bool:
    import pyarrow.types as types

    return types.is_struct(type_)


def _stated_names(schema: Any, column: str) -> list[str]:
    """Returns the names of a ClassLabel in the metadata that Hugging Face's `datasets` writes, if there are any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _classes(values: Sequence[int | str | None], stated: list[str]) -> tuple[list[str], np.ndarray]:
    """Returns the names of the classes, empty if there are only numbers, and the labels int32 [n], -1: none."""
    if any(isinstance(value, str) for value in values):
        names = sorted({str(value) for value in values if value is not None})
        number = {name: k for k, name in enumerate(names)}
        return names, np.array([-1 if value is None else number[str(value)] for value in values], np.int32)
    return stated, np.array([value if isinstance(value, int) else -1 for value in values], np.int32)

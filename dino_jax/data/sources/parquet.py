"""Images in Parquet files, as Hugging Face data sets have them.

Only whole row groups can be read, so a reader keeps the groups that it used last in memory, and training shuffles
windows of groups (`dino_jax.data.order`).
"""

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dino_jax.data.lru import LRU
from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.columns import (
    Columns,
    find_columns,
    is_text,
    joined,
    label_numbers,
    split_options,
    stored_image,
)
from dino_jax.data.sources.files import matching_files, opened, status
from dino_jax.data.sources.folder import printable
from dino_jax.errors import UserError, missing_extras
from dino_jax.progress import progress
from dino_jax.storage import is_remote

INDEXERS = 8  # files that are indexed at a time
MEMORY = 2**30  # bytes of images that each reading process keeps
MIN_GROUPS = 4  # row groups that it keeps however large, because windows of fewer would be shuffled badly
SPARE = 5  # of the groups that are kept, every fifth is not for the window: batches span two, substitutes come from all
FOOTERS = 4096  # footers that each reading process keeps


class FileIndex(NamedTuple):
    """What is known of a file without reading its images."""

    groups: list[tuple[int, int, int]]  # number in the file, rows and bytes of images, of row groups that have rows
    labels: Any  # pyarrow.ChunkedArray, None without a column of labels
    names: Any  # pyarrow.ChunkedArray of the paths in the structs, None if there are none


class ParquetSource(Source):
    """The rows of Parquet files, in the order of the files' names.

    The columns of images and labels are found, or named in the specification (`columns`). The name of a row is the path
    in its struct if all rows have paths that differ, else FILE/ROW.
    """

    syntax = "parquet:FILES"
    groups: np.ndarray

    def __init__(self, pattern: str, options: Mapping[str, str]):
        what = f"{KNOB}=parquet:{pattern}"
        with missing_extras():
            import pyarrow.parquet  # noqa: F401 (imported here because other sources do not need it)
        if os.path.isdir(os.path.expanduser(pattern)):
            raise UserError(f"{what} is a folder: write parquet:{os.path.join(pattern, '*.parquet')}")
        self.paths = matching_files(pattern, what)
        self.columns = _columns_of(self.paths[0], options, what)
        index = partial(_index_of, first=self.paths[0], columns=self.columns, what=what)
        with ThreadPoolExecutor(INDEXERS) as pool:
            indexes = list(progress(pool.map(index, self.paths), len(self.paths), "index", "files"))
        places = [(file, *group) for file, index in enumerate(indexes) for group in index.groups]
        if not places:
            raise UserError(f"{what}: no rows in {len(self.paths):,} files, whose first is {self.paths[0]}")
        self.files, self.numbers, self.groups, stored = np.array(places, np.int64).T  # of each group
        self.firsts = np.cumsum(self.groups) - self.groups
        self.titles, self.names = _titles(self.paths), _unique_names(indexes)
        self.labels, self.num_classes = None, 0
        if self.columns.label:
            labels = [index.labels for index in indexes]
            self.labels, self.class_names, self.num_classes = label_numbers(labels, self.columns, what)
        kept, self.window = kept_groups(stored, what)
        self._images, self._footers = LRU[Any](kept), LRU[Any](FOOTERS)

    @classmethod
    def from_spec(cls, rest: str) -> Source | None:
        """Names of files with {000..999} or *, separated by commas; then ?image=COLUMN and ?label=COLUMN."""
        pattern, options = split_options(rest, ("image", "label"), f"{KNOB}=parquet:")
        return cls(pattern, options) if pattern else None

    def __len__(self) -> int:
        return int(self.groups.sum())

    def __getitem__(self, i: int) -> Example:
        group = self._group(i)
        image = self._images.get(group, partial(self._read, group))[i - int(self.firsts[group])].as_py()
        return Example(stored_image(image), self.label(i))

    def label(self, i: int) -> int:
        """The number in the label column, or that of its text; -1 if there is none."""
        return -1 if self.labels is None else int(self.labels[i])

    def name(self, i: int) -> str:
        """The path in the row's struct, or the file and the number of the row in it, on a single line."""
        return printable(self._place(i) if self.names is None else self.names[i].as_py())

    def identity(self, i: int) -> str:
        """Name, label, place, and the file's size and modification time."""
        try:
            size, changed = status(self.paths[self.files[self._group(i)]])
        except OSError:
            return f"{self.name(i)} is not there"
        return f"{self.name(i)} {self.label(i)} {printable(self._place(i))} {size} {changed}"

    def _group(self, i: int) -> int:
        return int(np.searchsorted(self.firsts, i, side="right")) - 1

    def _place(self, i: int) -> str:
        file = self.files[self._group(i)]
        return f"{self.titles[file]}/{i - self.firsts[np.searchsorted(self.files, file)]}"

    def _read(self, group: int) -> Any:
        """Returns the encoded images of a row group, a `pyarrow.ChunkedArray`. Raises OSError."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        path, number = self.paths[self.files[group]], int(self.numbers[group])
        try:
            footer = self._footers.get(path, partial(_footer, path))
            with pq.ParquetFile(_place_to_read(path), metadata=footer, page_checksum_verification=True) as file:
                images = file.read_row_group(number, columns=[_leaf(self.columns)], use_threads=False).column(0)
        except pa.ArrowException as error:
            raise OSError(f"row group {number} of {path} cannot be read: {_first_line(error)}") from error
        if len(images) != self.groups[group]:
            raise OSError(f"{path} has changed since the start")
        return pc.struct_field(images, "bytes") if self.columns.nested else images


def _place_to_read(path: str) -> Any:
    return opened(path) if is_remote(path) else path


def _footer(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(_place_to_read(path))


def _leaf(columns: Columns) -> str:
    return f"{columns.image}.bytes" if columns.nested else columns.image


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open(path: str, what: str) -> Any:
    """Opens a `pyarrow.parquet.ParquetFile`. Raises UserError, which begins with `what`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(_place_to_read(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"{what}: {path} is no whole Parquet file: copy it again") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{what}: {path} cannot be read: {_first_line(error)}") from error


def _columns_of(path: str, options: Mapping[str, str], what: str) -> Columns:
    with _open(path, what) as file:
        return find_columns(file.schema_arrow, options, what)


def _index_of(path: str, *, first: str, columns: Columns, what: str) -> FileIndex:
    """Reads a file's footer, labels and paths of images.

    Raises: UserError, which begins with `what`, if it cannot be read or does not fit the first file.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    with _open(path, what) as file:
        schema = file.schema_arrow
        for column in filter(None, (columns.image, columns.label)):
            if column not in schema.names:
                raise UserError(f"{what}: {path} has no column {column}, which {first} has")
        if find_columns(schema, {"image": columns.image, "label": columns.label}, f"{what}: {path}") != columns:
            raise UserError(f"{what}: {path} has another type of images, labels or classes than {first}")
        footer = file.metadata
        leaves = [footer.schema.column(c).path for c in range(footer.num_columns)]
        image, path_leaf = leaves.index(_leaf(columns)), f"{columns.image}.path"
        groups = [(k, footer.row_group(k)) for k in range(footer.num_row_groups)]
        sizes = [(k, group.num_rows, group.column(image).total_uncompressed_size) for k, group in groups]
        try:
            labels = file.read([columns.label]).column(0) if columns.label else None
            names = pc.struct_field(file.read([path_leaf]).column(0), "path") if path_leaf in leaves else None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{what}: {path} cannot be read: {_first_line(error)}") from error
    named = names is not None and is_text(names.type)
    return FileIndex([size for size in sizes if size[1]], labels, names if named else None)


def _titles(paths: list[str]) -> list[str]:
    """Returns the files' names, with the folders in which they differ."""
    whole = [os.path.abspath(path) for path in paths]
    folder = os.path.commonpath([os.path.dirname(path) for path in whole])
    return [os.path.relpath(path, folder) for path in whole]


def _unique_names(indexes: list[FileIndex]) -> Any:
    """Returns a `pyarrow.StringArray` with the paths of all rows, None if some have none or two have the same."""
    if any(index.names is None for index in indexes):
        return None
    names = joined([index.names for index in indexes], "string")
    return None if names.null_count or len(names.unique()) < len(names) else names


def kept_groups(stored: np.ndarray, what: str) -> tuple[int, int]:
    """Returns how many groups a reader keeps, and how many of these are a window, given the bytes of each group.

    A line on stderr, which begins with `what`, tells if the groups are too large for `MEMORY`.
    """
    kept = max(MIN_GROUPS, MEMORY // max(1, int(stored.max())))
    if (memory := int(np.sort(stored)[-kept:].sum())) > MEMORY:
        print(
            f"{what}: row groups of up to {stored.max() / 1e6:,.0f} MB can only be read as a whole: each of "
            f"data.workers keeps {kept}, up to {memory / 1e9:,.1f} GB; `dino-jax prepare` writes files that need less",
            file=sys.stderr,
        )
    return kept, kept - kept // SPARE

"""Labels from a CSV file beside any source, so that class folders are not needed."""

import csv
from pathlib import Path

import numpy as np

from dino_jax.data.sources.base import KNOB, Example, Source
from dino_jax.data.sources.subset import Subset
from dino_jax.errors import UserError, listed

COLUMNS = ("name", "label")


class LabeledSource(Subset):
    """The images of another source that a CSV file gives labels to, in the order of that source.

    The file has a header with the columns `name` and `label`; others are ignored. A name is that of `Source.name`: for
    a folder, the path relative to it. Labels are any texts. Classes are numbered in the order of their labels, which is
    numeric if all labels are numbers. Images without a row are left out. Raises UserError if the file does not fit.
    """

    def __init__(self, source: Source, path: str):
        rows = _read(path)
        names = [source.name(i) for i in range(len(source))]
        found = [i for i, name in enumerate(names) if name in rows]
        if missing := sorted(set(rows) - set(names)):
            raise UserError(
                f"{path}: {len(missing):,} of its {len(rows):,} names are not in the source, whose first is "
                f"{names[0]}; remove them: {listed(missing)}"
            )
        super().__init__(source, np.array(found, np.int64))
        self.class_names = class_order({rows[names[i]] for i in found})
        self.num_classes = len(self.class_names)
        number = {label: k for k, label in enumerate(self.class_names)}
        self.labels = np.array([number[rows[names[i]]] for i in found], np.int32)

    def __getitem__(self, i: int) -> Example:
        return Example(self.source[int(self.records[i])].image, self.label(i))

    def label(self, i: int) -> int:
        """The number of the row's label."""
        return int(self.labels[i])

    def identity(self, i: int) -> str:
        """The identity in the other source, and the label."""
        return f"{self.source.identity(int(self.records[i]))} {self.class_names[self.label(i)]}"


def _read(path: str) -> dict[str, str]:
    """Returns name -> label. Raises UserError."""
    what = f"{KNOB}: the labels {path}"
    try:
        with open(Path(path).expanduser(), newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or [])]:
                raise UserError(f"{what} have no column {' and '.join(missing)}: the first line must be name,label")
            rows: dict[str, str] = {}
            for row in table:
                name, label = (row[column] for column in COLUMNS)
                if not name or not label:
                    raise UserError(f"{what}: line {table.line_num} has no name or no label")
                if rows.setdefault(name, label) != label:
                    raise UserError(f"{what}: line {table.line_num} gives {name} a second label")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{what} are empty")
    return rows


def class_order(labels: set[str]) -> list[str]:
    """Returns the names of classes in the order of their numbers, which is numeric if all names are numbers."""
    numeric = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numeric else 0, label))

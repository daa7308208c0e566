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
    numeric if all labels are numbers. Images without a row are left out.

    If a label has a semicolon, as in `cat;dog`, images have any number of classes (`label_sets`), and none where the
    label is empty. Raises UserError if the file does not fit.
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
        self.rows = [rows[names[i]] for i in found]
        sets = [[label for label in row.split(";") if label] for row in self.rows]
        self.class_names = class_order({label for labels in sets for label in labels})
        number = {label: k for k, label in enumerate(self.class_names)}
        numbers = [sorted({number[label] for label in labels}) for labels in sets]
        several = any(";" in label for label in rows.values())
        self.label_sets = numbers if several else None
        self.num_classes = 0 if several else len(self.class_names)
        self.labels = np.array([-1 if several else labels[0] for labels in numbers], np.int32)

    def __getitem__(self, i: int) -> Example:
        return Example(self.source[int(self.records[i])].image, self.label(i))

    def label(self, i: int) -> int:
        """The number of the row's label; -1 if images have any number of them."""
        return int(self.labels[i])

    def identity(self, i: int) -> str:
        """The identity in the other source, and the label."""
        return f"{self.source.identity(int(self.records[i]))} {self.rows[i]}"


def _read(path: str) -> dict[str, str]:
    """Returns name -> label. Raises UserError."""
    what = f"{KNOB}: the labels {path}"
    try:
        with open(Path(path).expanduser(), newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (table.fieldnames or [])]:
                raise UserError(f"{what} have no column {' and '.join(missing)}: the first line must be name,label")
            rows: dict[str, str] = {}
            empty = 0  # the first line with an empty label
            for row in table:
                name, label = (row[column] for column in COLUMNS)
                if not name or label is None:
                    raise UserError(f"{what}: line {table.line_num} has no name or no label")
                if not label and not empty:
                    empty = table.line_num
                if rows.setdefault(name, label) != label:
                    raise UserError(f"{what}: line {table.line_num} gives {name} a second label")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows:
        raise UserError(f"{what} are empty")
    if empty and not any(";" in label for label in rows.values()):
        raise UserError(f"{what}: line {empty} has no label")
    return rows


def class_order(labels: set[str]) -> list[str]:
    """Returns the names of classes in the order of their numbers, which is numeric if all names are numbers."""
    numeric = all(label.isdecimal() for label in labels)
    return sorted(labels, key=lambda label: (int(label) if numeric else 0, label))

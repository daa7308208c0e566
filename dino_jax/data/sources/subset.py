"""A part of another source."""

import numpy as np

from dino_jax.data.sources.base import Example, Source


class Subset(Source):
    """The images of another source with the given record numbers, int [n], in this order."""

    def __init__(self, source: Source, records: np.ndarray):
        self.source = source
        self.records = records
        self.num_classes = source.num_classes
        self.class_names = source.class_names
        self.groups = None if source.groups is None else _groups_of(records, source.groups)
        self.window = source.window

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

    def identity(self, i: int) -> str:
        """The identity in the underlying source."""
        return self.source.identity(int(self.records[i]))


def _groups_of(records: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
    """Returns the groups of some records, given the groups of all, if the records are in the order of the groups."""
    group = np.searchsorted(np.cumsum(groups), records, side="right")
    return np.unique(group, return_counts=True)[1] if np.all(np.diff(group) >= 0) else None


def spread(source: Source, most: int) -> Subset:
    """Returns at most that many images, evenly over the source."""
    return Subset(source, np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))

"""Some images of another source."""

import numpy as np

from dino_jax.data.sources import Example, Source


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

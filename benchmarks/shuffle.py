"""How well the order of a source with groups mixes: classes and groups in a batch, beside a full shuffle.

    python -m benchmarks.shuffle

1,000 classes of 1,300 records in the order of their classes, in groups of 100, 1,000 and 10,000: the worst case of
Parquet files. Counts over one epoch of batches of 256.
"""

import numpy as np

from dino_jax.data.order import shuffled
from dino_jax.data.sources.base import Source

CLASSES, EACH, BATCH = 1_000, 1_300, 256


class Sorted(Source):
    """Records in the order of their classes, in groups of `size`."""

    num_classes = CLASSES

    def __init__(self, size: int):
        self.groups = np.full(CLASSES * EACH // size, size) if size else None

    def __len__(self) -> int:
        return CLASSES * EACH


def distinct(values: np.ndarray) -> float:
    """Returns the mean number of different values in a batch: [batches, BATCH]."""
    return float(np.mean([len(np.unique(row)) for row in values]))


def main() -> None:
    """Prints a row per group size."""
    print("| records in a group | classes in a batch | groups in a batch |\n|---|---|---|")
    for size in (0, 100, 1_000, 10_000):
        order, batches = shuffled(Sorted(size), seed=0), CLASSES * EACH // BATCH
        records = np.array([order[i] for i in range(batches * BATCH)]).reshape(batches, BATCH)
        groups = f"{distinct(records // size):.1f}" if size else ""
        print(f"| {size or 'full shuffle'} | {distinct(records // EACH):.1f} | {groups} |", flush=True)


if __name__ == "__main__":
    main()

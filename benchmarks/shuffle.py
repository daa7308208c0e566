"""How well the order of a source with groups mixes: classes and groups in a batch, beside a full shuffle.

    python -m benchmarks.shuffle

1,000 classes of 1,300 images in the order of their classes, the worst case of Parquet files: images of 110 KB in groups
of 100, 1,000 and 10,000, and of 3 KB. Means over 300 batches of 256 of an epoch; `MB kept` is the memory of a reader.
"""

import numpy as np

from dino_jax.data.order import shuffled
from dino_jax.data.sources.base import Source
from dino_jax.data.sources.parquet import kept_groups

CLASSES, EACH, BATCH, BATCHES = 1_000, 1_300, 256, 300


class Sorted(Source):
    """Images of this number of bytes in the order of their classes, in groups of `size`, or without groups if 0."""

    num_classes = CLASSES

    def __init__(self, size: int, image: int):
        if size:
            self.groups = np.full(CLASSES * EACH // size, size)
            self.kept, self.window = kept_groups(self.groups * image, f"groups of {size}")

    def __len__(self) -> int:
        return CLASSES * EACH


def distinct(values: np.ndarray) -> float:
    """Returns the mean number of different values in a batch: [batches, BATCH]."""
    return float(np.mean([len(np.unique(row)) for row in values]))


def main() -> None:
    """Prints a row per size of images and of groups."""
    print(
        "| KB an image | images in a group | classes in a batch | groups in a batch | MB kept |\n|---|---|---|---|---|"
    )
    for image, size in ((110, 0), (110, 100), (110, 1_000), (110, 10_000), (3, 100), (3, 1_000)):
        source = Sorted(size, image * 1_000)
        order = shuffled(source, seed=0)
        firsts = np.linspace(0, len(source) - BATCH, BATCHES).astype(int)
        records = np.array([[order[int(first) + i] for i in range(BATCH)] for first in firsts])
        groups = f"{distinct(records // size):.1f}" if size else ""
        memory = f"{source.kept * size * image / 1_000:,.0f}" if size else ""
        row = (image, f"{size:,}" if size else "full shuffle", f"{distinct(records // EACH):.1f}", groups, memory)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()

"""The order in which training reads the images of a source: a pure function of seed and position in the stream.

Any record of most sources is cheap to read, and their order is a full shuffle. A source with `groups` reads one record
at the cost of all records of its group, so a full shuffle would read each group once for each of its records. Instead,
each epoch puts the groups in a random order, merges them into windows of as many groups as a reader keeps in memory,
and shuffles the records within each window: a reader reads each group once an epoch.
"""

import sys
from functools import partial

import grain
import numpy as np

from dino_jax.data.lru import LRU
from dino_jax.data.sources.base import Source


def shuffled(source: Source, seed: int) -> grain.MapDataset:
    """Returns record numbers without end: in each epoch all records once, in a new order."""
    if source.groups is None:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    return grain.MapDataset.source(_GroupedOrder(source.groups, source.window, seed))


def part_of_batches(stream: grain.MapDataset, batch_size: int, first: int, size: int) -> grain.MapDataset:
    """Divides a stream into batches, and returns the records `first` to `first + size` of each, int [size]."""
    return grain.MapDataset.source(_Part(stream, batch_size, first, size)).batch(size, drop_remainder=True)


class _Part:
    """A sequence of the records of a stream that are in a part of a batch."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, first: int, size: int):
        self.stream, self.batch_size, self.first, self.size = stream, batch_size, first, size

    def __len__(self) -> int:
        return len(self.stream) // self.batch_size * self.size

    def __getitem__(self, place: int) -> int:
        step, row = divmod(place, self.size)
        return int(self.stream[step * self.batch_size + self.first + row])


class _GroupedOrder:
    """A sequence of record numbers without end, for groups of these numbers of records, int [g], `window` at a time."""

    def __init__(self, groups: np.ndarray, window: int, seed: int):
        self.groups, self.window, self.seed = groups, window, seed
        self.records = int(groups.sum())
        # A batch may span two epochs or windows, and two threads may be at different batches.
        self._epochs, self._shuffled = LRU[tuple[list[np.ndarray], np.ndarray]](2), LRU[np.ndarray](4)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.records)
        windows, ends = self._epochs.get(epoch, partial(self._windows, epoch))
        number = int(np.searchsorted(ends, place, side="right"))
        records = self._shuffled.get((epoch, number), partial(self._records, epoch, number, windows[number]))
        return int(records[place - (int(ends[number]) - len(records))])

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Returns the groups of each window of an epoch, and the places in the epoch where the windows end."""
        groups = _permutation(len(self.groups), self.seed, epoch, 0)
        # Nearly equal numbers of groups: a last window of what is left over would be shuffled badly.
        windows = np.array_split(groups, -(-len(groups) // self.window))
        return windows, np.cumsum([self.groups[window].sum() for window in windows])

    def _records(self, epoch: int, number: int, window: np.ndarray) -> np.ndarray:
        """Returns the shuffled records of a window."""
        firsts = np.cumsum(self.groups) - self.groups
        records = np.concatenate([np.arange(firsts[group], firsts[group] + self.groups[group]) for group in window])
        return records[_permutation(len(records), self.seed, epoch, number + 1)]


def _permutation(n: int, *key: int) -> np.ndarray:
    """Returns a permutation of 0 .. n - 1 from raw random bits, which all versions of NumPy promise to keep."""
    return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(n), kind="stable")

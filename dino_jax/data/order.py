"""The order in which training reads the images of a source: a pure function of seed and position in the stream."""

from collections import OrderedDict

import grain
import numpy as np

from dino_jax.data.sources.base import WINDOW, Source

ENDLESS = 2**62


def shuffled(source: Source, seed: int) -> grain.MapDataset:
    """Returns record numbers without end: in each epoch all records once, in a new order.

    The order of a source without groups is a full shuffle. A source that reads records in groups gives its groups in
    random order; within windows of about `WINDOW` records, the records of all groups are shuffled.
    """
    if source.groups is None:
        return grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    return grain.MapDataset.source(_GroupedOrder(source.groups, seed))


class _GroupedOrder:
    """A sequence of record numbers for a source with groups, int [g]: the number of records in each, in order."""

    def __init__(self, groups: np.ndarray, seed: int):
        self.groups, self.seed = groups, seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, int(self.groups.sum()))
        order = self._epochs.get(epoch)
        if order is None:  # several threads may compute the same
            order = self._epochs[epoch] = self._order(epoch)
            while len(self._epochs) > 2:  # a batch may span two
                self._epochs.popitem(last=False)
        return int(order[place])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_epochs": OrderedDict()}

    def _order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        first = np.cumsum(self.groups) - self.groups
        order, window, size = [], [], 0
        for group in rng.permutation(len(self.groups)):
            window.append(np.arange(first[group], first[group] + self.groups[group]))
            size += int(self.groups[group])
            if size >= WINDOW:
                order.append(rng.permutation(np.concatenate(window)))
                window, size = [], 0
        return np.concatenate([*order, rng.permutation(np.concatenate(window))] if window else order)

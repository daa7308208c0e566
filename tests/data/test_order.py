"""The order of training: for sources without groups that of grain, for sources with groups one that respects them."""

import pickle

import grain
import numpy as np
import pytest

from dino_jax.data.order import shuffled
from dino_jax.data.sources import Source, Subset, open_source, spread


class Grouped(Source):
    """Records in groups of these sizes, without images."""

    num_classes = 0

    def __init__(self, *groups, window=4):
        self.groups, self.window = np.array(groups), window

    def __len__(self):
        return int(self.groups.sum())


def epochs_of(source, count, seed=3):
    order, n = shuffled(source, seed), len(source)
    return [[order[epoch * n + i] for i in range(n)] for epoch in range(count)]


def test_the_order_without_groups_is_that_of_grain():
    source = open_source("demo:test:3")
    ours, theirs = shuffled(source, 5), grain.MapDataset.range(len(source)).seed(5).shuffle().repeat()
    assert [ours[i] for i in range(90)] == [theirs[i] for i in range(90)]


def test_the_order_with_groups_never_changes():
    """A resumed run goes on in the order of an earlier version."""
    assert epochs_of(Grouped(3, 2, 4, 1, window=2), 2, seed=7) == [
        [7, 9, 5, 8, 6, 4, 2, 0, 3, 1],
        [4, 3, 9, 8, 0, 2, 6, 1, 7, 5],
    ]


def test_every_epoch_has_every_record_once_in_an_order_of_its_own():
    epochs = epochs_of(Grouped(*[7, 1, 0, 12] * 10), 3)
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs_of(Grouped(*[7, 1, 0, 12] * 10), 1, seed=4)[0] != epochs[0]


def test_no_earlier_position_is_needed():
    source = Grouped(*[5] * 30)
    epochs = epochs_of(source, 3)
    for position in (449, 300, 77, 301):  # each from a copy without memory
        assert pickle.loads(pickle.dumps(shuffled(source, 3)))[position] == epochs[position // 150][position % 150]


@pytest.mark.parametrize("groups", [8, 9, 11, 100])
def test_windows_have_nearly_equal_numbers_of_groups_and_no_more_than_a_reader_keeps(groups):
    [epoch] = epochs_of(Grouped(*[10] * groups), 1)
    count = -(-groups // 4)
    of_group = np.array(epoch) // 10
    sizes = [len(part) for part in np.array_split(np.arange(groups), count)]
    ends = 10 * np.cumsum(sizes)
    for size, end in zip(sizes, ends, strict=True):
        assert len(set(of_group[end - 10 * size : end])) == size <= 4
    assert min(sizes) >= max(sizes) - 1


def test_a_source_that_fits_in_memory_is_shuffled_in_full():
    [epoch] = epochs_of(Grouped(*[10] * 100, window=100), 1)
    mean = np.mean([len(set(np.array(epoch[k : k + 50]) // 10)) for k in range(0, 1_000, 50)])
    assert 37 < mean < 43  # 39.7 expected of a full shuffle


def test_a_part_of_a_source_keeps_its_groups():
    source = Grouped(4, 4, 4, window=3)
    assert (spread(source, 6).groups.tolist(), spread(source, 6).window) == ([2, 2, 2], 3)
    assert Subset(source, np.array([0, 1, 9])).groups.tolist() == [2, 1]
    assert Subset(source, np.array([9, 0])).groups is None  # not in the order of the groups
    assert Source.groups is None

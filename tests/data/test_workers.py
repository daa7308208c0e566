"""What happens to the stream of batches when something happens to the processes that make it."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import Example, Source, open_source
from dino_jax.errors import UserError

SETTINGS = {"batch_size": 2, "canvas_size": 8, "pixels": Pixels(1), "seed": 0}
AHEAD = 20  # more batches than are ready before they are asked for


class Numbered(Source):
    """A hundred images; image i is filled with the value i."""

    num_classes = 0

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return Example(np.full((8, 8, 1), i, np.uint8), -1)

    def name(self, i):
        return f"image {i}"


@pytest.fixture
def stream():
    """Batches of two workers, both at work, that give up after two seconds without a batch; and their processes."""
    others = set(multiprocessing.active_children())
    with train_batches(Numbered(), **SETTINGS, workers=2, stall_timeout=30) as batches:
        for _ in range(4):
            next(batches)
        batches._stall_timeout = 2  # now that the processes, slow to start, are there
        yield batches, sorted(set(multiprocessing.active_children()) - others, key=lambda worker: worker.pid)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (signal.SIGSTOP, r"no batch of images for 2 s from the data workers .*{pid} \(stopped\).*data.stall_timeout"),
        (signal.SIGKILL, r"data worker {pid} \(killed by SIGKILL\) is gone: .* data.workers"),
    ],
)
def test_a_lost_worker_ends_the_stream_and_is_named(stream, sent, message):
    batches, workers = stream
    os.kill(workers[0].pid, sent)
    with pytest.raises(UserError, match=message.format(pid=workers[0].pid)):
        list(islice(batches, AHEAD))
    assert not any(worker.is_alive() for worker in workers)
    assert list(batches) == []


def test_workers_leave_signals_to_the_trainer(stream):
    """Ctrl-C and schedulers send them to all processes of a job; the trainer may want more batches before it saves."""
    batches, workers = stream
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    got = [batch.index for batch in islice(batches, AHEAD)]
    with train_batches(Numbered(), **SETTINGS, start_step=4) as expected:
        np.testing.assert_array_equal(got, [batch.index for batch in islice(expected, AHEAD)])


def test_threads_that_read_are_given_up_as_well():
    free = threading.Event()

    class Hanging(Numbered):
        def __getitem__(self, i):
            free.wait()
            return super().__getitem__(i)

    try:
        with (
            train_batches(Hanging(), **SETTINGS, stall_timeout=0.5) as batches,
            pytest.raises(UserError, match="no batch of images for 0.5 s from the threads that read"),
        ):
            next(batches)
    finally:
        free.set()


PARENT = """
import multiprocessing, sys, time
from dino_jax.data.pipeline import train_batches
from dino_jax.data.pixels import Pixels
from dino_jax.data.sources import open_source

if __name__ == "__main__":
    settings = {"batch_size": 2, "canvas_size": 8, "pixels": Pixels(1), "seed": 0}
    with train_batches(open_source("demo:test:1"), workers=2, **settings) as batches:
        for _ in range(4):
            next(batches)
        print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
        time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_die_with_the_trainer(tmp_path):
    """Also one that is stopped."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        workers = [Path("/proc") / pid for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        assert all(_lives(worker) for worker in workers)
        os.kill(int(workers[0].name), signal.SIGSTOP)
        parent.kill()
    deadline = time.monotonic() + 30
    while any(_lives(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_lives(worker) for worker in workers)


def _lives(process):
    """Not a zombie either: in a container nobody may ask for a dead orphan's exit code."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow(workers):
    """Less than 1 MB in 1,000 batches, in the trainer and in each worker."""

    def megabytes():
        gc.collect()
        pids = ["self", *(worker.pid for worker in multiprocessing.active_children())]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return np.array(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with train_batches(open_source("demo:test"), **SETTINGS, workers=workers) as batches:
        for _ in range(1_000):
            next(batches)
        before = megabytes()
        for _ in range(9_000):
            next(batches)
        assert len(before) == 1 + workers
        assert np.all(megabytes() - before < 9)

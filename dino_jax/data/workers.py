"""Worker processes that prefetch batches. A stall or a dead worker is an error, and workers end with the trainer."""

import contextlib
import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import grain
from absl import flags

from dino_jax.errors import UserError

# Seconds of waiting at a time: a signal that arrives just before the wait is handled after it.
PIECE = 0.5
READER_THREADS = 2  # without workers: each makes one batch at a time, so at most 2 are prefetched
STALL_TIMEOUT = 600.0  # seconds; longer than a network disk is usually unavailable
PARENT_CHECK = 1.0  # seconds between a worker's checks that the trainer is alive
GRACE = 5.0  # seconds for grain's next() to return, with a batch or because its workers are gone
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>: sets the signal that a process gets when its parent ends
WORKER_DIED = "Worker process was terminated"  # text of grain's RuntimeError
STATES = {"T": "stopped", "t": "stopped", "R": "running", "S": "asleep", "D": "waiting for a disk", "Z": "dead"}

T = TypeVar("T")
Answer = queue.SimpleQueue[tuple[Any, Exception | None]]


class Batches(Generic[T]):
    """An iterator over batches. It owns worker processes, which start at once: close it, or use it in a `with` block.

    Raises: UserError while iterating, if a worker was killed or no batch came for `stall_timeout` seconds (0: waits
        forever). The message lists the workers; the remaining ones are killed.
    """

    def __init__(self, batches: Iterable[T], workers: int = 0, stall_timeout: float = STALL_TIMEOUT):
        self._others = set(multiprocessing.active_children())
        self._workers: set[BaseProcess] = set()
        self._batches: Iterator[T] = iter(batches)
        self._count = workers
        self._stall_timeout = stall_timeout
        self._asked: Answer | None = self._ask()  # receives the next batch

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        answer = self._asked = self._asked or self._ask()  # a signal may interrupt the wait; the next call continues it
        batch, error = None, None
        since, stalled = time.monotonic(), False
        while not stalled:
            try:
                batch, error = answer.get(timeout=PIECE)
                break
            except queue.Empty:
                stalled = 0 < self._stall_timeout <= time.monotonic() - since
        self._asked = None
        if len(self._workers) < self._count:  # grain starts them with the first batches and does not expose them
            self._workers |= set(multiprocessing.active_children()) - self._others
        if stalled:
            message = self._stalled()
            self._give_up(answer)
            raise UserError(message)
        if isinstance(error, RuntimeError) and WORKER_DIED in str(error):
            message = self._died()
            self.close()
            raise UserError(message) from error
        if error is not None:
            raise error
        self._asked = self._ask()  # fetch the next batch while the caller runs a step
        return cast(T, batch)

    def _ask(self) -> Answer:
        # Grain's next() cannot be interrupted, so a thread calls it.
        answer: Answer = queue.SimpleQueue()
        threading.Thread(target=_fetch, args=(self._batches, answer), daemon=True).start()
        return answer

    def close(self) -> None:
        """Stops the workers and ends the iterator. Waits up to GRACE for a batch that is being fetched."""
        if self._asked is not None:
            with contextlib.suppress(queue.Empty):
                self._asked.get(timeout=GRACE)  # do not close grain during a next() that is about to return
            self._asked = None
        if isinstance(self._batches, grain.DatasetIterator):
            self._batches.close()
        self._batches = iter(())  # a grain iterator that is alive at exit prints an error

    def __enter__(self) -> "Batches[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _stalled(self) -> str:
        states = sorted(f"{worker.pid} ({_state(worker)})" for worker in self._workers)
        whom = f"the data workers {', '.join(states)}" if states else "the threads that read"
        return (
            f"no batch of images for {self._stall_timeout:g} s from {whom}: see whether the disk or network of "
            "data.source answers, and start again, or raise data.stall_timeout"
        )

    def _died(self) -> str:
        dead = sorted(f"{worker.pid} ({_state(worker)})" for worker in self._workers if worker.exitcode)
        whom = f"the data worker {', '.join(dead)}" if dead else "a data worker"  # it died before it was recorded
        return (
            f"{whom} is gone: where nobody ended it, this machine had no memory left, and a smaller "
            "data.workers helps; start again"
        )

    def _give_up(self, answer: Answer) -> None:
        """Closes without waiting for workers that hang; grain would wait 25 s for each."""
        for worker in self._workers:
            worker.kill()  # a stopped process handles no other signal
        if self._workers:
            with contextlib.suppress(queue.Empty):
                answer.get(timeout=GRACE)  # grain's next() notices
                self.close()
        self._batches = iter(())


def _fetch(batches: Iterator[T], answer: Answer) -> None:
    time.sleep(0)  # let the caller start its step first
    try:
        answer.put((next(batches), None))
    except Exception as error:
        answer.put((None, error))


def _state(worker: BaseProcess) -> str:
    """Returns what a process is doing, as far as the system reports it."""
    code = worker.exitcode
    if code is not None:
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    try:
        status = Path(f"/proc/{worker.pid}/stat").read_text()
    except OSError:
        return "alive"
    return STATES.get(status.rpartition(")")[2].split()[0], "alive")


def iterate(elements: grain.MapDataset, workers: int, stall_timeout: float = STALL_TIMEOUT) -> Batches[Any]:
    """Iterates over a dataset in order, prefetching in `workers` processes, or in threads if 0. See `Batches`."""
    if workers < 0:
        raise UserError(f"data.workers {workers} is negative: set it to 0 or more")
    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, which only app.run parses
    # Grain's defaults (16 threads, 500 prefetched elements) are for single records; here an element is a batch.
    threads = 1 if workers else READER_THREADS
    read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    options = grain.MultiprocessingOptions(num_workers=workers)
    start = partial(_start_worker, parent=os.getpid())
    ahead = elements.to_iter_dataset(read_options).mp_prefetch(options, worker_init_fn=start)
    return Batches(ahead, workers, stall_timeout)


def _start_worker(worker: int, workers: int, parent: int) -> None:
    """Initializes a worker: it ends when the trainer ends, for whatever reason, and not earlier.

    Workers ignore the signals that a terminal or a scheduler sends to all processes of a job, because the trainer must
    save first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if sys.platform == "linux":
        # Wakes a stopped worker, so that it can check. SIGKILL would be wrong, because the signal also comes when only
        # the thread that started the worker ends.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK)
    os._exit(1)

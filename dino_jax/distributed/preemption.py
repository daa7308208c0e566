"""Preemption: after SIGTERM or Ctrl-C the run saves, then exits with code 75, by which a scheduler restarts it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dino_jax.distributed.watchdog import end
from dino_jax.errors import Stopped


class Interrupted(BaseException):  # not an Exception, so that no library handles it
    """The signal arrived in a block that may be left at any point."""


class StopSignal:
    """Within its block a first SIGTERM or Ctrl-C asks the run to stop; a second one ends the process at once.

    If the run has not ended `grace` seconds later (during a compilation, or on a stalled disk) the process exits with
    `Stopped.exit_code`, and its last checkpoint counts.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, grace: float):
        self._grace = grace

    def __enter__(self) -> "StopSignal":
        self._received = self._interruptible = False
        self._done = threading.Event()
        # Python runs handlers between two lines of the main thread, which may be inside a compiler for minutes; the
        # number of the signal arrives through this pipe at once.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        self._watch = threading.Thread(target=self._exit_in_time, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._done.set()
        os.close(self._write)  # ends the watch
        self._watch.join()
        os.close(self._read)

    def requested(self, agree: bool) -> bool:
        """Whether to stop now. Several processes decide together, in the steps for which all pass `agree`."""
        if jax.process_count() == 1:
            return self._received
        return agree and bool(multihost_utils.process_allgather(np.int32(self._received)).any())

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which the signal raises Interrupted: one that waits, or whose work is cheap to repeat.

        With several processes none may leave the others alone, so the signal waits for `requested`.
        """
        self._interruptible = jax.process_count() == 1
        try:
            if self._received and self._interruptible:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
        signal.signal(number, self._previous[signal.Signals(number)])
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _exit_in_time(self) -> None:
        while (number := os.read(self._read, 1)) and number[0] not in self.SIGNALS:
            pass
        if number and not self._done.wait(self._grace):
            seconds = f"{self._grace:g} s"
            end(Stopped.exit_code, f"stopped by a signal, cut off after {seconds}: the same command resumes")

"""Preemption: after SIGTERM or Ctrl-C the run saves, then exits with code 75, by which a scheduler restarts it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from dino_jax.distributed.watchdog import end, key_value_store
from dino_jax.errors import Stopped

CUT_OFF = 76  # exit code: a signal asked the run to stop, and it could not save in time
POLL = 0.5  # seconds between looks at what other processes have heard


class Interrupted(BaseException):  # not an Exception, so that no library handles it
    """The signal arrived in a block that may be left at any point."""


class StopSignal:
    """Within its block a first SIGTERM or Ctrl-C asks the run to stop; a second one ends the process at once.

    If the run has not ended `grace` seconds later (during a compilation, or on a stalled disk) the process exits with
    code `CUT_OFF`, and its last checkpoint counts. Once `saved` has been called, it exits with the code of `Stopped`.

    Several processes stop after the same step, whichever of them received the signal, see `Agreement`.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, grace: float):
        self._grace = grace

    def __enter__(self) -> "StopSignal":
        self._received = self._interruptible = self._saved = False
        self._agreement = Agreement(lambda: self._received) if jax.process_count() > 1 else None
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
        if self._agreement:
            self._agreement.close()
        os.close(self._write)  # ends the watch
        self._watch.join()
        os.close(self._read)

    def requested(self, done: int) -> bool:
        """Whether to stop after `done` steps. Call it before each step; the same answer on all processes."""
        return self._agreement.stops_after(done) if self._agreement else self._received

    def saved(self) -> None:
        """Notes that the run is on disk, so that a reader which delays the end afterwards costs nothing."""
        self._saved = True

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
        self._received = bool(number)  # also while the main thread waits for devices, where Python runs no handler
        if not number or self._done.wait(self._grace):
            return
        if self._saved:
            end(Stopped.exit_code, f"the readers did not end in {self._grace:g} s: ended without them")
        else:
            end(
                CUT_OFF,
                f"stopped by a signal, cut off after {self._grace:g} s before it could save: the same command resumes "
                "from the last checkpoint; --config.checkpoint.stop_within gives it more time",
            )


class Agreement:
    """Processes agree on the step to stop after, through the key-value store of JAX's coordinator.

    A process that hears of a signal, its own or another's, announces the step that it has begun, and begins no other
    one until all have announced theirs. All then go on to the latest of them. It costs a step nothing, because a thread
    asks the coordinator; and it takes about a second, whatever a step takes.
    """

    _uses = 0  # the store keeps its keys as long as the processes run

    def __init__(self, received: Callable[[], bool]):
        Agreement._uses += 1
        self._prefix = f"dino_jax/stop/{Agreement._uses}/"
        self._received, self._client = received, key_value_store()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._begun, self._heard, self._last = 0, False, 0
        self._agreed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="agreement to stop", daemon=True)
        self._thread.start()

    def stops_after(self, done: int) -> bool:
        """Whether `done` is the step to stop after. Waits for the other processes once a signal is known."""
        with self._lock:
            if not self._heard:
                self._begun = done + 1
                return False
        while not self._agreed.wait(POLL):  # in pieces, so that Python handles a second signal
            pass
        return done >= self._last

    def close(self) -> None:
        """Stops the thread."""
        self._closed.set()
        self._thread.join(POLL)

    def _talk(self) -> None:
        while not self._closed.wait(POLL):
            try:
                announced = dict(self._client.key_value_dir_get(self._prefix))
                if (announced or self._received()) and not self._heard:
                    with self._lock:
                        self._heard = True
                    self._client.key_value_set(f"{self._prefix}{jax.process_index()}", str(self._begun))
                elif len(announced) == jax.process_count():
                    self._last = max(map(int, announced.values()))
                    self._agreed.set()
                    return
            except jax.errors.JaxRuntimeError:  # the coordinator does not answer: the watchdog ends the run
                continue

"""Watchdog: ends the process, with a one-line error, when a phase of the run or another process hangs.

A step that never finishes, a reader that is stuck or a dead host raise no error, and would occupy the devices until
somebody notices. A thread watches for them instead. Exit codes: `HUNG` if this process makes no progress (the stacks of
all its threads go to stderr), `PEER_LOST` if another process does not respond. docs/faults.md gives an overview.
"""

import faulthandler
import multiprocessing
import os
import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax

from dino_jax.errors import UserError
from dino_jax.progress import unless_done

HUNG = 70
PEER_LOST = 71
QUICK = ("data", "step")  # phases that are as short as a step, except for the first time, which compiles
KEYS = "dino_jax/alive/"
STDERR = 2
SIGNS_EVERY = 2.0  # longest time between signs of life, seconds
NAMED = 8  # processes that a message lists


class Beat(NamedTuple):
    """The last reported phase of the run."""

    phase: str
    step: int
    limit: float  # seconds it may take


class Watchdog:
    """Context manager that runs the watching thread. The run calls `beat(phase, step)` when a phase begins.

    limits: config.watchdog. `seconds` limits the phases `data` and `step`. `slow_seconds` limits all other phases, and
    the first occurrence of these two. `seconds` = 0 disables both limits.
    heartbeat: config.distributed.heartbeat, the seconds without a sign of life after which a process counts as lost.

    Time is counted in ticks of the thread itself, so time in which the process is suspended (Ctrl-Z) does not count.
    """

    def __init__(self, limits: Any, heartbeat: float) -> None:
        self._limits, self._heartbeat = limits, heartbeat
        self._begun: set[str] = set()
        self._peers = Peers(heartbeat) if jax.process_count() > 1 else None
        shortest = min([limits.seconds] * bool(limits.seconds) + [heartbeat])
        self._tick = min(1.0, shortest / 10)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.beat("start", 0)

    def beat(self, phase: str, step: int) -> None:
        """Reports that the run begins this phase of this step. Messages show the phase to the user."""
        limit = self._limits.seconds if phase in QUICK and phase in self._begun else self._limits.slow_seconds
        self._begun.add(phase)
        self._last = Beat(phase, step, limit)
        if self._peers:
            self._peers.say(f"at step {step:,} ({phase})")

    def __enter__(self) -> "Watchdog":
        if self._peers:
            self._peers.start()
        if self._peers or self._limits.seconds:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: object, traceback: object) -> None:
        if self._peers and isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely a collective failed because a process is lost. The thread soon finds out which one, and ends
            # this process.
            self._thread.join(2 * self._heartbeat)
        self._stop.set()
        if self._peers:
            self._peers.leave(None if error is None else " ".join(f"{kind.__name__}: {error}".split()))

    def _watch(self) -> None:
        last, silent = self._last, 0.0
        while not self._stop.wait(self._tick):
            last, silent = self._last, (silent + self._tick if self._last is last else 0.0)
            if self._limits.seconds and silent > last.limit:
                knob = "seconds" if last.limit == self._limits.seconds else "slow_seconds"
                end(
                    HUNG,
                    f"error: step {last.step:,} made no progress for {last.limit:g} s in its phase `{last.phase}`, on "
                    f"process {jax.process_index()}{self._peers.others() if self._peers else ''}: the stacks of all "
                    f"threads follow; if the phase is only slow, raise --config.watchdog.{knob}",
                    stacks=True,
                )
            if self._peers and (cause := self._peers.lost(self._tick)):
                end(PEER_LOST, f"error: {cause}; the same command resumes from the last checkpoint")


class Peers:
    """Exchanges signs of life between all processes, through the key-value store of JAX's coordinator (process 0).

    JAX has its own heartbeats, but aborts with pages of text that do not state which process was lost in which phase.
    Calls to the coordinator may block forever, so a separate thread makes them; `lost` only reads its results.
    """

    def __init__(self, heartbeat: float):
        self._heartbeat = heartbeat
        self._client = key_value_store()
        self._status = ""
        self._statuses: dict[str, str] = {}  # key of each process -> its number of signs and its status
        self._answers = 0
        self._silent: dict[str, tuple[object, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="signs of life", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def say(self, where: str) -> None:
        """Sets the status that this process sends from now on."""
        self._status = where

    def leave(self, reason: str | None) -> None:
        """Sends the final status and stops. reason: None after success, else the error. Waits at most one heartbeat."""
        self._status = "done" if reason is None else f"gave up, {self._status}: {reason}"
        self._stop.set()
        self._thread.join(self._heartbeat)

    def lost(self, tick: float) -> str:
        """Describes a process that has been silent for a heartbeat, or returns "". Call it every `tick` seconds."""
        if self._silence("coordinator", self._answers, tick) > self._heartbeat:
            return f"process 0, the coordinator, has not responded for {self._heartbeat:g} s: check its host"
        for key, sign in self._statuses.items():
            if self._silence(key, sign, tick) > self._heartbeat:
                process, status = key.rpartition("/")[-1], sign.partition(" ")[-1]
                if status.startswith("gave up"):
                    return f"process {process} {status}"
                if status != "done":
                    return f"process {process} has been silent for {self._heartbeat:g} s, last heard from {status}"
        return ""

    def others(self) -> str:
        """Returns the last status of the other processes, to append to a message. It shows which one is slower."""
        statuses = {key.rpartition("/")[-1]: sign.partition(" ")[-1] for key, sign in self._statuses.items()}
        statuses.pop(str(jax.process_index()), None)
        return "".join(f", process {process} {status}" for process, status in list(statuses.items())[:NAMED])

    def _silence(self, who: str, sign: object, tick: float) -> float:
        before, seconds = self._silent.get(who, (None, 0.0))
        self._silent[who] = sign, (seconds + tick if sign == before else 0.0)
        return self._silent[who][1]

    def _talk(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(min(self._heartbeat / 10, SIGNS_EVERY))
            try:
                sign = f"{self._answers} {self._status}"
                self._client.key_value_set(KEYS + str(jax.process_index()), sign, allow_overwrite=True)
                self._statuses = dict(self._client.key_value_dir_get(KEYS))
                self._answers += 1
            except jax.errors.JaxRuntimeError:  # no answer: `lost` counts the seconds
                continue


def key_value_store() -> Any:
    """Returns the client of the coordinator's key-value store, which is not part of JAX's public API.

    Raises UserError if this version of JAX has no such attribute.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__} has no jax._src.distributed.global_state.client, which is needed to detect lost "
            "processes: pip install 'jax==0.10.2', or start a single process"
        ) from error


def deadline(seconds: float, message: str) -> AbstractContextManager[None]:
    """Ends this process with exit code `PEER_LOST` and a message if the block takes longer than `seconds`."""
    return unless_done(seconds, end, PEER_LOST, f"error: {message}")


def end(code: int, message: str, stacks: bool = False) -> None:
    """Ends this process immediately, regardless of its threads, and kills its workers, which would outlive it."""
    os.write(STDERR, f"{message}\n".encode())  # not through sys.stderr, because a hanging thread may hold its lock
    if stacks:
        faulthandler.dump_traceback(STDERR, all_threads=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)

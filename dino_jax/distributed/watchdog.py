"""Ends a run that hangs, or that waits for a process that is no more, and says in one line which and where.

A step that never ends, a reader that is stuck, a dead host: nothing of that raises, and the devices are paid for until
somebody looks. Here a thread looks. Exit codes: `HUNG` after a silence of this process (the stacks of all its threads
are on stderr), `PEER_LOST` after one of another. docs/faults.md has the whole picture.
"""

import faulthandler
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from dino_jax.errors import UserError

HUNG = 70
PEER_LOST = 71
QUICK = ("data", "step")  # phases that take no longer than a step does, but for their first time, which compiles
KEYS = "dino_jax/alive/"
STDERR = 2
SIGNS_EVERY = 2.0  # seconds, or more often
NAMED = 8  # processes that a message lists


class Beat(NamedTuple):
    """What the run was about to do when last heard of."""

    phase: str
    step: int
    limit: float  # seconds it may take


class Watchdog:
    """The thread that looks, from `with` to its end. `beat(phase, step)` tells it what begins now.

    limits: config.watchdog. `seconds` is the limit of the phases `data` and `step`, `slow_seconds` that of all others
    and of the first time of these two; `seconds` of 0 switches the limits off.
    heartbeat: config.distributed.heartbeat, seconds; how long another process may give no sign of life.

    A silence is counted in ticks of the thread itself: a run that is suspended (Ctrl-Z) is suspended with it.
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
        """The run is alive, and begins this phase (a word for the user) of this step."""
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
            # A collective that broke off, most likely: the thread soon knows who is lost, and ends this process.
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
                    f"error: step {last.step:,} has been silent for {last.limit:g} s in its phase `{last.phase}`, on "
                    f"process {jax.process_index()}{self._peers.others() if self._peers else ''}: where each thread "
                    f"stands follows; if that is no fault, raise --config.watchdog.{knob}",
                    stacks=True,
                )
            if self._peers and (cause := self._peers.lost(self._tick)):
                end(PEER_LOST, f"error: {cause}; the same command resumes after the last checkpoint")


class Peers:
    """Signs of life of all processes, through the key-value store of JAX's coordinator (process 0).

    JAX has heartbeats of its own, but aborts with pages that do not say who was where. Talking to the coordinator may
    block for ever, so a thread of its own does; `lost` only looks at what that brought home.
    """

    def __init__(self, heartbeat: float):
        self._heartbeat = heartbeat
        self._client = key_value_store()
        self._said = ""
        self._heard: dict[str, str] = {}  # key of each process -> its number of signs and what it said
        self._answers = 0
        self._silent: dict[str, tuple[object, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="signs of life", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def say(self, where: str) -> None:
        """What the others are told from now on."""
        self._said = where

    def leave(self, reason: str | None) -> None:
        """The last words: None where all is well, else why this process ends. Waits a heartbeat at most."""
        self._said = "done" if reason is None else f"gave up, {self._said}: {reason}"
        self._stop.set()
        self._thread.join(self._heartbeat)

    def lost(self, tick: float) -> str:
        """Who has been silent for a heartbeat, as a sentence, or nothing. To be asked every `tick` seconds."""
        if self._silence("coordinator", self._answers, tick) > self._heartbeat:
            return f"process 0, which coordinates, has not answered for {self._heartbeat:g} s: is its host alive?"
        for key, heard in self._heard.items():
            if self._silence(key, heard, tick) > self._heartbeat:
                process, said = key.rpartition("/")[-1], heard.partition(" ")[-1]
                if said.startswith("gave up"):
                    return f"process {process} {said}"
                if said != "done":
                    return f"process {process} has been silent for {self._heartbeat:g} s, last heard of {said}"
        return ""

    def others(self) -> str:
        """What the other processes said last, to follow a sentence: who waits for a slower one learns for whom."""
        said = {key.rpartition("/")[-1]: heard.partition(" ")[-1] for key, heard in self._heard.items()}
        said.pop(str(jax.process_index()), None)
        return "".join(f", process {process} {where}" for process, where in list(said.items())[:NAMED])

    def _silence(self, who: str, sign: object, tick: float) -> float:
        before, seconds = self._silent.get(who, (None, 0.0))
        self._silent[who] = sign, (seconds + tick if sign == before else 0.0)
        return self._silent[who][1]

    def _talk(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(min(self._heartbeat / 10, SIGNS_EVERY))
            try:
                sign = f"{self._answers} {self._said}"
                self._client.key_value_set(KEYS + str(jax.process_index()), sign, allow_overwrite=True)
                self._heard = dict(self._client.key_value_dir_get(KEYS))
                self._answers += 1
            except jax.errors.JaxRuntimeError:  # no answer: `lost` counts the seconds
                continue


def key_value_store() -> Any:
    """Returns the client of the coordinator's key-value store, which is not part of JAX's public API.

    Raises: UserError if this version of JAX keeps it elsewhere.
    """
    try:
        from jax._src import distributed

        return distributed.global_state.client
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"jax {jax.__version__} has no jax._src.distributed.global_state.client, through which the processes of a "
            "run find lost ones: pip install 'jax==0.10.2', or start a single process"
        ) from error


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Ends this process with the code `PEER_LOST` and a line, unless what is inside is done in so many seconds."""
    timer = threading.Timer(seconds, end, (PEER_LOST, f"error: {message}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end(code: int, message: str, stacks: bool = False) -> None:
    """Ends this process now, whatever its threads are at, and its workers with it, which would live on."""
    os.write(STDERR, f"{message}\n".encode())  # not through sys.stderr: who hangs may hold its lock
    if stacks:
        faulthandler.dump_traceback(STDERR, all_threads=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)

"""One writer for each folder, wherever it is: `owned` for a local one, a lease for one in an object store.

A store has no locks that end with their process. The owner therefore writes the object `.owner` again and again. An
owner that has been silent for EXPIRES seconds is gone.
"""

import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dino_jax.errors import UserError
from dino_jax.ownership import LOCK, owned
from dino_jax.storage import Store, is_remote

BEAT = 10.0  # seconds between two signs of life
EXPIRES = 60.0  # seconds without one after which the owner counts as gone
SETTLES = 1.0  # seconds after which a new owner looks whether it is the only one


@contextmanager
def exclusive(folder: str | Path, knob: str) -> Iterator[Callable[[], None]]:
    """Owns a folder during the block, and yields a function that raises UserError if this process owns it no longer.

    Raises UserError if another process owns it, or it cannot be written. knob: the flag that names the folder.
    """
    if not is_remote(folder):
        with owned(folder, knob):
            yield lambda: None
        return
    lease = Lease(Store(str(folder)), knob)
    lease.acquire()
    try:
        yield lease.require
    finally:
        lease.release()


class Lease:
    """The object `.owner`. Two processes that take over the same silent lease at once notice within a beat.

    A process that was suspended for longer than EXPIRES may write a few objects before it notices that it has lost the
    lease. Manifests detect a checkpoint that two processes have mixed up.
    """

    def __init__(self, store: Store, knob: str):
        self._store, self._knob = store, knob
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._owner = {"host": platform.node(), "pid": os.getpid(), "machine": _machine(), "since": since}
        self._owner |= {"id": secrets.token_hex(8)}
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self) -> None:
        """Becomes the owner, after a silent one has expired. Raises UserError if the owner shows a sign of life."""
        # The first look is for stores that create an object although there is one.
        while self._store.read(LOCK) or not self._store.create(LOCK, self._sign(0)) or self._is_anothers():
            self._take_over()
        self._thread.start()

    def require(self) -> None:
        """Raises UserError if the lease is lost."""
        if self._lost:
            raise UserError(self._lost)

    def release(self) -> None:
        """Ends the lease, so that the next process need not wait."""
        self._stop.set()
        self._thread.join()
        with suppress(UserError):
            if not self._lost and _parse(self._store.read(LOCK)).get("id") == self._owner["id"]:
                self._store.remove([LOCK])

    def _is_anothers(self) -> bool:
        """Returns whether another process has written the object at the same time, in a store that does not check."""
        time.sleep(SETTLES)
        return _parse(self._store.read(LOCK)).get("id") != self._owner["id"]

    def _take_over(self) -> None:
        """Removes the object of an owner that is gone. Raises UserError if it is not."""
        seen, began = self._store.read(LOCK), time.monotonic()
        owner = _parse(seen)
        name = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since {owner.get('since', '?')}"
        if not _is_dead(owner):
            waiting = f"waiting up to {EXPIRES:.0f} s for a sign of life"
            print(f"{self._store.url} belongs to {name}: {waiting}", file=sys.stderr, flush=True)
            while time.monotonic() - began < EXPIRES:
                time.sleep(BEAT / 4)
                asked = time.monotonic()
                now = self._store.read(LOCK)
                if time.monotonic() - asked > BEAT:  # the store was away, for the owner too
                    began = time.monotonic()
                if now is None:
                    return
                if now != seen:
                    raise UserError(
                        f"{self._store.url} is in use by {name}: wait until it ends, or give another {self._knob}"
                    )
        if self._store.read(LOCK) == seen:
            self._store.remove([LOCK])

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(BEAT):
            try:
                if _parse(self._store.read(LOCK)).get("id") != self._owner["id"]:
                    self._lost = f"{self._store.url} now belongs to another process: this one writes no more there"
                else:
                    self._store.write(LOCK, self._sign(beats := beats + 1))
            except UserError as error:
                self._lost = str(error)
            if self._lost:
                print(self._lost, file=sys.stderr, flush=True)
                return

    def _sign(self, beats: int) -> bytes:
        return json.dumps(self._owner | {"beats": beats}).encode()


def _parse(data: bytes | None) -> dict[str, Any]:
    with suppress(ValueError):
        owner = json.loads(data or b"")
        return owner if isinstance(owner, dict) else {}
    return {}


def _machine() -> str:
    """Returns what processes share that see each other's process numbers; "" where the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(owner: dict[str, Any]) -> bool:
    """Returns whether the owner was a process of this machine that has ended. Of others it cannot be known."""
    if not _machine() or owner.get("machine") != _machine() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

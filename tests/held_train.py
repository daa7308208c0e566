"""train.py that prints each phase as it begins, and stands still where a test wants it.

HOLD=MODULE:FUNCTION:CALL names the place, before that call of the function (1 is the first) and every later one. There
the process makes the file $REACHED and waits until $RELEASED exists; an exception from a signal handler ends the wait.
Without $RELEASED it waits in C, as a compiler works, where Python runs no signal handler. DEMO_EPOCHS=1 ends the demo's
images: a second reading of the same image never returns.
"""

import ctypes
import importlib
import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dino_jax.commands.cli import run
from dino_jax.data.sources.demo import DemoSource
from dino_jax.distributed.watchdog import Watchdog


def wait_in_c():
    """Locks a mutex twice."""
    mutex = ctypes.create_string_buffer(256)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def hold(place):
    """Patches the function."""
    module, function, first = place.split(":")
    owner = importlib.import_module(module)
    *path, name = function.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def held(*args, **kwargs):
        if next(calls) >= int(first):
            Path(os.environ["REACHED"]).touch()
            if "RELEASED" not in os.environ:
                wait_in_c()
            while not Path(os.environ["RELEASED"]).exists():
                time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(owner, name, held)


def end_images_after_an_epoch():
    """Patches the demo's source."""
    read, seen = DemoSource.__getitem__, set()

    def read_once(self, i):
        while i in seen:
            time.sleep(1)
        seen.add(i)
        return read(self, i)

    DemoSource.__getitem__ = read_once


def tell_phases():
    """Patches the watchdog, which hears of each phase."""
    beat = Watchdog.beat

    def told(self, phase, step):
        print(f"phase {phase} {step}", flush=True)
        beat(self, phase, step)

    Watchdog.beat = told


if "HOLD" in os.environ:
    hold(os.environ["HOLD"])
if "DEMO_EPOCHS" in os.environ:
    end_images_after_an_epoch()
tell_phases()

if __name__ == "__main__":
    run("train", sys.argv[1:])

"""Progress reporting for long work."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T],
    total: int,
    what: str,
    unit: str = "images",
    size: Callable[[T], int] = lambda item: 1,
    every: float = 10.0,
) -> Iterator[T]:
    """Yields the items and prints progress, rate and remaining time to stderr.

    Args:
        items: the work.
        total: number of units in all items, 0 if unknown.
        what: name of the work, at the start of each line.
        unit: name of the units.
        size: number of units in an item.
        every: seconds between lines.
    """
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last >= every:
            last, rate = now, done / (now - start)
            of, left = (f" of {total:,}", f", {max(total - done, 0) / rate:,.0f} s left") if total else ("", "")
            print(f"{what}: {done:,}{of} {unit}, {rate:,.1f} {unit}/s{left}", file=sys.stderr)


@contextmanager
def unless_done(seconds: float, act: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Calls `act` in a thread of its own if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, act, arguments)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

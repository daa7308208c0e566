"""How far long work is, for who waits."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T],
    total: int,
    what: str,
    unit: str = "images",
    size: Callable[[T], int] = lambda item: 1,
    every: float = 10.0,
) -> Iterator[T]:
    """Passes items on and says on stderr how far, how fast and how long still.

    Args:
        items: what is worked through.
        total: units in all; 0 where that is unknown.
        what: to call the items.
        unit: of which an item holds `size(item)`.
        size: see unit.
        every: seconds from line to line.
    """
    start = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - said >= every:
            said, rate = now, done / (now - start)
            of, left = (f" of {total:,}", f", {max(total - done, 0) / rate:,.0f} s left") if total else ("", "")
            print(f"{what}: {done:,}{of} {unit}, {rate:,.1f} {unit}/s{left}", file=sys.stderr)

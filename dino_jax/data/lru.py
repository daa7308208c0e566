"""A cache of the values that were used last."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LRU(Generic[T]):
    """The `size` values that were used last. Threads may share it; its copy in another process begins empty."""

    def __init__(self, size: int):
        self.size = size
        self._values: OrderedDict[Any, T] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["LRU[T]"], tuple[int]]:
        return LRU, (self.size,)

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """Returns the value of a key; `make` makes one that is missing, for which other threads wait."""
        with self._lock:
            if key not in self._values:
                value = make()
                if len(self._values) >= self.size:
                    self._values.popitem(last=False)
                self._values[key] = value
            self._values.move_to_end(key)
            return self._values[key]

"""The training rate, and how much of the time the devices wait for data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Rate:
    """Images, seconds, and seconds lost waiting for data between two readings.

        with rate.waiting(busy):
            batch = next(batches)
        rate.add(batch_size)
        ...
        logger.log(step, {"loss": loss, **rate.read()})

    Steps are dispatched asynchronously: read it after something has waited for the device, as `float(loss)` does.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Starts a new interval. Call it after anything that is not training, such as an evaluation."""
        self._start, self._waited, self._images = self._clock(), 0.0, 0

    @contextmanager
    def waiting(self, busy: Callable[[], bool]) -> Iterator[None]:
        """Counts the time of its block as lost, unless busy() says at its end that the devices still work."""
        start = self._clock()
        try:
            yield
        finally:
            if not busy():
                self._waited += self._clock() - start

    def add(self, images: int) -> None:
        """Counts the images of one step, those of the global batch."""
        self._images += images

    def read(self) -> dict[str, float]:
        """images_per_second and data_wait (a fraction of the time) since the last reading; starts a new interval."""
        seconds = max(self._clock() - self._start, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.reset()
        return rates

"""Seconds by step: what each step of the work on one chunk took."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Measures one chunk."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    def lap(self, step: str) -> None:
        """Count the time since the last lap as spent on `step`."""
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._mark
        self._mark = now

    def each(self, waiting: str, working: str, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`. The time to get an item counts as `waiting`, the time until the next is asked for as `working`."""
        for item in items:
            self.lap(waiting)
            yield item
            self.lap(working)
        self.lap(waiting)

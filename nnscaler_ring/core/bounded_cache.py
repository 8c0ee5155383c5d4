"""A small cache that threads may share: bounded, least recently used forgotten first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Values by key, at most `size` of them.

    Raises:
        ValueError: size is below 1.
    """

    def __init__(self, size: int = 20) -> None:
        if size < 1:
            raise ValueError(f"size of a cache must be at least 1, got {size}.")
        self.size = size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key. Threads that miss at once may each make it; all get the first's."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            value = self._values.setdefault(key, made)
            self._values.move_to_end(key)
            while len(self._values) > self.size:
                self._values.popitem(last=False)
            return value

    def latest(self) -> V | None:
        """The value used last."""
        with self._lock:
            return next(reversed(self._values.values()), None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

    # A lock cannot be copied or pickled, and what is cached can be made again.
    def __reduce__(self) -> tuple[type[BoundedCache[V]], tuple[int]]:
        return BoundedCache, (self.size,)

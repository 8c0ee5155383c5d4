"""Counts the bytes of live tensors, by what they are for.

Note [Live bytes]
    A dispatch mode sees the results of every torch operation. A storage counts from the operation
    that makes it to its last reference, under the component that was named when it was made. What
    a fused kernel allocates and frees inside one operation is not seen, nor is fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Live tensor bytes of the operations inside, now and at the peak. See Note [Live bytes]."""

    def __init__(self) -> None:
        super().__init__()
        self.component = "other"
        self.exceptions: Mapping[str, str] = {}
        """Components of what certain operations make."""
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        """What was live when the total was largest."""
        self.highest: Counter[str] = Counter()
        """Each component's own largest value, at whatever time."""
        self._components: dict[int, tuple[str, int]] = {}
        self._paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not self._paused:
            component = self.exceptions.get(func.overloadpacket.__name__, self.component)
            for x in tree_leaves(results):
                if isinstance(x, Tensor):
                    self.see(x, component)
        return results

    def see(self, x: Tensor, component: str) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._components or storage.nbytes() == 0:
            return
        self._components[key] = component, storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        self.live[component] += storage.nbytes()
        self.highest[component] = max(self.highest[component], self.live[component])
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def move(self, x: Tensor, component: str, *, keep: str = "") -> None:
        """From now on a tensor counts as something else, unless it counts as `keep`."""
        key = x.untyped_storage()._cdata
        if key in self._components and self._components[key][0] != keep:
            old, size = self._components[key]
            self._components[key] = component, size
            self.live[old] -= size
            self.live[component] += size
            self.highest[component] = max(self.highest[component], self.live[component])

    @contextmanager
    def making(self, component: str, **exceptions: str) -> Iterator[None]:
        """What is made inside belongs to a component; exceptions by name of the operation."""
        before = self.component, self.exceptions
        self.component, self.exceptions = component, exceptions
        try:
            yield
        finally:
            self.component, self.exceptions = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made inside does not count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _gone(self, key: int) -> None:
        component, size = self._components.pop(key)
        self.live[component] -= size

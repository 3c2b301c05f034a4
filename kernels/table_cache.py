"""Caches of small tensors that kernels read, and how long those live that a CUDA graph was captured with.

A graph reads the addresses that tensors had when it was captured and keeps none of them alive. What a bounded cache
drops would leave its memory to others, and the graph would read their values.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from spinlock_fast.kernels._common.export import real_tensors

Value = TypeVar("Value")

_lock = threading.RLock()
_captures: list[dict[int, Any]] = []  # of every capture in `captured_tables`, in any thread
_kept: dict[int, Any] = {}  # of captures that are not ours, whose end nobody tells


class TableCache(Generic[Value]):
    """Tables by key: those used last, and those that a CUDA graph was captured with.

    Args:
        limit: number of tables that are kept besides those of graphs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """The table of a key, whose tensors lie on `device`; made once, and anew under torch.compile."""
        if torch.compiler.is_compiling():
            return make()
        captured = capturing(device)
        with _lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
                if captured:
                    keep(found)
                return found
        with real_tensors():
            made = make()
        if captured:  # holds its values only once the graph has run
            return made
        with _lock:
            self._found[key] = made
            while len(self._found) > self.limit:
                self._found.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._found)

    def __deepcopy__(self, memo: dict[int, object]) -> TableCache[Value]:
        return TableCache(self.limit)

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "_found": OrderedDict()}


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now goes into a CUDA graph."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def keep(value: Any) -> None:
    """Keeps what a graph is being captured with: as long as our graph, or, where the capture is not ours, for good."""
    with _lock:
        for kept in _captures or [_kept]:
            kept[id(value)] = value


@contextmanager
def captured_tables() -> Iterator[dict[int, Any]]:
    """Around a capture: the tables that the graph reads, to be held as long as the graph.

    Those of other threads' captures are among them: autograd's thread launches a backward pass for any of them.
    """
    tables: dict[int, Any] = {}
    with _lock:
        _captures.append(tables)
    try:
        yield tables
    finally:
        with _lock:
            _captures[:] = [other for other in _captures if other is not tables]

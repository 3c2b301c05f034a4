"""Caches of small device tensors that kernels read, safe for CUDA graphs.

A captured graph reads tensors at the addresses they had during capture, and does not keep them alive. An entry that a
bounded cache evicts would free memory that the graph still reads, so tensors used during a capture are retained.
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
_captures: list[dict[int, Any]] = []  # of every open `retained_tables`, in any thread
_retained_forever: dict[int, Any] = {}  # of captures outside `retained_tables`, the end of which is unknown


class TableCache(Generic[Value]):
    """Least-recently-used cache of tensors on a device.

    Args:
        limit: number of entries; tensors retained for graphs do not count.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, device: torch.device, make: Callable[[], Value]) -> Value:
        """The entry of `key`, created by `make` if missing; under torch.compile created at every call.

        Args:
            key: identifies the entry, device included.
            device: device of its tensors.
            make: creates the entry.
        """
        if torch.compiler.is_compiling():
            return make()
        in_capture = is_capturing(device)
        with _lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                if in_capture:
                    retain(entry)
                return entry
        with real_tensors():
            entry = make()
        if in_capture:  # its values exist only after the graph has been replayed
            return entry
        with _lock:
            self._entries[key] = entry
            while len(self._entries) > self.limit:
                self._entries.popitem(last=False)
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, object]) -> TableCache[Value]:
        return TableCache(self.limit)

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "_entries": OrderedDict()}


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def retain(value: Any) -> None:
    """Keeps a value alive for the open captures; outside of `retained_tables` for the lifetime of the process."""
    with _lock:
        for retained in _captures or [_retained_forever]:
            retained[id(value)] = value


@contextmanager
def retained_tables() -> Iterator[dict[int, Any]]:
    """Around a capture: collects the tables that it reads; hold them as long as the graph.

    Tables of captures in other threads are included, since autograd's thread may launch a backward pass for any.
    """
    tables: dict[int, Any] = {}
    with _lock:
        _captures.append(tables)
    try:
        yield tables
    finally:
        with _lock:
            _captures[:] = [other for other in _captures if other is not tables]

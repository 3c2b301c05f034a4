"""Copies of nested states in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

_ALIGNMENT = 16  # elements; tensors start at multiples of it in the staging buffer


def to_cpu(value: Any, copy: bool = False, staged: Mapping[int, torch.Tensor] | None = None) -> Any:
    """A nested value with tensors on the CPU, arrays as tensors, and tuples as lists.

    Args:
        copy: copies tensors that are on the CPU already.
        staged: CPU tensors to use in place of tensors, by the id of the tensor.
    """
    if isinstance(value, torch.Tensor):
        if staged is not None and id(value) in staged:
            return staged[id(value)]
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy() if copy else value)
    if isinstance(value, Mapping):
        return {key: to_cpu(inner, copy, staged) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(inner, copy, staged) for inner in value]
    return value


class PinnedStaging:
    """Repeated `to_cpu(value, copy=True)` through one pinned buffer, with one synchronisation.

    A result is valid until the next call. The buffer is kept for the lifetime of the object: freeing pinned memory
    from another thread could invalidate a CUDA graph capture.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._buffer = torch.empty(0, dtype=torch.float32)

    def __call__(self, value: Any) -> Any:
        tensors = [t for t in _tensors(value) if t.device.type == self.device_type and t.dtype == torch.float32]
        if not tensors:
            return to_cpu(value, copy=True)
        sizes = [-(-t.numel() // _ALIGNMENT) * _ALIGNMENT for t in tensors]
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=self.device_type == "cuda")
        slots = self._buffer[: sum(sizes)].split(sizes)
        staged = {id(t): slot[: t.numel()].view(t.shape) for t, slot in zip(tensors, slots, strict=True)}
        for t in tensors:
            staged[id(t)].copy_(t.detach(), non_blocking=True)
        if self.device_type == "cuda":
            torch.cuda.current_stream(tensors[0].device).synchronize()
        return to_cpu(value, copy=True, staged=staged)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)

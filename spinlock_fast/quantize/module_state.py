"""State of quantizers besides their buffers: a host-side initialisation flag, and float32 averages."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from spinlock_fast.quantize.process_group import Processes

M = TypeVar("M", bound=nn.Module)


class FirstBatch:
    """Host-side flag: whether the codes still have to be fitted to the first batch.

    Reading the `initialized` buffer instead would synchronise with the device. The operator that fits the codes clears
    `awaited`; it looks this object up by `key`, since operators take no objects. torch.compile guards on `awaited`, so
    the next call compiles a graph without the operator.

    Args:
        awaited: whether the codes have to be fitted.
        processes: the processes that share the quantizer, for the operator.
    """

    def __init__(self, awaited: bool, processes: Processes) -> None:
        self.awaited, self.processes = awaited, processes
        self.key = f"first batch {next(_numbers)}"
        _first_batches[self.key] = self

    def __deepcopy__(self, memo: dict[int, object]) -> FirstBatch:
        return FirstBatch(self.awaited, copy.deepcopy(self.processes, memo))

    def __reduce__(self) -> tuple[type[FirstBatch], tuple[bool, Processes]]:
        return FirstBatch, (self.awaited, self.processes)

    @staticmethod
    def of(key: str) -> FirstBatch:
        """The live object with this key."""
        return _first_batches[key]


_first_batches: weakref.WeakValueDictionary[str, FirstBatch] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def keep_float32(module: M, names: Sequence[str], apply: Callable[[], M]) -> M:
    """Runs `apply`, a cast or move of `module`, and keeps the named buffers in float32 or wider.

    Half precision would round away the small steps of a moving average.
    """
    before = {name: getattr(module, name, None) for name in names}
    result = apply()
    for name, old in before.items():
        new = getattr(module, name, None)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and new.dtype in (torch.float16, torch.bfloat16):
            module._buffers[name] = old.to(device=new.device, dtype=torch.promote_types(old.dtype, torch.float32))
    return result

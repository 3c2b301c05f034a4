"""State of quantizers that buffers alone do not hold right."""

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
    """Whether codes still wait for a batch to be fitted to, as the host knows it.

    Reading the buffer that says so waits for the device. The operator that fits the codes sets `awaited`; it finds
    this object by `key`, since operators take no objects. torch.compile guards on `awaited`: the next call compiles a
    graph without the operator.

    Args:
        awaited: whether they wait.
        processes: those that share the quantizer, for the operator.
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
        """That of a quantizer in use."""
        return _first_batches[key]


_first_batches: weakref.WeakValueDictionary[str, FirstBatch] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def keep_wide(module: M, names: Sequence[str], apply: Callable[[], M]) -> M:
    """`apply()`, a cast or move of `module`, which leaves the buffers `names` in float32 or wider.

    Half precision would lose a moving average's small steps.
    """
    before = {name: getattr(module, name, None) for name in names}
    result = apply()
    for name, old in before.items():
        new = getattr(module, name, None)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and new.dtype in (torch.float16, torch.bfloat16):
            module._buffers[name] = old.to(device=new.device, dtype=torch.promote_types(old.dtype, torch.float32))
    return result

"""Activation checkpointing (`torch.utils.checkpoint`): a region runs twice, its side effects once.

The backward pass runs a checkpointed region again. A quantizer moves its codes in the forward pass, so the second run
would meet other codes and move them a second time. `once` and `kept` record, in the first run, what the second needs.
The records belong to the region's own bookkeeping object in torch and are freed with its graph.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor

T = TypeVar("T")

_FILE = torch.utils.checkpoint.__file__
_RECORDS = "_spinlock_fast_records"
_UNKNOWN = (
    "a quantizer in training mode runs inside a backward pass, but its forward pass was not recorded: only"
    " torch.utils.checkpoint is supported for activation checkpointing, with the same quantizers in the same mode in"
    " both runs. Move the quantizer out of the recomputed region."
)


_acting = threading.local()  # `now`: inside the action of a call of `once`


@dataclass
class _Entry:
    """What one action gave, and the states of the generators before and after it, where it drew random numbers."""

    kept: bool  # by `kept`, not by `once`
    value: Any
    before: list[Tensor] | None = None
    after: list[Tensor] | None = None


@dataclass
class _Records:
    """Entries of one run of a region, by quantizer, and how far each recomputation of it has come."""

    entries: dict[Hashable, list[_Entry]] = field(default_factory=dict)
    read: dict[tuple[Hashable, Hashable], int] = field(default_factory=dict)

    @staticmethod
    def of(region: Any) -> _Records:
        """Those of a `_CheckpointFrame`, or of the context of a `CheckpointFunction`."""
        records = vars(region).setdefault(_RECORDS, _Records())
        assert isinstance(records, _Records)
        return records

    def append(self, owner: Hashable, entry: _Entry) -> None:
        self.entries.setdefault(owner, []).append(entry)

    def next(self, owner: Hashable, run: Hashable, kept: bool) -> _Entry:
        position = self.read.get((owner, run), 0)
        entries = self.entries.get(owner, [])
        if position >= len(entries) or entries[position].kept != kept:
            raise RuntimeError(_UNKNOWN)
        self.read[owner, run] = position + 1
        return entries[position]


@dataclass(frozen=True)
class _Place:
    """Where in checkpointed regions the program is."""

    open: list[_Records]  # of regions in their first run, the innermost first
    again: _Records | None = None  # of the region that is being recomputed around those
    run: Hashable = None  # which recomputation that is


def _place() -> _Place | None:
    """None outside of all regions, which takes less than a microsecond to find out with gradients on."""
    if getattr(_acting, "now", False):
        return None
    task = torch._C._current_graph_task_id()
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if task == -1 and hooks is None and torch.is_grad_enabled():
        return None
    regions: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE:
            name, names = frame.f_code.co_qualname, frame.f_locals
            if name == "CheckpointFunction.backward":
                return _Place([_Records.of(r) for r in regions], _Records.of(names["ctx"]), task)
            if name == "_checkpoint_hook.__init__.<locals>.unpack_hook":
                return _Place([_Records.of(r) for r in regions], _Records.of(names["frame"]), names["gid"])
            if name == "CheckpointFunction.forward":
                regions.append(names["ctx"])
            elif "gen" in names:  # the generator that makes a region, suspended while the region runs
                regions.append(names["gen"].gi_frame.f_locals["new_frame"])
        frame = frame.f_back
    if task != -1:
        raise RuntimeError(_UNKNOWN)
    # `torch.distributed._composable.checkpoint` leaves no frame of its own on the stack.
    pack: Any = None if hooks is None else hooks[0]
    if getattr(pack, "__qualname__", "") == "_checkpoint_hook.__init__.<locals>.pack_hook":
        region = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
        if not any(region is other for other in regions):
            regions.insert(0, region)
    return _Place([_Records.of(r) for r in regions]) if regions else None


def once(owner: Hashable, action: Callable[[], T]) -> T:
    """The value of `action`, which runs in the first run of a region alone.

    In a recomputation the value is that of the first run, and the random generators are left as the action left them
    there, so that what follows draws the same numbers. Outside of regions, and in compiled code, `action` simply runs.

    Args:
        owner: the quantizer; its actions must come in the same order in both runs.

    Raises:
        RuntimeError: inside a backward pass for which no first run was recorded.
    """
    place = None if torch.compiler.is_compiling() else _place()
    if place is None:
        return action()
    if place.again is not None:
        entry = place.again.next(owner, place.run, False)
        if entry.before is not None and entry.after is not None and _equal(_generators(), entry.before):
            _restore(entry.after)
    else:
        before = _generators()
        _acting.now = True
        try:
            value = action()
        finally:
            _acting.now = False
        after = _generators()
        entry = _Entry(False, value) if _equal(before, after) else _Entry(False, value, before, after)
    for records in place.open:
        records.append(owner, entry)
    result: T = entry.value
    return result


def kept(owner: Hashable, tensor: Tensor) -> Tensor:
    """`tensor`; in a recomputation its values of the first run, with the gradient of `tensor` as it is now."""
    place = None if torch.compiler.is_compiling() else _place()
    if place is None:
        return tensor
    entry = _Entry(True, tensor.detach().clone()) if place.again is None else place.again.next(owner, place.run, True)
    for records in place.open:
        records.append(owner, entry)
    if place.again is None:
        return tensor
    values: Tensor = entry.value
    return values + (tensor - tensor.detach()) if tensor.requires_grad else values


def _generators() -> list[Tensor]:
    """The states of the CPU's generator and of those of the current CUDA device, if there is one in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        states.append(torch.cuda.get_rng_state())
    return states


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

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
from torch import Tensor, nn

T = TypeVar("T")

_FILE = torch.utils.checkpoint.__file__
# What recomputes a region, with `use_reentrant` True and False.
_REENTRANT, _NON_REENTRANT = "CheckpointFunction.backward", "_checkpoint_hook.__init__.<locals>.unpack_hook"
_RECORDS = "_spinlock_fast_records"
_UNKNOWN = (
    "a quantizer in training mode runs inside a backward pass, but its forward pass was not recorded: only"
    " torch.utils.checkpoint is supported for activation checkpointing, with the same quantizers in the same mode in"
    " both runs. Move the quantizer out of the recomputed region."
)


_COMPILED = (
    "a compiled quantizer in training mode runs again in a region of torch.utils.checkpoint, which would move its codes"
    " twice. Compile the checkpointed function instead, or move the quantizer out of the region."
)

_acting = threading.local()  # `now`: inside the action of a call of `once`


@dataclass
class _Entry:
    """What one action gave, and the states of the generators before and after it, where it drew random numbers."""

    kind: str  # "once", "kept" or "gradient"
    value: Any
    before: list[Tensor] | None = None
    after: list[Tensor] | None = None


@dataclass
class _Records:
    """Entries of one run of a region, by quantizer, and how far each recomputation of it has come."""

    entries: dict[nn.Module, list[_Entry]] = field(default_factory=dict)
    read: dict[tuple[nn.Module, Hashable], int] = field(default_factory=dict)

    @staticmethod
    def of(region: Any) -> _Records:
        """Those of a `_CheckpointFrame`, or of the context of a `CheckpointFunction`."""
        records = vars(region).setdefault(_RECORDS, _Records())
        assert isinstance(records, _Records)
        return records

    def append(self, owner: nn.Module, entry: _Entry) -> None:
        self.entries.setdefault(owner, []).append(entry)

    def next(self, owner: nn.Module, run: Hashable, kind: str) -> _Entry:
        position = self.read.get((owner, run), 0)
        entries = self.entries.get(owner, [])
        if position >= len(entries) or entries[position].kind != kind:
            raise RuntimeError(_UNKNOWN)
        self.read[owner, run] = position + 1
        return entries[position]


@dataclass(frozen=True)
class _Place:
    """Where in checkpointed regions the program is."""

    open: list[_Records]  # of regions in their first run, the innermost first
    again: _Records | None = None  # of the region that is being recomputed around those
    run: Hashable = None  # which recomputation that is


def _place(owner: nn.Module) -> _Place | None:
    """None outside of all regions, which takes less than a microsecond to find out with gradients on."""
    if torch.compiler.is_compiling() or getattr(_acting, "now", False):
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
            if name == _REENTRANT:
                return _Place([_Records.of(r) for r in regions], _Records.of(names["ctx"]), task)
            if name == _NON_REENTRANT:
                return _Place([_Records.of(r) for r in regions], _Records.of(names["frame"]), names["gid"])
            if name == "CheckpointFunction.forward":
                regions.append(names["ctx"])
            elif "gen" in names:  # the generator that makes a region, suspended while the region runs
                regions.append(names["gen"].gi_frame.f_locals["new_frame"])
        frame = frame.f_back
    if task != -1 and owner.training:
        raise RuntimeError(_UNKNOWN)
    # `torch.distributed._composable.checkpoint` leaves no frame of its own on the stack.
    pack: Any = None if hooks is None else hooks[0]
    if getattr(pack, "__qualname__", "") == "_checkpoint_hook.__init__.<locals>.pack_hook":
        region = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
        if not any(region is other for other in regions):
            regions.insert(0, region)
    return _Place([_Records.of(r) for r in regions]) if regions else None


def once(owner: nn.Module, action: Callable[[], T], state: Tensor | None = None) -> T:
    """The value of `action`, which runs in the first run of a region alone.

    In a recomputation the value is that of the first run, and the random generators are left as the action left them
    there, so that what follows draws the same numbers. Outside of regions `action` simply runs. So it does in compiled
    code: torch.compile takes care of regions inside of it.

    Args:
        owner: the quantizer; its actions must come in the same order in both runs.
        state: a tensor that `action` changes.

    Raises:
        RuntimeError: inside a backward pass for which no first run was recorded; in compiled code with `state`, in any
            recomputation of a region around it.
    """
    if state is not None and torch.compiler.is_compiling():
        torch.ops.spinlock_fast.refuse_recomputation(state)
    place = _place(owner)
    if place is None:
        return action()
    if place.again is not None:
        entry = place.again.next(owner, place.run, "once")
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
        entry = _Entry("once", value) if _equal(before, after) else _Entry("once", value, before, after)
    for records in place.open:
        records.append(owner, entry)
    result: T = entry.value
    return result


torch.library.define("spinlock_fast::refuse_recomputation", "(Tensor(a!) state) -> ()")


@torch.library.impl("spinlock_fast::refuse_recomputation", "default")
def _refuse_recomputation(state: Tensor) -> None:
    if torch._C._current_graph_task_id() == -1:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == _FILE and frame.f_code.co_qualname in (_REENTRANT, _NON_REENTRANT):
            raise RuntimeError(_COMPILED)
        frame = frame.f_back


def _fake_refuse_recomputation(state: Tensor) -> None:
    return None


torch.library.register_fake("spinlock_fast::refuse_recomputation", _fake_refuse_recomputation)


def kept(owner: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor`; in a recomputation its values of the first run, with the gradient of `tensor` as it is now."""
    place = _place(owner)
    if place is None:
        return tensor
    values: Tensor = _recorded(place, owner, "kept", lambda: tensor.detach().clone())
    if place.again is None:
        return tensor
    return values + (tensor - tensor.detach()) if tensor.requires_grad else values


def takes_gradient(owner: nn.Module, x: Tensor) -> bool:
    """Whether x takes a gradient; of a region whose first run has gradients turned off, True in both runs.

    Values may depend on it: the rotation trick keeps zeros, where a code is returned otherwise.
    """
    place = _place(owner)
    if place is None:
        return x.requires_grad
    return bool(_recorded(place, owner, "gradient", lambda: x.requires_grad or not torch.is_grad_enabled()))


def _recorded(place: _Place, owner: nn.Module, kind: str, make: Callable[[], Any]) -> Any:
    """The value of `make` in the first run."""
    entry = _Entry(kind, make()) if place.again is None else place.again.next(owner, place.run, kind)
    for records in place.open:
        records.append(owner, entry)
    return entry.value


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

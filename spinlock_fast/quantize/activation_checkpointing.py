"""Activation checkpointing (`torch.utils.checkpoint`): side effects of a recomputed region happen once.

The backward pass recomputes a checkpointed region. A quantizer updates its codes in the forward pass, so the
recomputation would use the updated codes and update them again. `once` and `first_run_values` record results in the
first run and return them in a recomputation. The records are stored on the region's own object in torch and are freed
with its graph.
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
# Qualified names of the functions that recompute a region, with `use_reentrant` True and False.
_REENTRANT, _NON_REENTRANT = "CheckpointFunction.backward", "_checkpoint_hook.__init__.<locals>.unpack_hook"
_RECORDS = "_spinlock_fast_records"
_UNKNOWN = (
    "a quantizer in training mode runs inside a backward pass, but its forward pass was not recorded: only"
    " torch.utils.checkpoint is supported for activation checkpointing, with the same quantizers in the same mode in"
    " both runs. Move the quantizer out of the recomputed region."
)
_COMPILED = (
    "a compiled quantizer in training mode is recomputed in a region of torch.utils.checkpoint, which would update its"
    " codes twice. Compile the checkpointed function instead, or move the quantizer out of the region."
)

_in_action = threading.local()  # `now` is True inside the action of a call of `once`


@dataclass
class _Entry:
    """A recorded value, with the generator states before and after its computation if it drew random numbers."""

    kind: str  # "once", "values" or "gradient"
    value: Any
    before: list[Tensor] | None = None
    after: list[Tensor] | None = None


@dataclass
class _Records:
    """Entries of the first run of a region, by quantizer, and the position of each recomputation in them."""

    entries: dict[nn.Module, list[_Entry]] = field(default_factory=dict)
    positions: dict[tuple[nn.Module, Hashable], int] = field(default_factory=dict)

    @staticmethod
    def of(region: Any) -> _Records:
        """The records of a region: a `_CheckpointFrame`, or the context of a `CheckpointFunction`."""
        records = vars(region).setdefault(_RECORDS, _Records())
        assert isinstance(records, _Records)
        return records

    def append(self, owner: nn.Module, entry: _Entry) -> None:
        self.entries.setdefault(owner, []).append(entry)

    def next(self, owner: nn.Module, run: Hashable, kind: str) -> _Entry:
        position = self.positions.get((owner, run), 0)
        entries = self.entries.get(owner, [])
        if position >= len(entries) or entries[position].kind != kind:
            raise RuntimeError(_UNKNOWN)
        self.positions[owner, run] = position + 1
        return entries[position]


@dataclass(frozen=True)
class _Context:
    """The checkpointed regions around the current code."""

    recording: list[_Records]  # of regions in their first run, the innermost first
    recomputed: _Records | None = None  # of the region around those that is being recomputed
    run: Hashable = None  # identifies the recomputation


def _context(owner: nn.Module) -> _Context | None:
    """The current context; None outside all regions, which takes less than a microsecond with gradients enabled."""
    if torch.compiler.is_compiling() or getattr(_in_action, "now", False):
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
                return _Context([_Records.of(r) for r in regions], _Records.of(names["ctx"]), task)
            if name == _NON_REENTRANT:
                return _Context([_Records.of(r) for r in regions], _Records.of(names["frame"]), names["gid"])
            if name == "CheckpointFunction.forward":
                regions.append(names["ctx"])
            elif "gen" in names:  # the generator that creates a region is suspended while the region runs
                regions.append(names["gen"].gi_frame.f_locals["new_frame"])
        frame = frame.f_back
    if task != -1 and owner.training:
        raise RuntimeError(_UNKNOWN)
    # `torch.distributed._composable.checkpoint` has no frame of its own on the stack.
    pack: Any = None if hooks is None else hooks[0]
    if getattr(pack, "__qualname__", "") == "_checkpoint_hook.__init__.<locals>.pack_hook":
        region = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
        if not any(region is other for other in regions):
            regions.insert(0, region)
    return _Context([_Records.of(r) for r in regions]) if regions else None


def in_region(owner: nn.Module) -> bool:
    """Whether the current code is in a checkpointed region, in its first run or recomputed; raises as `once` does."""
    return _context(owner) is not None


def once(owner: nn.Module, action: Callable[[], T], state: Tensor | None = None) -> T:
    """Runs `action` in the first run of a region; in a recomputation returns the recorded value instead.

    A recomputation also restores the random generators to their state after the recorded action, so that later draws
    are the same. Outside of regions `action` simply runs, and in compiled code as well: torch.compile handles regions
    inside of it.

    Args:
        owner: the quantizer; its actions must come in the same order in both runs.
        state: a tensor that `action` changes.

    Raises:
        RuntimeError: inside a backward pass without a recorded first run; with `state`, when compiled code is
            recomputed in a region around it.
    """
    if state is not None and torch.compiler.is_compiling():
        torch.ops.spinlock_fast.refuse_recomputation(state)
    context = _context(owner)
    if context is None:
        return action()
    if context.recomputed is not None:
        entry = context.recomputed.next(owner, context.run, "once")
        if entry.before is not None and entry.after is not None and _equal(_generators(), entry.before):
            _restore(entry.after)
    else:
        before = _generators()
        _in_action.now = True
        try:
            value = action()
        finally:
            _in_action.now = False
        after = _generators()
        entry = _Entry("once", value) if _equal(before, after) else _Entry("once", value, before, after)
    for records in context.recording:
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


torch.library.register_fake("spinlock_fast::refuse_recomputation", lambda state: None)


def first_run_values(owner: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor`; in a recomputation its values of the first run, with a gradient to the current `tensor`."""
    context = _context(owner)
    if context is None:
        return tensor
    values: Tensor = _recorded(context, owner, "values", lambda: tensor.detach().clone())
    if context.recomputed is None:
        return tensor
    return values + (tensor - tensor.detach()) if tensor.requires_grad else values


def takes_gradient(owner: nn.Module, x: Tensor) -> bool:
    """Whether x requires a gradient; True in both runs of a region whose first run has gradients disabled.

    Results can depend on it: with a gradient, the rotation trick maps a zero latent to zero instead of its code.
    """
    context = _context(owner)
    if context is None:
        return x.requires_grad
    return bool(_recorded(context, owner, "gradient", lambda: x.requires_grad or not torch.is_grad_enabled()))


def _recorded(context: _Context, owner: nn.Module, kind: str, make: Callable[[], Any]) -> Any:
    """The result of `make` in the first run, recorded or replayed."""
    entry = _Entry(kind, make()) if context.recomputed is None else context.recomputed.next(owner, context.run, kind)
    for records in context.recording:
        records.append(owner, entry)
    return entry.value


def _generators() -> list[Tensor]:
    """States of the CPU generator, and of the current CUDA device's generator if CUDA is initialised."""
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

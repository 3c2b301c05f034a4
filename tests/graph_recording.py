"""What tells on a CPU whether a training step could be a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spinlock_fast.training.step import StepKind, TrainingStep

# Operations whose result has a shape, or is a number of the host, that only the values decide.
_WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "argwhere",
    "masked_select",
    "bincount",
    "histc",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
}


class HostNeededError(AssertionError):
    """An operation that would make the host wait for a device, or send it something."""


class DeviceOnly(TorchDispatchMode):
    """Raises HostNeededError at what a CUDA graph cannot hold; `seen` counts the others by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    @property
    def operations(self) -> int:
        return self.seen.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _WAITING:
            raise HostNeededError(f"{func} waits for values")
        if name == "repeat_interleave" and kwargs.get("output_size") is None and func._overloadname == "Tensor":
            raise HostNeededError(f"{func} without output_size waits for values")
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise HostNeededError(f"{func} by a mask has a shape that values decide")
        if name == "lift_fresh":
            raise HostNeededError("a tensor made of values of the host")
        devices = {t.device.type for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.dim():
            devices.add(result.device.type)
        if len(devices) > 1:
            raise HostNeededError(f"{func} copies between {' and '.join(sorted(devices))}")
        self.seen[name] += 1
        return result


def lasting_tensors(step: TrainingStep) -> dict[str, Tensor]:
    """Everything that a step changes and the next step reads."""
    kept = {name: value for name, value in vars(step).items() if isinstance(value, Tensor)}
    kept |= dict(step.model.named_parameters()) | dict(step.model.named_buffers())
    optimizer = step.optimizer
    moments = dict(enumerate([optimizer.count, *optimizer.mean, *optimizer.square]))
    kept |= {f"optimizer.{i}": value for i, value in moments.items()}
    return kept


class _Recorder(TorchDispatchMode):
    """Runs operations and keeps each with its arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


@torch.no_grad()
def _replay(calls: Sequence[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]]) -> None:
    for func, args, kwargs, recorded in calls:
        result = func(*args, **kwargs)
        for place, value in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
            if isinstance(place, Tensor) and place.untyped_storage()._cdata != value.untyped_storage()._cdata:
                place.copy_(value)  # later operations read the memory of the recording


def record(step: TrainingStep, kind: StepKind, count: int) -> Callable[[], object]:
    """Records the operations of `count` steps, backward passes included, and returns a function that repeats them.

    As in a captured CUDA graph, Python decides once, and operations read and write the memory of the recording.
    Recording runs the steps; parameters, buffers and the random state are restored afterwards.
    """
    tensors = lasting_tensors(step)
    del tensors["x"]  # no step changes rows; a row feed may replace them
    before = {name: value.detach().clone() for name, value in tensors.items()}
    random = torch.get_rng_state()
    with _Recorder() as recorder:
        for _ in range(count):
            step(kind)
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(before[name])
    torch.set_rng_state(random)
    return partial(_replay, recorder.calls)

"""Training whose loss is no longer finite: the state to go back to, and the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.errors import TrainingError

MOST_REWINDS = 5  # of a run; each halves the learning rate


class DivergenceError(TrainingError):
    """A loss is not finite, and a smaller learning rate may help.

    Args:
        message: the step and the term.
        step: of the run, counted from 0, from which the loss is not finite.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def cloned(value: Any) -> Any:
    """The same value with copies of its tensors, on their device."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: cloned(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [cloned(inner) for inner in value]
    return value


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are finite; waits for the device."""
    checks = [torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()]
    return not checks or bool(torch.stack(checks).all())

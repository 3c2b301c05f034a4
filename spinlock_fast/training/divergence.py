"""Divergence: detecting a non-finite loss, and copies of a state to rewind to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.host_rows import Rows
from spinlock_fast.errors import TrainingError
from spinlock_fast.models.losses import LossTerms
from spinlock_fast.models.outliers import MAX_MAGNITUDE, largest_magnitude

MAX_REWINDS = 5  # per run; each halves the learning rate


class DivergenceError(TrainingError):
    """A loss is not finite; a smaller learning rate may help.

    Args:
        message: names the step and the loss term.
        step: first step of the run with a non-finite loss, from 0.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass
class Rewinds:
    """Rewinds of a run whose loss diverged, and the state that the next one restores.

    Args:
        on_divergence: `training.on_divergence`.
        count: rewinds so far; each halves the learning rate.
        diverged_steps: steps with a non-finite loss since the last epoch of the history.
        good_state: the last resumable state with finite weights.
    """

    on_divergence: Literal["stop", "rewind"]
    count: int = 0
    diverged_steps: list[int] = field(default_factory=list)
    good_state: dict[str, Any] | None = None

    @property
    def rate_scale(self) -> float:
        """Factor of the learning rate."""
        return 0.5**self.count

    def next(self, error: DivergenceError, save: Callable[[dict[str, Any]], None]) -> Rewinds:
        """The rewinds after one more.

        Args:
            error: why the run rewinds.
            save: called with the good state before the error is raised, if that state has a step of training.

        Raises:
            DivergenceError: there is no good state, `on_divergence` is "stop", or `MAX_REWINDS` is reached.
        """
        good = self.good_state
        if good is None:
            raise error
        if self.on_divergence == "rewind" and self.count < MAX_REWINDS:
            return replace(self, count=self.count + 1, diverged_steps=[*self.diverged_steps, error.step])
        tried = f", also after {self.count} halvings of it" if self.count else ""
        saved = ""
        if good["epoch"] > 0 or good["step"] > 0:
            save({**good, "diverged_at": error.step})
            saved = f"; the state after epoch {good['epoch']} is kept, to resume with another rate"
        raise DivergenceError(f"{error}{tried}{saved}", error.step)


def raise_nonfinite_loss(
    step: int,
    epoch: int,
    term: int,
    x_train: Rows,
    row_numbers: NDArray[np.int64] | None,
    categories: Mapping[str, Sequence[int]],
) -> None:
    """Raises the error for a loss term that is not finite.

    Args:
        step: first step of the run with a non-finite loss, from 0.
        epoch: its epoch, from 0.
        term: index of the loss term in `LossTerms`.
        x_train: [N, F] training rows.
        row_numbers: [N] numbers of the rows in the data, for the message.
        categories: features of each category.

    Raises:
        DivergenceError: the features are of usual size.
        TrainingError: a feature is too large, or the first step of the run fails.
    """
    row, magnitude = largest_magnitude(x_train)
    message = f"the {LossTerms._fields[term]} loss is not finite from step {step} on (epoch {epoch + 1})"
    if magnitude <= MAX_MAGNITUDE and step > 0:
        raise DivergenceError(f"{message}; a smaller training.learning_rate may help", step)
    number = row if row_numbers is None else int(row_numbers[row])
    category = ""
    if isinstance(x_train, Tensor):
        column = int(x_train[row].abs().argmax())
        names = [name for name, members in categories.items() if column in members]
        category = f", in category {names[0]}" if names else ""
    raise TrainingError(
        f"{message}; the features are too large: row {number} has a value of magnitude {magnitude:.3g}{category}"
    )


def clone_tensors(value: Any) -> Any:
    """A copy of nested mappings and lists with cloned tensors, on their device."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: clone_tensors(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [clone_tensors(inner) for inner in value]
    return value


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all floating-point tensors are finite. Synchronises with the device."""
    checks = [torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point()]
    return not checks or bool(torch.stack(checks).all())

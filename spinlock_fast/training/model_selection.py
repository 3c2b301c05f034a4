"""Model selection on the validation loss: the best weights, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.untrusted import shape_difference, shapes
from spinlock_fast.errors import DataError
from spinlock_fast.messages import shown


class ModelSelection:
    """Keeps the weights of the lowest validation loss, and counts validations without improvement.

    Any lower loss replaces the best weights; only a fall of more than `early_stopping_min_delta` resets the count of
    early stopping.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._min_delta = training.early_stopping_min_delta
        self._patience = training.early_stopping_patience
        self.best_epoch = 0
        self.best_loss = math.inf
        self.best_state: dict[str, Tensor] = {}
        self.stopping_loss = math.inf  # validation loss that early stopping compares with
        self.validations_without_improvement = 0

    @property
    def should_stop(self) -> bool:
        """Whether the patience of early stopping is used up."""
        return self.validations_without_improvement >= self._patience

    def update(self, val_loss: float, epoch: int, model: nn.Module) -> None:
        """Takes a validation into account; copies the weights if they are the best so far."""
        if val_loss < self.stopping_loss - self._min_delta:
            self.stopping_loss = val_loss
            self.validations_without_improvement = 0
        else:
            self.validations_without_improvement += 1
        if val_loss < self.best_loss:
            self.best_loss = val_loss
            self.best_epoch = epoch
            self.save_weights(model)

    def save_weights(self, model: nn.Module) -> None:
        """Copies the model's weights to `best_state`, in place after the first time."""
        weights = model.state_dict()
        if not self.best_state:
            self.best_state = {name: torch.empty_like(value) for name, value in weights.items()}
        for name, value in weights.items():
            self.best_state[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """Entries of a resumable state; the next validation changes their tensors in place."""
        return {
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "counted_loss": self.stopping_loss,
            "best_state_dict": self.best_state,
            "stale": self.validations_without_improvement,
        }

    def snapshot(self) -> dict[str, Any]:
        """`state` with cloned tensors."""
        return {**self.state(), "best_state_dict": {name: value.clone() for name, value in self.best_state.items()}}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores what `state` or `snapshot` returned."""
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self.best_state = {name: value.to(device, copy=True) for name, value in state["best_state_dict"].items()}
        self.stopping_loss, self.validations_without_improvement = state["counted_loss"], state["stale"]


def check_selection_state(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Checks the entries of `ModelSelection.state` and the counters beside them, read from a file.

    Args:
        state: a resumable state, or its "before_last" entry.
        weights: state dict of the model.

    Raises:
        DataError: a number is out of range, or the best weights do not fit the model.
    """
    for name in ("epoch", "step", "best_epoch", "stale"):
        if name in state and (not isinstance(state[name], int) or not 0 <= state[name] < 2**62):
            raise DataError(f"{name} must be a non-negative integer, got {shown(state[name])}")
    for name in ("best_loss", "counted_loss"):
        if not isinstance(state[name], (int, float)):
            raise DataError(f"{name} must be a number, got {shown(state[name])}")
    best = shapes(state["best_state_dict"])
    if best and (problem := shape_difference(best, shapes(weights))):
        raise DataError(f"best_state_dict: {problem}")

"""Notifications of a training run: start, finished epochs, states to save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass
class EpochRecord:
    """One line of the training history."""

    epoch: int
    train_loss: float
    terms: dict[str, float]
    utilization: float
    learning_rate: float
    seconds: float
    resets: int | None = None
    validation: dict[str, float] | None = None
    diverged_at: list[int] | None = None  # steps at which a loss was not finite, before the run went back to this epoch


class Observer(Protocol):
    """What a `Trainer` tells while it runs."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

    def epoch_finished(self, record: EpochRecord) -> None: ...

    def save(self, state: dict[str, Any]) -> None:
        """Keeps a state from which the run can go on; its tensors change with the next step."""


class SilentObserver:
    """Hears everything, says and keeps nothing."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        pass

    def epoch_finished(self, record: EpochRecord) -> None:
        pass

    def save(self, state: dict[str, Any]) -> None:
        pass

"""Callbacks of a training run: start, finished epochs, states to save."""

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
    diverged_at: list[int] | None = None  # steps with a non-finite loss, before the run was rewound to this epoch


class Observer(Protocol):
    """Callbacks of a `Trainer`."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

    def epoch_finished(self, record: EpochRecord) -> None: ...

    def save(self, state: dict[str, Any]) -> None:
        """Saves a resumable state. The next step changes its tensors in place."""


class Display(Observer, Protocol):
    """An observer that also shows the stages of the pipeline."""

    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, rows: int) -> None: ...

    def training_finished(self) -> None:
        """Called after the last epoch; closes the display's files."""


class SilentObserver:
    """An observer that does nothing."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        pass

    def epoch_finished(self, record: EpochRecord) -> None:
        pass

    def save(self, state: dict[str, Any]) -> None:
        pass


class SilentDisplay(SilentObserver):
    """A display that shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def encoded(self, family: str, done: int, rows: int) -> None:
        pass

    def training_finished(self) -> None:
        pass

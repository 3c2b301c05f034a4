"""The work of `Tokenizer.fit`: trains with the progress display of the commands."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.estimators.transformer import PARAMETERS
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.fitting import run_config, train_tokenizer
from spinlock_fast.training.observer import Display, EpochRecord, Observer, SilentObserver

_one_at_a_time = threading.RLock()


def fit_tokenizer(
    tokenizer: Tokenizer, data: Any, config: Any, settings: Mapping[str, Any], *, matrix: bool = False
) -> None:
    """Trains `tokenizer` in place; see `Tokenizer.fit`. Threads of a process train one after the other."""
    chosen = run_config(config, settings)
    observer = tokenizer.observer or SilentObserver()
    # Training uses the random state of torch, which all threads share.
    with _one_at_a_time:
        if tokenizer.verbose:
            with RunDisplay(quiet=False, logging_config=LoggingConfig(level=chosen.logging.level)) as display:
                trained = train_tokenizer(data, chosen, _Both(observer, display), matrix=matrix)
        else:
            trained = train_tokenizer(data, chosen, _Both(observer, None), matrix=matrix)
    vars(tokenizer).update({name: value for name, value in vars(trained).items() if name not in PARAMETERS})


class _Both:
    """A display that also informs an observer."""

    def __init__(self, observer: Observer, display: Display | None) -> None:
        self._observer = observer
        self._display = display

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        self._observer.training_started(epochs, first_epoch, rows)
        if self._display is not None:
            self._display.training_started(epochs, first_epoch, rows)

    def epoch_finished(self, record: EpochRecord) -> None:
        self._observer.epoch_finished(record)
        if self._display is not None:
            self._display.epoch_finished(record)

    def save(self, state: dict[str, Any]) -> None:
        self._observer.save(state)

    def stage(self, text: str) -> None:
        if self._display is not None:
            self._display.stage(text)

    def encoded(self, family: str, done: int, rows: int) -> None:
        if self._display is not None:
            self._display.encoded(family, done, rows)

    def training_finished(self) -> None:
        if self._display is not None:
            self._display.training_finished()

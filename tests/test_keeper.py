"""Resumable states are written beside the training, as they were when they were given."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raises_one_line

from spinlock_fast import pipeline
from spinlock_fast.checkpoint import RESUME, load_torch, save_torch
from spinlock_fast.config import RunConfig
from spinlock_fast.errors import OutputError


class Nothing:
    """A display that shows nothing."""

    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, rows: int) -> None: ...

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

    def epoch_finished(self, record: object) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


def test_a_state_is_written_beside_training_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slowly(path: Path, payload: dict[str, Any]) -> None:
        assert go.wait(30)
        save_torch(path, payload)

    monkeypatch.setattr(pipeline, "save_torch", slowly)
    weight = torch.ones(3)
    with pipeline._Keeper(Nothing(), tmp_path, {}, RunConfig()) as keeper:
        keeper.save({"weight": weight, "values": torch.zeros(1)})
        weight += 1  # training goes on
        assert not (tmp_path / RESUME).exists()
        go.set()
    assert load_torch(tmp_path / RESUME)["run"]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        raises_one_line(OutputError, RESUME),
        pipeline._Keeper(Nothing(), tmp_path / "file", {}, RunConfig()) as keeper,
    ):
        keeper.save({})
    keeper = pipeline._Keeper(Nothing(), tmp_path / "file", {}, RunConfig())
    keeper.save({})
    with raises_one_line(OutputError, RESUME):
        keeper.save({})

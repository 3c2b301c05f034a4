"""Non-finite losses: the run stops, or rewinds to the last good state."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import SMALL_SETTINGS, planted_matrix, raises_one_line, write_arrays

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import TrainingError
from spinlock_fast.train import main as train_main
from spinlock_fast.training.divergence import MAX_REWINDS, DivergenceError
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.step import StepKind, TrainingStep
from spinlock_fast.training.trainer import Trainer

X = planted_matrix(200, [6, 6], seed=3)
GROUPS = {"first": list(range(6)), "second": list(range(6, 12))}
STEPS = 3  # of an epoch


class StateRecorder(SilentObserver):
    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def save(self, state: dict[str, Any]) -> None:
        self.states.append(copy.deepcopy(state))


def trainer(recorder: StateRecorder | None = None, **training: Any) -> Trainer:
    settings = {"batch_size": 64, "topo_samples": 64, "num_epochs": 6, "val_every_n_epochs": 1, **training}
    config = RunConfig.model_validate({"device": "cpu", "training": {"orthogonality_target": 10.0, **settings}})
    return Trainer(config, recorder)


@pytest.fixture
def broken_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of steps after which the weights become non-finite."""
    steps: list[int] = []
    made = 0
    original = TrainingStep.__call__

    def step(self: TrainingStep, kind: StepKind) -> None:
        nonlocal made
        original(self, kind)
        if made in steps:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        made += 1

    monkeypatch.setattr(TrainingStep, "__call__", step)
    return steps


def test_stop_keeps_the_last_good_state(broken_at: list[int]) -> None:
    broken_at.append(3 * STEPS)
    recorder = StateRecorder()
    with raises_one_line(DivergenceError, "loss is not finite from step 10 on (epoch 4)", "after epoch 3 is kept"):
        trainer(recorder).fit(X, GROUPS)
    state = recorder.states[-1]
    assert (state["epoch"], state["diverged_at"]) == (3, 10)
    assert all(bool(torch.isfinite(value).all()) for value in state["model_state_dict"].values())
    result = trainer(learning_rate=1e-4).fit(X, GROUPS, resume=state)
    assert [record.epoch for record in result.history] == list(range(1, 7))
    assert result.history[-1].learning_rate == 1e-4


def test_good_state_equals_that_of_an_uninterrupted_run(broken_at: list[int]) -> None:
    expected = trainer().fit(X, GROUPS)
    broken_at.append(6 * STEPS + 3 * STEPS)
    recorder = StateRecorder()
    with pytest.raises(DivergenceError):
        trainer(recorder).fit(X, GROUPS)
    broken_at.clear()
    result = trainer().fit(X, GROUPS, resume=recorder.states[-1])
    for name, value in expected.final_state["model_state_dict"].items():
        assert torch.equal(value, result.final_state["model_state_dict"][name]), name


def test_rewind_halves_the_learning_rate_and_warns(broken_at: list[int], caplog: pytest.LogCaptureFixture) -> None:
    broken_at += [3 * STEPS, 3 * STEPS + STEPS]  # the second while the epoch is repeated
    result = trainer(on_divergence="rewind").fit(X, GROUPS)
    assert [record.epoch for record in result.history] == list(range(1, 7))
    assert [record.learning_rate for record in result.history] == [1e-3] * 3 + [2.5e-4] * 3
    assert [record.diverged_at for record in result.history] == [None, None, None, [10, 10], None, None]
    assert sum("back to the state after epoch 3" in message for message in caplog.messages) == 2
    assert all(np.isfinite(record.train_loss) for record in result.history)


def test_rewinds_are_limited(broken_at: list[int]) -> None:
    broken_at += range(100)
    with raises_one_line(DivergenceError, "not finite", f"also after {MAX_REWINDS} halvings"):
        trainer(on_divergence="rewind").fit(X, GROUPS)


@pytest.mark.parametrize("action", ["stop", "rewind"])
def test_features_of_1e30(action: str) -> None:
    x = X.copy()
    x[17, 8] = 1e30
    with raises_one_line(TrainingError, "from step ", "row 17 has a value of magnitude 1e+30, in category second"):
        trainer(on_divergence=action).fit(x, GROUPS, val_rows=np.arange(20, 40), normalize=False)


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., int]:
    """The command on a small file; its exit status."""
    data = write_arrays(tmp_path / "x.h5", {"x": X})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"dataset_path": str(data), **SMALL_SETTINGS}))

    def command(*arguments: object) -> int:
        with pytest.raises(SystemExit) as end:
            train_main([str(path), "--quiet", "--set", "training.val_every_n_epochs=1", *map(str, arguments)])
        return int(end.value.code or 0)

    return command


def test_a_learning_rate_of_1e6(tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints one line; a saved state resumes with another rate."""
    output = tmp_path / "out"
    changes = ["--set", "training.warmup_epochs=0", "--set", "training.learning_rate=1e6"]
    assert train("--output", output, "--set", "training.num_epochs=1") == 0
    # One epoch with a good rate, then another rate: the state of a run that did not diverge refuses it.
    assert train("--resume", output, *changes) == 2
    capsys.readouterr()
    status = train("--output", tmp_path / "large", *changes)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert status == 0 or (status == 1 and message.count("\n") == 1 and "not finite from step " in message)


def test_diverged_run_resumes_with_another_rate(
    tmp_path: Path, train: Callable[..., int], broken_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    broken_at.append(2 * STEPS)
    assert train("--output", output) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert train("--resume", output, "--set", "training.batch_size=32") == 2
    assert train("--resume", output, "--set", "training.learning_rate=1e-4") == 0
    history = json.loads((output / "training_history.json").read_text())["epochs"]
    assert [record["learning_rate"] for record in history] == [1e-3, 1e-3, 1e-4, 1e-4]

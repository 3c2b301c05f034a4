"""Resumable states are written beside the training, as they were when they were given."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raises_one_line

from spinlock_fast.checkpoints import resumable
from spinlock_fast.checkpoints.directory import RESUME, Staging, load_torch, plain, save_torch
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import OutputError
from spinlock_fast.training.state_keeper import StateKeeper


class Nothing:
    """A display that shows nothing."""

    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, rows: int) -> None: ...

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

    def epoch_finished(self, record: object) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...

    def training_finished(self) -> None: ...


def test_a_state_is_written_beside_training_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def slowly(path: Path, payload: dict[str, Any]) -> None:
        assert go.wait(30)
        save_torch(path, payload)

    monkeypatch.setattr(resumable, "save_torch", slowly)
    weight = torch.ones(3)
    with StateKeeper(Nothing(), tmp_path, {}, RunConfig()) as keeper:
        keeper.save({"weight": weight, "values": torch.zeros(1)})
        weight += 1  # training goes on
        assert not (tmp_path / RESUME).exists()
        go.set()
    assert load_torch(tmp_path / RESUME)["run"]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        raises_one_line(OutputError, RESUME),
        StateKeeper(Nothing(), tmp_path / "file", {}, RunConfig()) as keeper,
    ):
        keeper.save({})
    keeper = StateKeeper(Nothing(), tmp_path / "file", {}, RunConfig())
    keeper.save({})
    with raises_one_line(OutputError, RESUME):
        keeper.save({})


def test_a_staged_state_is_a_copy_that_loads_as_it_was(tmp_path: Path) -> None:
    weight, scalar, bit = torch.randn(5, 7).requires_grad_(), torch.tensor(3.0), torch.tensor(True)
    wide = torch.randn(3, dtype=torch.float64)
    state = {"a": {"weight": weight, "same": weight, "turned": weight.t()}, "b": [scalar, bit, wide], "c": None, "d": 2}
    expected = plain(state, copy=True)
    staging = Staging("cpu")  # which plays the device
    found = staging(state)
    with torch.no_grad():
        weight.zero_()
        scalar.zero_()
    save_torch(tmp_path / "state.pt", found)
    loaded = load_torch(tmp_path / "state.pt")
    for result in (found, loaded):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    buffer = found["a"]["weight"].untyped_storage().data_ptr()
    assert found["a"]["weight"].data_ptr() % 64 == found["b"][0].data_ptr() % 64
    assert staging(state)["b"][0].untyped_storage().data_ptr() == buffer  # used again
    assert (tmp_path / "state.pt").stat().st_size < 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_state_of_a_device_is_staged_in_page_locked_memory() -> None:
    state = {"weight": torch.randn(300, 200, device="cuda"), "rest": [torch.ones(3, dtype=torch.int64, device="cuda")]}
    found = Staging()(state)
    assert found["weight"].is_pinned()
    assert found["weight"].device.type == found["rest"][0].device.type == "cpu"
    torch.testing.assert_close(found, plain(state), rtol=0, atol=0)

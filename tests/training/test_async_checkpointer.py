"""Resumable states are copied when they are saved, and written in a background thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import raises_one_line

from spinlock_fast.checkpoints import resumable
from spinlock_fast.checkpoints.directory import RESUME, load_torch, save_torch
from spinlock_fast.checkpoints.host_copies import PinnedStaging, to_cpu
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import OutputError
from spinlock_fast.training.async_checkpointer import AsyncCheckpointer
from spinlock_fast.training.observer import SilentObserver


def test_save_writes_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def blocked_save(path: Path, payload: dict[str, Any]) -> None:
        assert released.wait(30)
        save_torch(path, payload)

    monkeypatch.setattr(resumable, "save_torch", blocked_save)
    weight = torch.ones(3)
    with AsyncCheckpointer(SilentObserver(), tmp_path, {}, RunConfig()) as checkpointer:
        checkpointer.save({"weight": weight, "values": torch.zeros(1)})
        weight += 1  # the next step
        assert not (tmp_path / RESUME).exists()
        released.set()
    assert load_torch(tmp_path / RESUME)["run"]["weight"].tolist() == [1.0, 1.0, 1.0]


def test_failed_write_raises_at_the_next_save_or_exit(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        raises_one_line(OutputError, RESUME),
        AsyncCheckpointer(SilentObserver(), tmp_path / "file", {}, RunConfig()) as checkpointer,
    ):
        checkpointer.save({})
    checkpointer = AsyncCheckpointer(SilentObserver(), tmp_path / "file", {}, RunConfig())
    checkpointer.save({})
    with raises_one_line(OutputError, RESUME):
        checkpointer.save({})


def test_staged_state_is_a_copy_that_loads_unchanged(tmp_path: Path) -> None:
    weight, scalar, bit = torch.randn(5, 7).requires_grad_(), torch.tensor(3.0), torch.tensor(True)
    wide = torch.randn(3, dtype=torch.float64)
    state = {
        "a": {"weight": weight, "same": weight, "transposed": weight.t()},
        "b": [scalar, bit, wide],
        "c": None,
        "d": 2,
    }
    expected = to_cpu(state, copy=True)
    staging = PinnedStaging("cpu")  # in the role of the device
    staged = staging(state)
    with torch.no_grad():
        weight.zero_()
        scalar.zero_()
    save_torch(tmp_path / "state.pt", staged)
    loaded = load_torch(tmp_path / "state.pt")
    for result in (staged, loaded):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    buffer = staged["a"]["weight"].untyped_storage().data_ptr()
    assert staged["a"]["weight"].data_ptr() % 64 == staged["b"][0].data_ptr() % 64
    assert staging(state)["b"][0].untyped_storage().data_ptr() == buffer  # reused
    assert (tmp_path / "state.pt").stat().st_size < 5000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_state_is_staged_in_pinned_memory() -> None:
    state = {"weight": torch.randn(300, 200, device="cuda"), "rest": [torch.ones(3, dtype=torch.int64, device="cuda")]}
    staged = PinnedStaging()(state)
    assert staged["weight"].is_pinned()
    assert staged["weight"].device.type == staged["rest"][0].device.type == "cpu"
    torch.testing.assert_close(staged, to_cpu(state), rtol=0, atol=0)

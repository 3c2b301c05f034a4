"""When steps are captured, how many run at a launch, and what happens where they cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spinlock_fast import loop
from spinlock_fast.config import RunConfig
from spinlock_fast.config_file import apply_overrides
from spinlock_fast.graphs import WARM_UP, StepLauncher
from spinlock_fast.kernels.precision import cuda_matmul
from spinlock_fast.loop import SilentObserver, TrainingRun
from spinlock_fast.model import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.step import StepKind

CPU = torch.device("cpu")
PLAIN, RESET, LAST = StepKind(False, False), StepKind(False, True), StepKind(True, False)


class Log:
    """A step, and a capture, that write down what is asked of them."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def __call__(self, kind: StepKind) -> None:
        self.said.append(kind)

    def capture(self, step: Callable[[StepKind], None], kind: StepKind, count: int) -> Callable[[], None]:
        self.said.append(("captured", kind, count))
        return lambda: self.said.append((kind, count))


def test_steps_are_captured_once_when_warm_and_then_replayed() -> None:
    log = Log()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    assert [launcher.run(PLAIN, 100) for _ in range(WARM_UP)] == [1] * WARM_UP
    assert [launcher.run(PLAIN, most) for most in (100, 4, 3, 1)] == [4, 4, 1, 1]
    assert log.said == [
        *[PLAIN] * WARM_UP,
        ("captured", PLAIN, 4),
        (PLAIN, 4),
        (PLAIN, 4),
        ("captured", PLAIN, 1),
        (PLAIN, 1),
        (PLAIN, 1),
    ]


def test_each_kind_warms_up_by_itself() -> None:
    log = Log()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    for kind in [PLAIN, LAST] * WARM_UP:
        launcher.run(kind, 1)
    launcher.run(LAST, 1)
    assert log.said == [*[PLAIN, LAST] * WARM_UP, ("captured", LAST, 1), (LAST, 1)]


@pytest.mark.parametrize("graphs", [True, False])
def test_a_cpu_and_a_run_without_graphs_make_every_step_alone(graphs: bool) -> None:
    log = Log()
    launcher = StepLauncher(log, CPU, graphs, capture=None if graphs else log.capture)
    assert [launcher.run(PLAIN, 100) for _ in range(6)] == [1] * 6
    assert log.said == [PLAIN] * 6


def test_a_failed_capture_is_said_once_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    log = Log()

    def capture(*args: Any) -> Callable[[], None]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("capture was invalidated")

    launcher = StepLauncher(log, CPU, capture=capture)
    assert [launcher.run(PLAIN, 100) for _ in range(WARM_UP + 3)] == [1] * (WARM_UP + 3)
    assert log.said == [PLAIN] * (WARM_UP + 3)
    (record,) = caplog.records
    assert "not as CUDA graphs: operation not permitted when stream is capturing more lines" in record.message


def test_other_work_beside_the_steps_is_done_each_time() -> None:
    log = Log()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    done: list[str] = []
    again = launcher.beside(lambda: done.append("work"), "validations")
    for _ in range(WARM_UP + 2):
        again()
    assert done == ["work"] * (WARM_UP + 2)
    assert log.said == []


class Kinds(StepLauncher):
    """Takes as many steps as it may, and notes them."""

    seen: list[tuple[StepKind, int]]

    def run(self, kind: StepKind, most: int) -> int:
        self.seen.append((kind, most))
        return most


@pytest.mark.parametrize(
    ("rows", "interval", "expected"),
    [
        (70, 0, [(PLAIN, 4), (LAST, 1)] * 2),
        (64, 0, [(PLAIN, 4)] * 2),
        (10, 0, [(PLAIN, 1)] * 2),
        (64, 3, [(PLAIN, 2), (RESET, 1), (PLAIN, 1), (PLAIN, 1), (RESET, 1), (PLAIN, 2)]),
        (70, 5, [(PLAIN, 4), (StepKind(True, True), 1)] * 2),
        (64, 1, [(RESET, 1)] * 8),
    ],
)
def test_the_loop_asks_for_runs_of_steps_alike(
    rows: int, interval: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "StepLauncher", Kinds)
    monkeypatch.setattr(Kinds, "seen", [], raising=False)
    config = apply_overrides(
        RunConfig(), {"training.batch_size": 16, "training.dead_code_reset_steps": interval, "training.num_epochs": 2}
    )
    settings = CategoricalVQVAEConfig(input_dim=4, group_indices={"a": [0, 1, 2, 3]}, codebook_init="uniform")
    x = torch.randn(rows, 4)
    run = TrainingRun(config, SilentObserver(), lambda: None, CategoricalHierarchicalVQVAE(settings), x, x[:8])
    run.train()
    assert Kinds.seen == expected


def numbers() -> tuple[Any, ...]:
    """What torch says of CUDA products, by both of its interfaces."""
    found: list[Any] = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return tuple(found)


def by_newer(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


@pytest.mark.parametrize(
    "user",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: by_newer("tf32"),
        lambda: by_newer("ieee"),
    ],
)
def test_the_precision_of_products_is_set_for_a_while(user: Callable[[], None]) -> None:
    by_newer("none")
    user()
    before = numbers()
    try:
        with cuda_matmul(tf32=True):
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            with cuda_matmul(tf32=False):
                assert not torch.backends.cuda.matmul.allow_tf32
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.allow_tf32
        assert numbers() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        by_newer("none")

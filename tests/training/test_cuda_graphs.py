"""Warm-up, capture and replay of steps, steps per launch, and the fallback to eager steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.kernels._common import launch_helpers, ragged, table_cache
from spinlock_fast.kernels._common import layout as kernel_layout
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.models.losses import _weight_tensor
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.quantize.quantization_loss import _factor_per_dim
from spinlock_fast.training import loop
from spinlock_fast.training.cuda_graphs import WARM_UP_STEPS, StepLauncher, _CudaCapture
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.step import StepKind

CPU = torch.device("cpu")
PLAIN, RESET, PARTIAL = StepKind(False, False), StepKind(False, True), StepKind(True, False)


class CallLog:
    """A step and a capture that log their calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, kind: StepKind) -> None:
        self.calls.append(kind)

    def capture(self, step: Callable[[StepKind], None], kind: StepKind, count: int) -> Callable[[], None]:
        self.calls.append(("captured", kind, count))
        return lambda: self.calls.append((kind, count))


def test_steps_are_captured_once_when_warm_and_then_replayed() -> None:
    log = CallLog()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    assert [launcher.run(PLAIN, 100) for _ in range(WARM_UP_STEPS)] == [1] * WARM_UP_STEPS
    assert [launcher.run(PLAIN, most) for most in (100, 4, 3, 1)] == [4, 4, 1, 1]
    assert log.calls == [
        *[PLAIN] * WARM_UP_STEPS,
        ("captured", PLAIN, 4),
        (PLAIN, 4),
        (PLAIN, 4),
        ("captured", PLAIN, 1),
        (PLAIN, 1),
        (PLAIN, 1),
    ]


def test_each_kind_warms_up_by_itself() -> None:
    log = CallLog()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    for kind in [PLAIN, PARTIAL] * WARM_UP_STEPS:
        launcher.run(kind, 1)
    launcher.run(PARTIAL, 1)
    assert log.calls == [*[PLAIN, PARTIAL] * WARM_UP_STEPS, ("captured", PARTIAL, 1), (PARTIAL, 1)]


@pytest.mark.parametrize("graphs", [True, False])
def test_cpu_and_disabled_graphs_run_eagerly(graphs: bool) -> None:
    log = CallLog()
    launcher = StepLauncher(log, CPU, graphs, capture=None if graphs else log.capture)
    assert [launcher.run(PLAIN, 100) for _ in range(6)] == [1] * 6
    assert log.calls == [PLAIN] * 6


def test_failed_capture_warns_once_and_training_continues(caplog: pytest.LogCaptureFixture) -> None:
    log = CallLog()

    def capture(*args: Any) -> Callable[[], None]:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("capture was invalidated")

    launcher = StepLauncher(log, CPU, capture=capture)
    assert [launcher.run(PLAIN, 100) for _ in range(WARM_UP_STEPS + 3)] == [1] * (WARM_UP_STEPS + 3)
    assert log.calls == [PLAIN] * (WARM_UP_STEPS + 3)
    (record,) = caplog.records
    assert "not as CUDA graphs: operation not permitted when stream is capturing more lines" in record.message


def test_captured_work_runs_at_each_call() -> None:
    log = CallLog()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    done: list[str] = []
    again = launcher.captured(lambda: done.append("work"), "validations")
    for _ in range(WARM_UP_STEPS + 2):
        again()
    assert done == ["work"] * (WARM_UP_STEPS + 2)
    assert log.calls == []


class LaunchRecorder(StepLauncher):
    """Records each launch and counts it as the most steps allowed."""

    seen: list[tuple[StepKind, int]]

    def run(self, kind: StepKind, most: int) -> int:
        self.seen.append((kind, most))
        return most


@pytest.mark.parametrize(
    ("rows", "interval", "expected"),
    [
        (70, 0, [(PLAIN, 4), (PARTIAL, 1)] * 2),
        (64, 0, [(PLAIN, 4)] * 2),
        (10, 0, [(PLAIN, 1)] * 2),
        (64, 3, [(PLAIN, 2), (RESET, 1), (PLAIN, 1), (PLAIN, 1), (RESET, 1), (PLAIN, 2)]),
        (70, 5, [(PLAIN, 4), (StepKind(True, True), 1)] * 2),
        (64, 1, [(RESET, 1)] * 8),
    ],
)
def test_loop_launches_consecutive_steps_of_a_kind_together(
    rows: int, interval: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "StepLauncher", LaunchRecorder)
    monkeypatch.setattr(LaunchRecorder, "seen", [], raising=False)
    config = apply_overrides(
        RunConfig(), {"training.batch_size": 16, "training.dead_code_reset_steps": interval, "training.num_epochs": 2}
    )
    settings = CategoricalVQVAEConfig(input_dim=4, group_indices={"a": [0, 1, 2, 3]}, codebook_init="uniform")
    x = torch.randn(rows, 4)
    run = TrainingRun(config, SilentObserver(), lambda: None, CategoricalHierarchicalVQVAE(settings), x, x[:8])
    run.train()
    assert LaunchRecorder.seen == expected


def precision_settings() -> tuple[Any, ...]:
    """The precision of CUDA matrix products, by both of torch's interfaces."""
    found: list[Any] = [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]  # type: ignore[attr-defined]
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return tuple(found)


def set_fp32_precision(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


@pytest.mark.parametrize(
    "user",
    [
        lambda: None,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: set_fp32_precision("tf32"),
        lambda: set_fp32_precision("ieee"),
    ],
)
def test_matmul_precision_is_restored(user: Callable[[], None]) -> None:
    set_fp32_precision("none")
    user()
    before = precision_settings()
    try:
        with cuda_matmul(tf32=True):
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            with cuda_matmul(tf32=False):
                assert not torch.backends.cuda.matmul.allow_tf32
                assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.allow_tf32
        assert precision_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        set_fp32_precision("none")


def test_moved_tensors_discard_the_graphs() -> None:
    log = CallLog()
    launcher = StepLauncher(log, CPU, capture=log.capture)
    for layout in ("first", "first", "second"):
        launcher.check_layout(layout)
        for _ in range(WARM_UP_STEPS + 1):
            launcher.run(PLAIN, 1)
    captures = [said for said in log.calls if said == ("captured", PLAIN, 1)]
    assert len(captures) == 2


class FakeGraph:
    """Replaces torch.cuda.CUDAGraph and torch.cuda.graph; records the options of a capture."""

    options: dict[str, Any]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if arguments:
            FakeGraph.options = options

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def replay(self) -> None: ...


@pytest.fixture
def fake_capture(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """Captures a step without a device."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(table_cache, "is_capturing", lambda device: True)
    return lambda step: _CudaCapture(torch.device("cuda", 0))(lambda kind: step(), PLAIN, 1)


def test_another_thread_cannot_abort_a_capture(fake_capture: Callable[..., Callable[[], None]]) -> None:
    fake_capture(lambda: None)
    assert FakeGraph.options["capture_error_mode"] == "thread_local"


def layouts(count: int) -> list[CodebookLayout]:
    return [CodebookLayout.of([2 + i, 3], [1, 2]) for i in range(count)]


def commitment_factors(i: int) -> Any:
    """Factors of the loss, by batch size."""
    return _factor_per_dim(layouts(1)[0], 0.25 / (i + 1), torch.float32, CPU)


def loss_weights(i: int) -> Any:
    return _weight_tensor((1.0, float(i)), torch.float32, CPU)


def codebook_offsets(i: int) -> Any:
    return launch_helpers.codebook_offsets(CodebookLayout.of([i + 1], [4]), CPU)


def network_offsets(i: int) -> Any:
    return ragged.part_offsets((i + 1,), (i + 1,), CPU)


def topographic_points(i: int) -> Any:
    pytest.importorskip("triton", reason="the package triton is not installed here")
    from spinlock_fast.kernels.topo_loss.triton_forward import point_sets

    return point_sets(i + 1, CodebookLayout.of([4], [4]), CPU)


@pytest.mark.parametrize(
    "table", [commitment_factors, loss_weights, codebook_offsets, network_offsets, topographic_points]
)
def test_cached_tables_live_as_long_as_their_graph(
    table: Callable[[int], Any], fake_capture: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph only has the address of a table; 400 further sizes overflow the bounded cache."""
    with monkeypatch.context() as warm_up:
        warm_up.setattr(table_cache, "is_capturing", lambda device: False)
        table(0)
    seen = []
    replay = fake_capture(lambda: seen.append(weakref.ref(table(0))))
    monkeypatch.setattr(table_cache, "is_capturing", lambda device: False)
    others = [weakref.ref(table(i)) for i in range(1, 401)]
    gc.collect()
    assert seen[0]() is not None
    assert sum(other() is not None for other in others) < 300
    del replay
    gc.collect()
    assert seen[0]() is None


def test_tables_captured_by_a_user_are_kept_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = weakref.ref(commitment_factors(1000))
    monkeypatch.setattr(table_cache, "is_capturing", lambda device: True)
    assert commitment_factors(1000) is kept()
    monkeypatch.undo()
    for i in range(400):
        commitment_factors(i)
    assert kept() is not None


def test_captured_layouts_keep_their_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    def indices() -> Any:
        return CodebookLayout.of([7, 5], [1, 3]).indices(CPU)

    indices()
    monkeypatch.setattr(kernel_layout, "is_capturing", lambda device: True)
    with table_cache.retained_tables() as tables:
        seen = weakref.ref(indices().codebook_of_code)
    monkeypatch.undo()
    layouts(400)
    gc.collect()
    assert seen() is not None
    del tables
    gc.collect()
    assert seen() is None

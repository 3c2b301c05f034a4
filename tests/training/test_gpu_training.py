"""Training on a CUDA device: graphs replay what steps would do, stop, resume, and leave no trace.

Two runs on a GPU differ by rounding (sums in an order that varies), and training amplifies that; tolerances of
losses allow for it over a few epochs and nothing more.
"""

from __future__ import annotations

import copy
import logging
import math
import signal
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_nearest, planted_matrix

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.host_rows import HostRows, place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import DataError, Interrupted
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.metrics import evaluate
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training import row_feed
from spinlock_fast.training.cuda_graphs import STEPS_PER_LAUNCH, WARM_UP_STEPS, dedicated_stream
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.row_feed import StreamedFeed
from spinlock_fast.training.step import StepKind, TrainingStep, learning_rates
from spinlock_fast.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default::UserWarning"),  # torch's own, which differ between versions and devices
]

GROUPS = {"a": list(range(6)), "b": list(range(6, 15)), "c": list(range(15, 20))}
SIZES = [6, 9, 5]
SETTINGS = {
    "device": "cuda",
    "training.batch_size": 64,
    "training.topo_samples": 64,
    "training.num_epochs": 6,
    "training.val_every_n_epochs": 3,
    "training.orthogonality_target": 1.0,
    "model.dropout": 0.0,
}
ROWS = 1100  # 990 to train on: 15 batches of 64 and one of 30


@pytest.fixture(scope="module")
def x() -> np.ndarray[Any, Any]:
    return planted_matrix(ROWS, SIZES, seed=0)


def trainer(observer: SilentObserver | None = None, **options: Any) -> Trainer:
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    return Trainer(apply_overrides(RunConfig(), {**SETTINGS, **dotted}), observer)


def losses(result: TrainResult) -> list[float]:
    return [record.train_loss for record in result.history]


def training_run(x: np.ndarray[Any, Any], stop: Callable[[], int | None] = lambda: None, **options: Any) -> TrainingRun:
    config = trainer(**options).config
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(**config.model.model_dump(), input_dim=20, group_indices=GROUPS)
    ).cuda()
    where = config.training.data_on_device
    parts = (place_rows(RowView(part), resolve_device("cuda"), where) for part in (x[:990], x[990:]))
    run = TrainingRun(config, SilentObserver(), stop, model, *parts)
    initialize_codebooks(model, run.x_train)
    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model__dropout": 0.1},
        {"training__scheduler": "cosine", "training__warmup_epochs": 1},
        {"training__dead_code_reset_steps": 7, "training__dead_code_threshold": 0.5},
        {"model__use_ema": False, "training__optimizer": "adamw", "training__weight_decay": 0.01},
        {"model__rotation_trick": True},
    ],
)
def test_graphs_train_like_eager_steps(x: np.ndarray[Any, Any], options: dict[str, Any]) -> None:
    eager = trainer(training__cuda_graphs=False, **options).fit(x, GROUPS)
    graphs = trainer(**options).fit(x, GROUPS)
    assert losses(graphs) == pytest.approx(losses(eager), rel=0.03)
    assert losses(graphs)[:2] == pytest.approx(losses(eager)[:2], rel=5e-3)
    assert graphs.metrics["val_loss"] == pytest.approx(eager.metrics["val_loss"], rel=0.1)


def test_gpu_training_matches_cpu_training(x: np.ndarray[Any, Any]) -> None:
    """Initial weights, rows and losses are the same; without dropout only rounding (TF32) differs."""
    gpu = trainer().fit(x, GROUPS)
    cpu = trainer(device="cpu").fit(x, GROUPS)
    assert losses(gpu)[0] == pytest.approx(losses(cpu)[0], rel=0.1)  # k-means draws from the device's generator
    assert gpu.metrics["reconstruction_error"] == pytest.approx(cpu.metrics["reconstruction_error"], rel=0.25)
    assert losses(gpu)[-1] < 0.8 * losses(gpu)[0]


def test_every_kind_of_step_is_captured_once(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    run = training_run(x, training__dead_code_reset_steps=7)
    run.train()
    captured = set(run.launcher._replays)
    assert run.launcher.capturing, caplog.text
    assert (StepKind(False, False), STEPS_PER_LAUNCH) in captured
    assert (StepKind(False, True), 1) in captured
    assert (StepKind(True, False), 1) in captured
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_replays_draw_new_dropout_masks(x: np.ndarray[Any, Any]) -> None:
    run = training_run(
        x, training__batch_size=990, training__learning_rate=1e-12, training__num_epochs=8, model__dropout=0.5
    )
    run.train()
    assert run.launcher.capturing
    found = step_losses(run)
    assert len(found) == 8
    assert len(set(found[WARM_UP_STEPS:])) == 8 - WARM_UP_STEPS


def step_losses(run: TrainingRun) -> list[float]:
    return [record.train_loss for record in run.history]


@pytest.mark.parametrize("reset", [False, True])
def test_step_does_not_synchronise(x: np.ndarray[Any, Any], reset: bool) -> None:
    run = training_run(x)
    step = run.training_step
    with dedicated_stream(run.device):
        run._run_steps()
        step.begin_epoch(run.row_order(1), learning_rates(run.training, step.steps_per_epoch, 1), 0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(StepKind(partial_batch=False, reset=reset))
            step(StepKind(partial_batch=True, reset=reset))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_epoch_of_replays_does_not_synchronise(x: np.ndarray[Any, Any]) -> None:
    run = training_run(x)
    with dedicated_stream(run.device):
        for epoch in range(5):  # all kinds are captured after these
            run.epoch, run.step = epoch, 0
            run._run_steps()
        run.epoch, run.step = 5, 0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run._run_steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.training_step.summary().first_nonfinite is None


def test_captured_validation_measures_the_current_model(
    x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = training_run(x)
    with dedicated_stream(run.device):
        for epoch in range(WARM_UP_STEPS + 2):  # the last two are replays of one capture
            run.epoch, run.step = epoch, 0
            run._run_steps()
            kept = run._validate()
            found = evaluate(run.model, run.x_val, run.training)
            for name, value in kept.items():
                assert value == pytest.approx(found[name], rel=1e-5, abs=1e-6), name
            assert run.model.training
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run._run_validation()
            run.validation.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert "one by one" not in caplog.text


class StopAt(SilentObserver):
    """Stops a trainer after an epoch and keeps the saved state."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.trainer: Trainer | None = None
        self.state: dict[str, Any] = {}

    def epoch_finished(self, record: Any) -> None:
        if record.epoch == self.epoch and self.trainer is not None:
            self.trainer.stop(signal.SIGTERM)  # noticed after the first launch of the next epoch

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)


@pytest.mark.usefixtures("short_halves")
@pytest.mark.parametrize("where", ["always", "never"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_interrupted_run_resumes_equally(x: np.ndarray[Any, Any], dropout: float, where: str) -> None:
    options = {"model__dropout": dropout, "training__data_on_device": where}
    whole = trainer(**options).fit(x, GROUPS)
    observer = StopAt(epoch=4)
    broken = observer.trainer = trainer(observer, **options)
    with pytest.raises(Interrupted):
        broken.fit(x, GROUPS)
    assert 4 <= observer.state["epoch"] <= 5  # an epoch is heard of when the next one was launched
    assert 1 <= observer.state["step"] <= STEPS_PER_LAUNCH
    resumed = trainer(**options).fit(x, GROUPS, resume=observer.state)
    assert losses(resumed)[:4] == pytest.approx(losses(whole)[:4], rel=0.02)
    assert losses(resumed) == pytest.approx(losses(whole), rel=0.05)
    assert len(losses(resumed)) == len(losses(whole))


def test_run_resumes_on_another_device(x: np.ndarray[Any, Any]) -> None:
    observer = StopAt(epoch=2)
    broken = observer.trainer = trainer(observer)
    with pytest.raises(Interrupted):
        broken.fit(x, GROUPS)
    from spinlock_fast.checkpoints.host_copies import to_cpu

    whole = trainer().fit(x, GROUPS)
    resumed = trainer(device="cpu").fit(x, GROUPS, resume=to_cpu(observer.state))
    assert losses(resumed) == pytest.approx(losses(whole), rel=0.05)


def test_a_gpu_model_is_the_same_model_on_a_cpu(x: np.ndarray[Any, Any]) -> None:
    result = trainer().fit(x, GROUPS)
    model = result.model
    data = torch.from_numpy(x)
    latents = model.encode(data.cuda()).detach().cpu()
    tokens = model.get_tokens(data.cuda()).cpu()
    decoded = model.decode_from_tokens(tokens.cuda()).cpu()
    on_cpu = copy.deepcopy(model).cpu()
    on_cpu.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    torch.testing.assert_close(on_cpu.encode(data), latents, rtol=1e-4, atol=1e-4)
    assert_nearest(tokens, latents, on_cpu.quantizer.embedding, on_cpu.quantizer.layout)
    same = (on_cpu.get_tokens(data) == tokens).float().mean()
    assert same > 0.999
    torch.testing.assert_close(on_cpu.decode_from_tokens(tokens), decoded, rtol=1e-4, atol=1e-4)
    training = trainer().config.training
    there, here = evaluate(model, data.cuda(), training), evaluate(on_cpu, data, training)
    assert there["val_loss"] == pytest.approx(here["val_loss"], rel=1e-3)
    assert there["utilization"] == pytest.approx(here["utilization"], abs=0.02)


def test_synchronising_step_warns_and_training_continues(
    x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = TrainingStep.__call__

    def synchronising_step(self: TrainingStep, kind: StepKind) -> None:
        original(self, kind)
        float(self.loss_values.sum())

    monkeypatch.setattr(TrainingStep, "__call__", synchronising_step)
    result = trainer().fit(x, GROUPS)
    assert math.isfinite(result.metrics["val_loss"])
    assert caplog.text.count("not as CUDA graphs") == 1
    assert "test_gpu_training.py" in caplog.text


def test_broken_capture_warns_and_training_continues(
    x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = TrainingStep.__call__

    def capture_breaking_step(self: TrainingStep, kind: StepKind) -> None:
        original(self, kind)
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()  # not allowed in a capture

    monkeypatch.setattr(TrainingStep, "__call__", capture_breaking_step)
    result = trainer(model__dropout=0.1).fit(x, GROUPS)
    monkeypatch.undo()
    assert caplog.text.count("not as CUDA graphs") == 1
    eager = trainer(model__dropout=0.1, training__cuda_graphs=False).fit(x, GROUPS)
    assert losses(result) == pytest.approx(losses(eager), rel=0.03)
    again = trainer().fit(x, GROUPS)  # the device still captures
    assert math.isfinite(again.metrics["val_loss"])
    assert caplog.text.count("not as CUDA graphs") == 1


def test_caller_settings_and_random_state_are_restored(x: np.ndarray[Any, Any]) -> None:
    def settings() -> tuple[Any, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            matmul.fp32_precision,
            torch.get_float32_matmul_precision(),
            torch.cuda.get_sync_debug_mode(),
            torch.cuda.current_stream(),
            torch.cuda.current_device(),
            torch.cuda.get_rng_state().tolist(),
            torch.get_rng_state().tolist(),
        )

    before = settings()
    trainer(model__dropout=0.1).fit(x, GROUPS)
    assert settings() == before


def test_rows_that_do_not_fit_are_rejected_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Any:
        if args[:1] == ((990, 20),):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(DataError, match=r"990 rows of 20 features take 0\.00 GB, but cuda has [\d.]+ GB free"):
        trainer(training__data_on_device="always").fit(planted_matrix(ROWS, SIZES, seed=0), GROUPS)


@pytest.fixture
def short_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of six steps: an epoch has two full chunks and a partial one."""
    monkeypatch.setattr(row_feed, "_HALF_BUFFER_BYTES", 6 * 64 * 20 * 4)


@pytest.mark.usefixtures("short_halves")
def test_streamed_rows_are_complete_while_steps_read_them() -> None:
    """Steps are slow and launched far ahead of the device; rows are sent as soon as events allow."""
    x = torch.randn(990, 20)
    feed = StreamedFeed(HostRows(RowView(x.numpy()), torch.device("cuda:0")), 64, -(-len(x) // 64))
    there = x.cuda()
    with dedicated_stream(there.device):
        wrong = torch.zeros(16, dtype=torch.int64, device="cuda")
        orders = torch.stack([torch.randperm(990) for _ in range(6)])
        places, on_device = (torch.arange(990) % len(feed.table)).cuda(), orders.cuda()
        for order, numbers in zip(orders, on_device, strict=True):
            assert torch.equal(feed.begin_epoch(order, 0), torch.arange(990) % len(feed.table))
            for step in range(16):
                assert feed.steps_available(step) >= 1
                torch.cuda._sleep(500_000)
                mine = slice(64 * step, 64 * (step + 1))
                wrong[step] += (feed.table[places[mine]] != there[numbers[mine]]).sum()
    assert wrong.tolist() == [0] * 16


@pytest.mark.usefixtures("short_halves")
def test_replayed_steps_read_the_rows_of_their_order(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    run = training_run(x, training__data_on_device="never")
    assert isinstance(run.x_train, HostRows)
    step = run.training_step
    seen = torch.zeros(step.steps_per_epoch, step.batch_size, 20, device="cuda")
    encode = step.model.encode_and_quantize

    def recorded(batch: torch.Tensor) -> Any:
        seen[:, : len(batch)].index_copy_(0, step._step_index, batch.detach()[None])
        return encode(batch)

    step.model.encode_and_quantize = recorded  # type: ignore[method-assign]
    with dedicated_stream(run.device):
        for epoch in range(WARM_UP_STEPS + 3):
            seen.zero_()
            run.epoch, run.step = epoch, 0
            run._run_steps()
            assert torch.equal(seen.flatten(0, 1)[:990].cpu(), torch.from_numpy(x)[run.row_order(epoch)])
    assert (StepKind(False, False), STEPS_PER_LAUNCH) in run.launcher._replays
    assert (StepKind(True, False), 1) in run.launcher._replays
    assert "one by one" not in caplog.text


@pytest.mark.usefixtures("short_halves")
@pytest.mark.parametrize("deterministic", [False, True])
def test_streamed_training_equals_resident_training(x: np.ndarray[Any, Any], deterministic: bool) -> None:
    """Bit-identical if two resident runs are; otherwise their distance is a multiple of that of two resident runs."""
    options = {
        "model__dropout": 0.1,
        "training__test_fraction": 0.1,
        "training__mixup_scale": 0.2,
        "training__input_noise": 0.1,
    }
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        resident, again, streamed = (
            trainer(training__data_on_device=where, **options).fit(x, GROUPS) for where in ("always", "always", "never")
        )
    finally:
        torch.use_deterministic_algorithms(False)
    noise, found = weight_distance(resident, again), weight_distance(resident, streamed)
    assert found <= 20.0 * noise, f"{found} instead of {noise}"
    if noise == 0.0:
        assert {**resident.metrics, "seconds": 0} == {**streamed.metrics, "seconds": 0}
        assert losses(resident) == losses(streamed)
    assert losses(streamed) == pytest.approx(losses(resident), rel=0.03)


def weight_distance(a: TrainResult, b: TrainResult) -> float:
    """Largest difference of the final weights of two runs."""
    states = a.final_state["model_state_dict"], b.final_state["model_state_dict"]
    return max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])


def test_exploding_loss_raises_from_replays(x: np.ndarray[Any, Any]) -> None:
    from spinlock_fast.errors import TrainingError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrainingError, match=r"the \w+ loss is not finite from step \d+"):
            trainer(training__learning_rate=1e30).fit(x, GROUPS)

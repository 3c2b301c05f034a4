"""The training step: rows, learning rates, and no host synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from graph_recording import DeviceOnly, HostNeededError, lasting_tensors, record
from helpers import planted_matrix
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.models.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training import cuda_graphs, loop, row_feed
from spinlock_fast.training import step as step_module
from spinlock_fast.training.cuda_graphs import StepLauncher
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.step import StepKind, TrainingStep, learning_rates
from spinlock_fast.training.trainer import Trainer

GROUPS = {"a": list(range(6)), "b": list(range(6, 15)), "c": list(range(15, 20))}
ROWS = 270
SETTINGS = {"device": "cpu", "training.batch_size": 64, "training.topo_samples": 48, "training.num_epochs": 6}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"model.rotation_trick": True},
    {"model.use_ema": False},
    {"training.optimizer": "adamw", "training.weight_decay": 0.01},
    {"training.dead_code_strategy": "sample"},
    {"training.topo_weight": 0.0, "training.orthogonality_weight": 0.0},
    {"training.mixup_scale": 0.5, "training.input_noise": 0.3, "training.mixup_decay": True},
]


def settings(options: dict[str, Any]) -> RunConfig:
    return apply_overrides(RunConfig(), {**SETTINGS, **options})


@pytest.fixture(autouse=True)
def _reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the CPU kernels, whose operations torch cannot record."""
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "reference")


def warmed_up_step(options: dict[str, Any]) -> TrainingStep:
    """A step at the start of an epoch, with initialised optimizer state and codes."""
    config = settings(options)
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(**config.model.model_dump(), input_dim=20, group_indices=GROUPS)
    )
    x = torch.from_numpy(planted_matrix(ROWS, [6, 9, 5], seed=0))
    with torch.no_grad():
        model.quantizer.initialize(model.encode(x))
    step = TrainingStep(model.train(), x, config.training)
    begin_epoch_of(step)
    step(StepKind(partial_batch=False, reset=True))
    begin_epoch_of(step)
    return step


def begin_epoch_of(step: TrainingStep, epoch: int = 0) -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
    step.begin_epoch(order, learning_rates(step.training, step.steps_per_epoch, epoch), 0)


def recorded_batches(step: TrainingStep, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of the model and reconstruction targets of every step from now on."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    encode, terms = step.model.encode_and_quantize, loss_terms
    monkeypatch.setattr(step.model, "encode_and_quantize", lambda x: inputs.append(x) or encode(x))
    monkeypatch.setattr(step_module, "loss_terms", lambda model, x, *rest: targets.append(x) or terms(model, x, *rest))
    return inputs, targets


def test_input_noise_does_not_change_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    step = warmed_up_step({"training.input_noise": 0.3})
    step.begin_epoch(torch.arange(ROWS), learning_rates(step.training, step.steps_per_epoch, 0), 0)
    inputs, targets = recorded_batches(step, monkeypatch)
    step(StepKind(partial_batch=False, reset=False))
    assert torch.equal(targets[0], step.x[:64])
    assert 0.27 < float((inputs[0] - targets[0]).std()) < 0.33


@pytest.mark.parametrize(("decay", "max_share"), [(False, 0.25), (True, 0.125)])
def test_mixup_rows_lie_on_the_line_to_the_next_row(
    monkeypatch: pytest.MonkeyPatch, decay: bool, max_share: float
) -> None:
    """Inputs and targets are mixed alike; with `mixup_decay` the scale follows the learning rate."""
    step = warmed_up_step({"training.mixup_scale": 0.25, "training.mixup_decay": decay})
    inputs, targets = recorded_batches(step, monkeypatch)
    step.begin_epoch(torch.arange(ROWS), torch.full([step.steps_per_epoch], 0.5e-3), 0)  # half the rate of the settings
    step(StepKind(partial_batch=False, reset=False))
    assert torch.equal(inputs[0], targets[0])
    rows = step.x[:64]
    difference = rows.roll(-1, 0) - rows
    share = ((targets[0] - rows) * difference).sum(1) / difference.square().sum(1)
    torch.testing.assert_close(targets[0], rows + share[:, None] * difference)
    assert float(share.min()) < -0.8 * max_share
    assert float(share.max()) > 0.8 * max_share
    assert float(share.abs().max()) <= max_share * (1.0 + 1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_step_has_no_operation_that_synchronises(options: dict[str, Any]) -> None:
    step = warmed_up_step(options)
    with DeviceOnly() as mode:
        for partial_batch, reset in ((False, False), (False, True), (True, False)):
            step(StepKind(partial_batch, reset))
    assert mode.operations > 300  # the backward pass is watched, too


@pytest.mark.parametrize("options", OPTIONS)
def test_step_copies_nothing_to_the_device(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device acts as the accelerator: it has no values to read, and the host is another device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # unknown to that device
    config = settings(options)
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(
            **{**config.model.model_dump(), "codebook_init": "uniform"}, input_dim=20, group_indices=GROUPS
        )
    ).to("meta")
    x = torch.zeros(64, 20, device="meta")

    def losses_and_reset() -> None:
        out = model(x)
        terms = loss_terms(model, x, out, 48)
        terms.total(LossWeights.of(config.training)).backward()
        model.reset_dead_codes(0.05, config.training.dead_code_strategy, 0.25, out["latents"].detach())

    losses_and_reset()  # index tensors are made, and copied, once
    with DeviceOnly() as mode:
        losses_and_reset()
    assert mode.operations > 250


@pytest.mark.parametrize(
    "needy",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.bincount(x.to(torch.int64).abs()),
        lambda x: x.to(torch.int64).abs().repeat_interleave(x.to(torch.int64).abs()),
        lambda x: x + torch.tensor([1.0]),
        lambda x: torch.equal(x, x),
        lambda x: torch.empty_like(x, device="meta").copy_(x),
        lambda x: x.to("meta"),
    ],
)
def test_device_only_mode_detects_synchronisation(needy: Callable[[Tensor], object]) -> None:
    x = torch.randn(8)
    with pytest.raises(HostNeededError), DeviceOnly():
        needy(x)


@pytest.mark.parametrize("options", OPTIONS)
def test_persistent_tensors_keep_their_addresses(options: dict[str, Any]) -> None:
    """CUDA graphs read and write fixed addresses."""
    step = warmed_up_step(options)
    before = {name: value.data_ptr() for name, value in lasting_tensors(step).items()}
    for kind in (StepKind(False, False), StepKind(False, True), StepKind(True, False)):
        step(kind)
    begin_epoch_of(step, 1)
    assert {name: value.data_ptr() for name, value in lasting_tensors(step).items()} == before


class RecordingLauncher(StepLauncher):
    """Replays recorded operations on a CPU, as CUDA graphs are replayed."""

    made: list[RecordingLauncher]

    def __init__(self, step: TrainingStep, device: torch.device, graphs: bool, **options: Any) -> None:
        super().__init__(step, device, graphs, lambda _, kind, count: self.recorded(step, kind, count), **options)
        self.kinds: list[tuple[StepKind, int]] = []
        self.made.append(self)

    def recorded(self, step: TrainingStep, kind: StepKind, count: int) -> Any:
        self.kinds.append((kind, count))
        return record(step, kind, count)


def trained(options: dict[str, Any]) -> TrainResult:
    config = settings({"training.orthogonality_target": 1.0, "training.dead_code_reset_interval": 4, **options})
    return Trainer(config).fit(planted_matrix(600, [6, 9, 5], seed=0), GROUPS)


@pytest.mark.parametrize(
    "options",
    [
        {"training.scheduler": "cosine", "training.warmup_epochs": 2},
        {"training.dead_code_reset_steps": 7, "training.dead_code_threshold": 0.9},
        {"model.use_ema": False, "training.optimizer": "adamw", "training.weight_decay": 0.01},
        {"training.data_on_device": "never"},
    ],
)
def test_recorded_steps_train_like_eager_steps(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording must not freeze rates, rows, dropout, moving averages or resets."""
    monkeypatch.setattr(row_feed, "_HALF_BUFFER_BYTES", 3 * 64 * 20 * 4)  # three steps per half
    plain = trained(options)
    monkeypatch.setattr(RecordingLauncher, "made", [], raising=False)
    monkeypatch.setattr(loop, "StepLauncher", RecordingLauncher)
    monkeypatch.setattr(cuda_graphs, "STEPS_PER_LAUNCH", 2)
    replayed = trained(options)
    kinds = RecordingLauncher.made[0].kinds
    assert (StepKind(partial_batch=False, reset=False), 2) in kinds
    assert (StepKind(partial_batch=True, reset=False), 1) in kinds
    assert len(set(kinds)) == len(kinds)
    for name, value in plain.final_state["model_state_dict"].items():
        torch.testing.assert_close(replayed.final_state["model_state_dict"][name], value, rtol=0, atol=0)
    assert [r.train_loss for r in replayed.history] == [r.train_loss for r in plain.history]


def test_every_row_is_used_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    step = warmed_up_step({})
    inputs, _ = recorded_batches(step, monkeypatch)
    for position in range(step.steps_per_epoch):
        step(step.kind(position, reset=False))
    assert [len(x) for x in inputs] == [64, 64, 64, 64, 14]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(inputs), step.x[order])


def test_every_step_uses_its_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    step = warmed_up_step({"training.scheduler": "cosine", "training.warmup_epochs": 1})
    rates = learning_rates(step.training, step.steps_per_epoch, 0)
    assert len(set(rates.tolist())) == step.steps_per_epoch
    seen: list[float] = []
    monkeypatch.setattr(step.optimizer, "step", lambda: seen.append(float(step.optimizer.rate)))
    for position in range(step.steps_per_epoch):
        step(step.kind(position, reset=False))
    assert seen == rates.tolist()


def test_step_launches_few_operations_besides_model_and_losses() -> None:
    """Every operation is a kernel launch of some microseconds."""
    step = warmed_up_step({})
    x = step.x[: step.batch_size]

    def networks_and_losses() -> None:
        terms = loss_terms(step.model, x, step.model(x), step.training.topo_samples)
        terms.backward(step.weights)

    with DeviceOnly() as whole:
        step(StepKind(partial_batch=False, reset=False))
    step.optimizer.zero_grad()
    with DeviceOnly() as inside:
        networks_and_losses()
    views = {"select": 1, "unsqueeze": 1}
    # Row numbers, rate and rows; step counters of optimizer and epoch; total loss, stored with its terms; Adam.
    launches = {"index_select": 3, "add_": 2, "dot": 1, "stack": 2, "index_copy_": 1, "_fused_adam_": 1}
    assert whole.seen - inside.seen == {**views, **launches}
    assert not inside.seen - whole.seen


def test_summary_weights_rows_equally_and_finds_the_first_nonfinite_term() -> None:
    step = warmed_up_step({"training.topo_weight": 0.0})
    step.loss_values[:] = torch.arange(5.0)[:, None]
    found = step.summary()
    assert found.first_nonfinite is None
    assert found.loss == pytest.approx((64 * (0 + 1 + 2 + 3) + 14 * 4) / 270)
    assert found.terms == [found.loss] * len(LossTerms._fields)
    step.loss_values[1, 1 + LossTerms._fields.index("topographic")] = torch.nan  # of weight 0
    assert step.summary().first_nonfinite is None
    step.loss_values[3, 1] = torch.inf
    step.loss_values[2, 3] = step.loss_values[2, 2] = torch.nan
    assert step.summary().first_nonfinite == (2, 1)


def test_learning_rates_warm_up_and_follow_the_cosine() -> None:
    training = TrainingConfig(num_epochs=4, warmup_epochs=1, scheduler="cosine", learning_rate=0.1)
    rates = torch.cat([learning_rates(training, 2, epoch) for epoch in range(4)])
    cosine = 0.05 * (1 + torch.cos(torch.pi * torch.arange(6, dtype=torch.float64) / 6))
    torch.testing.assert_close(rates, torch.cat([torch.tensor([0.05, 0.1], dtype=torch.float64), cosine]))


def test_load_keeps_addresses() -> None:
    step, other = warmed_up_step({}), warmed_up_step({})
    state = copy.deepcopy(other.state())
    state["optimizer_state_dict"]["param_groups"][0]["lr"] = 5.0
    before = {name: value.data_ptr() for name, value in lasting_tensors(step).items()}
    step(StepKind(False, False))
    step.load(state)
    assert {name: value.data_ptr() for name, value in lasting_tensors(step).items()} == before
    assert float(step.optimizer.rate) == pytest.approx(1e-3)
    assert int(step.optimizer.count) == int(other.optimizer.count)
    for here, there in zip(step.optimizer.mean, other.optimizer.mean, strict=True):
        assert torch.equal(here, there)

"""The training step: its rows, its rates, and that a device can make it without the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import planted_matrix
from recording import DeviceOnly, HostNeededError, lasting_tensors, record
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.models.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training import cuda_graphs, loop, row_feed
from spinlock_fast.training.cuda_graphs import StepLauncher
from spinlock_fast.training.step import StepKind, TrainingStep, _rates_in, learning_rates
from spinlock_fast.training.trainer import Trainer, TrainResult

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
    {"training.mixing": 0.5, "training.input_noise": 0.3, "training.mixing_decays": True},
]


def settings(options: dict[str, Any]) -> RunConfig:
    return apply_overrides(RunConfig(), {**SETTINGS, **options})


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the CPU kernels, whose work torch cannot see."""
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "reference")


def made(options: dict[str, Any]) -> TrainingStep:
    """A step whose optimizer has its state and whose codes are fitted, at the start of an epoch."""
    config = settings(options)
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(**config.model.model_dump(), input_dim=20, group_indices=GROUPS)
    )
    x = torch.from_numpy(planted_matrix(ROWS, [6, 9, 5], seed=0))
    with torch.no_grad():
        model.quantizer.initialize(model.encode(x))
    step = TrainingStep(model.train(), x, config.training)
    begin(step)
    step(StepKind(last=False, reset=True))
    begin(step)
    return step


def begin(step: TrainingStep, epoch: int = 0) -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
    step.begin_epoch(order, learning_rates(step.training, step.count, epoch), 0)


def test_noise_reaches_the_inputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model reads rows moved by the noise; its errors count against the rows as they are."""
    step = made({"training.input_noise": 0.3})
    step.begin_epoch(torch.arange(ROWS), learning_rates(step.training, step.count, 0), 0)
    read: list[Tensor] = []
    aims: list[Tensor] = []
    model, terms = step._model, step._terms
    monkeypatch.setattr(step, "_model", lambda x: read.append(x) or model(x))
    monkeypatch.setattr(step, "_terms", lambda x, *rest: aims.append(x) or terms(x, *rest))
    step(StepKind(last=False, reset=False))
    assert torch.equal(aims[0], step.x[:64])
    assert 0.27 < float((read[0] - aims[0]).std()) < 0.33


@pytest.mark.parametrize(("decays", "most"), [(False, 0.25), (True, 0.125)])
def test_mixed_rows_lie_on_the_line_to_the_next_row(monkeypatch: pytest.MonkeyPatch, decays: bool, most: float) -> None:
    """They are both what the model reads and what it is to give; the way may shrink with the learning rate."""
    step = made({"training.mixing": 0.25, "training.mixing_decays": decays})
    read: list[Tensor] = []
    aims: list[Tensor] = []
    model, terms = step._model, step._terms
    monkeypatch.setattr(step, "_model", lambda x: read.append(x) or model(x))
    monkeypatch.setattr(step, "_terms", lambda x, *rest: aims.append(x) or terms(x, *rest))
    step.begin_epoch(torch.arange(ROWS), torch.full([step.count], 0.5e-3), 0)  # half the rate of the settings
    step(StepKind(last=False, reset=False))
    assert torch.equal(read[0], aims[0])
    rows = step.x[:64]
    way = rows.roll(-1, 0) - rows
    share = ((aims[0] - rows) * way).sum(1) / way.square().sum(1)
    torch.testing.assert_close(aims[0], rows + share[:, None] * way)
    assert float(share.min()) < -0.8 * most
    assert float(share.max()) > 0.8 * most
    assert float(share.abs().max()) <= most * (1.0 + 1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_no_operation_of_a_step_needs_the_host(options: dict[str, Any]) -> None:
    step = made(options)
    with DeviceOnly() as mode:
        for kind in (StepKind(last=False, reset=False), StepKind(last=False, reset=True), StepKind(True, False)):
            step(kind)
    assert mode.operations > 300  # the backward pass is watched, too


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_on_a_device_without_values_copies_nothing_there(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device plays the accelerator: it has no values to read, and the host is another device."""
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
def test_the_watch_finds_what_needs_the_host(needy: Callable[[Tensor], object]) -> None:
    x = torch.randn(8)
    with pytest.raises(HostNeededError), DeviceOnly():
        needy(x)


@pytest.mark.parametrize("options", OPTIONS)
def test_what_lasts_keeps_its_place(options: dict[str, Any]) -> None:
    """A CUDA graph reads and writes addresses."""
    step = made(options)
    before = {name: value.data_ptr() for name, value in lasting_tensors(step).items()}
    for kind in (StepKind(False, False), StepKind(False, True), StepKind(True, False)):
        step(kind)
    begin(step, 1)
    assert {name: value.data_ptr() for name, value in lasting_tensors(step).items()} == before


class RecordingLauncher(StepLauncher):
    """Replays recorded operations on a CPU, as CUDA graphs are replayed."""

    made: list[RecordingLauncher]

    def __init__(self, step: TrainingStep, device: torch.device, graphs: bool) -> None:
        super().__init__(step, device, graphs, lambda _, kind, count: self.recorded(step, kind, count))
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
def test_recorded_steps_train_like_steps_one_by_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates, rows, dropout, moving averages, resets: nothing that changes may be fixed by recording it once."""
    monkeypatch.setattr(row_feed, "_HALF_BYTES", 3 * 64 * 20 * 4)  # of three steps, where rows do not lie on the device
    plain = trained(options)
    monkeypatch.setattr(RecordingLauncher, "made", [], raising=False)
    monkeypatch.setattr(loop, "StepLauncher", RecordingLauncher)
    monkeypatch.setattr(cuda_graphs, "STEPS_PER_LAUNCH", 2)
    replayed = trained(options)
    kinds = RecordingLauncher.made[0].kinds
    assert (StepKind(last=False, reset=False), 2) in kinds
    assert (StepKind(last=True, reset=False), 1) in kinds
    assert len(set(kinds)) == len(kinds)
    for name, value in plain.final_state["model_state_dict"].items():
        torch.testing.assert_close(replayed.final_state["model_state_dict"][name], value, rtol=0, atol=0)
    assert [r.train_loss for r in replayed.history] == [r.train_loss for r in plain.history]


def test_every_row_is_seen_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    step = made({})
    seen: list[Tensor] = []
    forward = step._model
    monkeypatch.setattr(step, "_model", lambda x: seen.append(x) or forward(x))
    for position in range(step.count):
        step(step.kind(position, reset=False))
    assert [len(x) for x in seen] == [64, 64, 64, 64, 14]
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(seen), step.x[order])


def test_every_step_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    step = made({"training.scheduler": "cosine", "training.warmup_epochs": 1})
    rates = learning_rates(step.training, step.count, 0)
    assert len(set(rates.tolist())) == step.count
    seen: list[float] = []
    monkeypatch.setattr(step.optimizer, "step", lambda: seen.append(float(step.optimizer.rate)))
    for position in range(step.count):
        step(step.kind(position, reset=False))
    assert seen == rates.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_lie_in_a_plan_as_their_bits(dtype: torch.dtype) -> None:
    plan = torch.arange(12).view(3, 4)
    rates = torch.tensor([1e-3, 0.1, 3.0], dtype=torch.float64)
    _rates_in(plan, dtype).copy_(rates)
    assert torch.equal(plan[:, :3], torch.arange(12).view(3, 4)[:, :3])
    chosen = torch.zeros(1, 4, dtype=torch.int64)
    here = _rates_in(chosen, dtype)
    torch.index_select(plan, 0, torch.tensor([1]), out=chosen)
    assert here.shape == (1,)
    assert torch.equal(here, rates[1:2].to(dtype))


def test_a_step_launches_little_besides_the_model_and_its_losses() -> None:
    """Every operation is a launch on a device, and they are of microseconds."""
    step = made({})
    x = step.x[: step.batch]

    def networks_and_losses() -> None:
        terms = loss_terms(step.model, x, step.model(x), step.training.topo_samples)
        terms.backward(step.weights)

    with DeviceOnly() as whole:
        step(StepKind(last=False, reset=False))
    step.optimizer.zero_grad()
    with DeviceOnly() as inside:
        networks_and_losses()
    views = {"select": 1, "slice": 1, "unsqueeze": 1}
    # Rows and rate; features; steps done and position; the loss, values together and in their place; Adam.
    launches = {"index_select": 2, "add_": 2, "dot": 1, "stack": 2, "index_copy_": 1, "_fused_adam_": 1}
    assert whole.seen - inside.seen == {**views, **launches}
    assert not inside.seen - whole.seen


def test_the_summary_weighs_every_row_alike_and_finds_the_first_bad_term() -> None:
    step = made({"training.topo_weight": 0.0})
    step.values[:] = torch.arange(5.0)[:, None]
    found = step.summary()
    assert found.first_bad is None
    assert found.loss == pytest.approx((64 * (0 + 1 + 2 + 3) + 14 * 4) / 270)
    assert found.terms == [found.loss] * len(LossTerms._fields)
    step.values[1, 1 + LossTerms._fields.index("topographic")] = torch.nan  # of weight 0
    assert step.summary().first_bad is None
    step.values[3, 1] = torch.inf
    step.values[2, 3] = step.values[2, 2] = torch.nan
    assert step.summary().first_bad == (2, 1)


def test_rates_warm_up_and_follow_the_cosine() -> None:
    training = TrainingConfig(num_epochs=4, warmup_epochs=1, scheduler="cosine", learning_rate=0.1)
    rates = torch.cat([learning_rates(training, 2, epoch) for epoch in range(4)])
    cosine = 0.05 * (1 + torch.cos(torch.pi * torch.arange(6, dtype=torch.float64) / 6))
    torch.testing.assert_close(rates, torch.cat([torch.tensor([0.05, 0.1], dtype=torch.float64), cosine]))


def test_a_loaded_state_lies_where_the_old_one_did() -> None:
    step, other = made({}), made({})
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

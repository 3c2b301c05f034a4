"""One training step as the device sees it: rows, losses, gradients, codes, all without a word to the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.streams import defer, deferred_scope
from spinlock_fast.kernels.augment import augmented_rows
from spinlock_fast.models.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.optimizer import FusedAdam
from spinlock_fast.training.row_feed import feed_rows


class StepKind(NamedTuple):
    """What the host must know of a step before it starts."""

    last: bool  # the rows that are left over at the end of an epoch, fewer than a batch
    reset: bool  # dead codes are replaced after it


class EpochSummary(NamedTuple):
    """What the steps of an epoch left on the device."""

    loss: float
    terms: list[float]  # unweighted means over rows, in the order of LossTerms
    utilization: float
    first_bad: tuple[int, int] | None  # step of the epoch and term that first was not finite


class TrainingStep:
    """A step that finds its rows and its learning rate by a counter on the device.

    Nothing in `__call__` waits for the device or depends on a value of the host that changes from step
    to step, so that it can be captured once and replayed: the order of rows, the rates and the values
    of the loss lie in tensors that keep their place.

    Args:
        model: in training mode while steps run.
        rows: [N, F] training rows, for the model's device.
        training: settings.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, rows: Rows, training: TrainingConfig) -> None:
        self.model = model
        self.training = training
        self.weights = LossWeights.of(training)
        self.rows, device = rows.shape[0], rows.device
        self.batch = min(training.batch_size, self.rows)
        self.feed = feed_rows(rows, self.batch)
        self.x = self.feed.table
        self.full, self.rest = divmod(self.rows, self.batch)  # steps of a whole batch, rows of the last step
        self.count = self.full + (self.rest > 0)  # steps of an epoch
        on_cuda = device.type == "cuda"
        # What each step of an epoch needs, in one table so that one operation finds it: places of rows in x, and the
        # bits of the rate. The fused kernels read the rate on the device: float32 there, a double on the CPU.
        self._plan = torch.zeros(self.count, self.batch + 1, dtype=torch.int64, device=device)
        self._now = torch.zeros(1, self.batch + 1, dtype=torch.int64, device=device)
        self._rate_type = torch.float32 if on_cuda else torch.float64
        self._rate = _rates_in(self._now, self._rate_type)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self.values = torch.zeros(self.count, 1 + len(LossTerms._fields), device=device)  # loss and terms of each step
        self._sizes = torch.full((self.count, 1), self.batch, dtype=torch.float64, device=device)
        if self.rest:
            self._sizes[-1] = self.rest
        self._weighted = torch.tensor([weight != 0.0 for weight in self.weights], device=device)
        self.optimizer = FusedAdam(
            model.parameters(), self._rate, training.weight_decay, decoupled=training.optimizer == "adamw"
        )
        self._terms = self._loss_terms
        self._model: Any = model.to_codes  # decoding is done beside the other terms of the loss
        if training.use_torch_compile and on_cuda:
            # A shape of its own for the last batch: one graph for any shape would be slower for both.
            compiled = torch.compile(model, dynamic=False)
            self._model = lambda x: (compiled(x), None)
            self._terms = torch.compile(self._loss_terms, dynamic=False)

    def kind(self, position: int, reset: bool) -> StepKind:
        """The kind of the step at a position of the epoch."""
        return StepKind(last=position >= self.full, reset=reset)

    def begin_epoch(self, order: Tensor, rates: Tensor, done: int) -> None:
        """Sets the order of rows [N] and the rate of each step; `done` steps of the epoch have been made."""
        order = self.feed.begin(order, done)
        plan = torch.zeros(self._plan.shape, dtype=torch.int64, pin_memory=self._plan.is_cuda)
        whole = self.full * self.batch
        plan[: self.full, : self.batch] = order[:whole].view(self.full, self.batch)
        if self.rest:
            plan[self.full, : self.rest] = order[whole:]
        _rates_in(plan, self._rate_type).copy_(rates)
        self._plan.copy_(plan, non_blocking=True)
        self._position.fill_(done)
        if done == 0:
            self.values.zero_()

    def places(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Where every tensor of the model lies: its address and strides.

        Raises:
            RuntimeError: the model has other parameters than those that the optimizer moves.
        """
        parameters = list(self.model.parameters())
        moved = self.optimizer.parameters
        if len(parameters) != len(moved) or any(a is not b for a, b in zip(parameters, moved, strict=True)):
            raise RuntimeError(
                "parameters of the model were replaced, as by load_state_dict(assign=True), and would not be trained:"
                " replace them before the training starts"
            )
        return tuple((t.data_ptr(), t.stride()) for t in (*parameters, *self.model.buffers()))

    def __call__(self, kind: StepKind) -> None:
        """The next step."""
        torch.index_select(self._plan, 0, self._position, out=self._now)
        x, seen = self._rows(self.rest if kind.last else self.batch)
        with self._precision(), deferred_scope(self.x.device):
            out, move_codes = self._model(seen)
            terms = self._terms(x, out, move_codes)
            defer(lambda: self._note(terms), [self.values, *terms], after_deferred=True)
            self.optimizer.zero_grad()
            terms.backward(self.weights)
        self.optimizer.step()
        if kind.reset:
            self.reset_dead_codes(out["latents"].detach())

    @torch.no_grad()
    def _note(self, terms: LossTerms) -> None:
        """Keeps the values of a step, and goes on to the next."""
        values = torch.stack([terms.total(self.weights), *terms])
        self.values.index_copy_(0, self._position, values[None])
        self._position.add_(1)

    def reset_dead_codes(self, latents: Tensor | None) -> Tensor:
        """Replaces dead codes as the settings say; [G] how many."""
        training = self.training
        return self.model.reset_dead_codes(
            training.dead_code_threshold, training.dead_code_strategy, training.max_reset_fraction, latents
        )

    def summary(self) -> EpochSummary:
        """Means over the epoch; waits for the device."""
        return self.summary_to_come()()

    def summary_to_come(self) -> Callable[[], EpochSummary]:
        """What gives the means over the steps that were launched so far: only it waits for the device."""
        values = self.values.to(torch.float64)
        means = (values * self._sizes).sum(0) / self.rows
        bad = (~torch.isfinite(values[:, 1:]) & self._weighted).flatten()
        place = torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1)
        used = self.model.quantizer.utilization().mean()
        packed = torch.cat([means, used[None], place[None]])
        if not packed.is_cuda:
            return lambda: _unpacked(packed)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        there = torch.cuda.Event()
        there.record()

        def read() -> EpochSummary:
            there.synchronize()
            return _unpacked(host)

        return read

    def state(self) -> dict[str, Any]:
        """What `load` needs, in the middle of an epoch or at its end."""
        return {"optimizer_state_dict": self.optimizer.state_dict(), "values": self.values}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state; every tensor keeps its place."""
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.values.copy_(state["values"])

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The rows that a step has to give, and as it sees them: noisy rows are not learnt by heart.

        The way to the next row may shrink with the learning rate.
        """
        training = self.training
        rows, mixing, fade = self._now[0, :count], training.mixing, None
        if training.mixing_decays:
            mixing, fade = mixing / training.learning_rate, self._rate
        return augmented_rows(self.x, rows, mixing, training.input_noise, fade)

    def _loss_terms(self, x: Tensor, out: dict[str, Tensor], move_codes: Callable[[], None] | None) -> LossTerms:
        return loss_terms(self.model, x, out, self.training.topo_samples, move_codes)

    def _precision(self) -> AbstractContextManager[None]:
        """TF32 for the networks, forward and backward; what compares distances asks for float32 by itself."""
        return cuda_matmul(tf32=True) if self.x.is_cuda else nullcontext()


def _unpacked(packed: Tensor) -> EpochSummary:
    loss, *terms, utilization, first = packed.tolist()
    return EpochSummary(loss, terms, utilization, divmod(int(first), len(terms)) if first >= 0 else None)


def _rates_in(plan: Tensor, dtype: torch.dtype) -> Tensor:
    """The last column of a plan [S, batch + 1] as rates [S]: of a float32 its first half alone."""
    return plan[:, -1:].view(dtype)[:, 0] if dtype == torch.float64 else plan.view(dtype)[:, -2]


def learning_rate(training: TrainingConfig, steps_per_epoch: int, step: int) -> float:
    """The rate of a step, counted from 0 over the whole run."""
    warmup, total = training.warmup_epochs * steps_per_epoch, training.num_epochs * steps_per_epoch
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.scheduler == "cosine":
        return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return training.learning_rate


def learning_rates(training: TrainingConfig, steps_per_epoch: int, epoch: int) -> Tensor:
    """[steps_per_epoch] float64: the rate of each step of an epoch, counted from 0."""
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    return torch.tensor([learning_rate(training, steps_per_epoch, step) for step in steps], dtype=torch.float64)

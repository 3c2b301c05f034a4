"""One training step without host synchronisation: rows, losses, gradients, moving averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.kernels.augment import augmented_rows
from spinlock_fast.kernels.precision import cuda_matmul
from spinlock_fast.kernels.streams import joined, later
from spinlock_fast.models.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.optimizer import FusedAdam
from spinlock_fast.training.row_feed import make_row_feed


class StepKind(NamedTuple):
    """What distinguishes steps on the host; steps of one kind launch the same kernels."""

    partial_batch: bool  # the remainder at the end of an epoch
    reset: bool  # dead codes are replaced after the step


class EpochSummary(NamedTuple):
    """Losses of an epoch."""

    loss: float
    terms: list[float]  # unweighted means over rows, in the order of LossTerms
    utilization: float
    first_nonfinite: tuple[int, int] | None  # step of the epoch, index of the loss term


class TrainingStep:
    """A training step that reads its rows and learning rate at a step counter on the device.

    `__call__` never synchronises and depends on no host value that changes between steps, so it can be captured in a
    CUDA graph and replayed: row order, learning rates and losses are tensors with fixed addresses.

    Args:
        model: in training mode while steps run.
        x: [N, F] training rows, for the model's device.
        training: settings.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig) -> None:
        self.model = model
        self.training = training
        self.weights = LossWeights.of(training)
        self.rows, device = x.shape[0], x.device
        self.batch_size = min(training.batch_size, self.rows)
        self.feed = make_row_feed(x, self.batch_size)
        self.x = self.feed.table
        self.full_batches, self.remainder = divmod(self.rows, self.batch_size)
        self.steps_per_epoch = self.full_batches + (self.remainder > 0)
        # Rows of `x` and learning rate of every step of an epoch, and those of the current step. The fused optimizer
        # reads the rate on the device: float32 on CUDA, float64 on a CPU.
        self._epoch_rows = torch.zeros(self.steps_per_epoch, self.batch_size, dtype=torch.int64, device=device)
        self._batch_rows = torch.zeros(1, self.batch_size, dtype=torch.int64, device=device)
        rate_dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._epoch_rates = torch.zeros(self.steps_per_epoch, dtype=rate_dtype, device=device)
        self._rate = torch.zeros(1, dtype=rate_dtype, device=device)
        self._step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_values = torch.zeros(self.steps_per_epoch, 1 + len(LossTerms._fields), device=device)  # total, terms
        self._batch_sizes = torch.full((self.steps_per_epoch, 1), self.batch_size, dtype=torch.float64, device=device)
        if self.remainder:
            self._batch_sizes[-1] = self.remainder
        self._has_weight = torch.tensor([weight != 0.0 for weight in self.weights], device=device)
        self.optimizer = FusedAdam(
            model.parameters(), self._rate, training.weight_decay, decoupled=training.optimizer == "adamw"
        )

    def kind(self, step: int, reset: bool) -> StepKind:
        """The kind of a step of the epoch, from 0."""
        return StepKind(partial_batch=step >= self.full_batches, reset=reset)

    def begin_epoch(self, order: Tensor, rates: Tensor, steps_done: int) -> None:
        """Sets the order of rows [N] and the learning rate of each step [steps_per_epoch].

        Args:
            steps_done: steps of the epoch that a resumed run has made.
        """
        order = self.feed.begin_epoch(order, steps_done)
        pinned = self._epoch_rows.is_cuda
        rows = torch.zeros(self._epoch_rows.shape, dtype=torch.int64, pin_memory=pinned)
        rows.view(-1)[: self.rows] = order
        self._epoch_rows.copy_(rows, non_blocking=True)
        host_rates = torch.empty(self._epoch_rates.shape, dtype=self._epoch_rates.dtype, pin_memory=pinned)
        self._epoch_rates.copy_(host_rates.copy_(rates), non_blocking=True)
        self._step_index.fill_(steps_done)
        if steps_done == 0:
            self.loss_values.zero_()

    def memory_layout(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Address and strides of every tensor of the model.

        Raises:
            RuntimeError: the model has other parameters than the optimizer.
        """
        parameters = list(self.model.parameters())
        optimized = self.optimizer.parameters
        if len(parameters) != len(optimized) or any(a is not b for a, b in zip(parameters, optimized, strict=True)):
            raise RuntimeError(
                "parameters of the model were replaced, as by load_state_dict(assign=True), and would not be trained:"
                " replace them before the training starts"
            )
        return tuple((t.data_ptr(), t.stride()) for t in (*parameters, *self.model.buffers()))

    def __call__(self, kind: StepKind) -> None:
        """Runs the next step."""
        torch.index_select(self._epoch_rows, 0, self._step_index, out=self._batch_rows)
        torch.index_select(self._epoch_rates, 0, self._step_index, out=self._rate)
        target, x = self._augmented_batch(self.remainder if kind.partial_batch else self.batch_size)
        with self._precision(), joined(self.x.device):
            # The reconstruction is decoded in `loss_terms`, on a side stream.
            out, apply_ema = self.model.encode_and_quantize(x)
            terms = loss_terms(self.model, target, out, self.training.topo_samples, apply_ema)
            later(lambda: self._store_losses(terms), [self.loss_values, *terms], after_others=True)
            self.optimizer.zero_grad()
            terms.backward(self.weights)
        self.optimizer.step()
        if kind.reset:
            self.reset_dead_codes(out["latents"].detach())

    @torch.no_grad()
    def _store_losses(self, terms: LossTerms) -> None:
        """Stores the losses of the current step and increments the step counter."""
        values = torch.stack([terms.total(self.weights), *terms])
        self.loss_values.index_copy_(0, self._step_index, values[None])
        self._step_index.add_(1)

    def reset_dead_codes(self, latents: Tensor | None) -> Tensor:
        """Replaces dead codes as the settings say; returns their number per codebook [G]."""
        training = self.training
        return self.model.reset_dead_codes(
            training.dead_code_threshold, training.dead_code_strategy, training.max_reset_fraction, latents
        )

    def summary(self) -> EpochSummary:
        """Means over the steps launched so far in the epoch; synchronises with the device."""
        return self.start_summary()()

    def start_summary(self) -> Callable[[], EpochSummary]:
        """Starts to compute `summary` asynchronously; the returned function synchronises and returns it."""
        values = self.loss_values.to(torch.float64)
        means = (values * self._batch_sizes).sum(0) / self.rows
        nonfinite = (~torch.isfinite(values[:, 1:]) & self._has_weight).flatten()
        first = torch.where(nonfinite.any(), nonfinite.to(torch.uint8).argmax(), -1)
        utilization = self.model.quantizer.utilization().mean()
        packed = torch.cat([means, utilization[None], first[None]])
        if not packed.is_cuda:
            return lambda: _unpack_summary(packed)
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> EpochSummary:
            copied.synchronize()
            return _unpack_summary(host)

        return read

    def state(self) -> dict[str, Any]:
        """What `load` restores, at any step of an epoch."""
        return {"optimizer_state_dict": self.optimizer.state_dict(), "values": self.loss_values}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores a state in place; every tensor keeps its address."""
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.loss_values.copy_(state["values"])

    def _augmented_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` rows of the current batch: reconstruction targets (mixup), and inputs (mixup and noise)."""
        training = self.training
        rows, scale, rate_factor = self._batch_rows[0, :count], training.mixup_scale, None
        if training.mixup_decay:
            scale, rate_factor = scale / training.learning_rate, self._rate
        return augmented_rows(self.x, rows, scale, training.input_noise, rate_factor)

    def _precision(self) -> AbstractContextManager[None]:
        """TF32 for the networks, forward and backward; distance kernels choose float32 themselves."""
        return cuda_matmul(tf32=True) if self.x.is_cuda else nullcontext()


def _unpack_summary(packed: Tensor) -> EpochSummary:
    loss, *terms, utilization, first = packed.tolist()
    return EpochSummary(loss, terms, utilization, divmod(int(first), len(terms)) if first >= 0 else None)


def learning_rates(training: TrainingConfig, steps_per_epoch: int, epoch: int) -> Tensor:
    """[steps_per_epoch] float64 learning rates of an epoch, from 0: linear warm-up, then constant or cosine decay."""
    warmup, total = training.warmup_epochs * steps_per_epoch, training.num_epochs * steps_per_epoch

    def rate(step: int) -> float:
        if step < warmup:
            return training.learning_rate * (step + 1) / warmup
        if training.scheduler == "cosine":
            return training.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        return training.learning_rate

    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    return torch.tensor([rate(step) for step in steps], dtype=torch.float64)

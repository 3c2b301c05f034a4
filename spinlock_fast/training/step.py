"""One training step without host synchronisation: rows, losses, gradients, moving averages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.kernels._common.precision import cuda_matmul
from spinlock_fast.kernels._common.streams import defer, deferred_scope
from spinlock_fast.kernels.augment import augmented_rows
from spinlock_fast.models.losses import LossTerms, LossWeights, code_orthogonality, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize import dead_code_threshold
from spinlock_fast.training import native_step
from spinlock_fast.training.distributed import RowGather, Share, StepExchange, broadcast_codes
from spinlock_fast.training.optimizer import FusedAdam
from spinlock_fast.training.row_feed import make_row_feed

log = logging.getLogger(__name__)


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
        ranks: processes that share the rows of each batch. All have the same model, rows and settings.
    """

    def __init__(
        self, model: CategoricalHierarchicalVQVAE, x: Rows, training: TrainingConfig, ranks: Ranks = SINGLE
    ) -> None:
        self.model = model
        self.training = training
        self.ranks = ranks
        self.weights = LossWeights.of(training)
        self.rows, device = x.shape[0], x.device
        self.batch_size = min(training.batch_size, self.rows)
        self.full_batches, self.remainder = divmod(self.rows, self.batch_size)
        self.steps_per_epoch = self.full_batches + (self.remainder > 0)
        self.exchange = StepExchange(model, ranks) if ranks.size > 1 else None
        self._shares = {False: Share.of(self.batch_size, ranks), True: Share.of(self.remainder, ranks)}
        # Several ranks: also the row after the last one of the share.
        rows_per_step = max(share.rows for share in self._shares.values()) + (ranks.size > 1)
        self._gathers = {
            partial: RowGather(share.total, training.topo_samples, ranks, device)
            for partial, share in self._shares.items()
            if ranks.size > 1
        }
        # Resets take latents of all ranks' rows.
        gathers_latents = training.dead_code_reset_steps > 0 and training.dead_code_strategy == "sample"
        self._latent_gathers = {
            partial: RowGather(share.total, share.total, ranks, device)
            for partial, share in self._shares.items()
            if ranks.size > 1 and gathers_latents
        }
        self.feed = make_row_feed(x, rows_per_step, self.steps_per_epoch)
        self.x = self.feed.table
        # Rows of `x` and learning rate of every step of an epoch, and those of the current step. The fused optimizer
        # reads the rate on the device: float32 on CUDA, float64 on a CPU.
        self._epoch_rows = torch.zeros(self.steps_per_epoch, rows_per_step, dtype=torch.int64, device=device)
        self._batch_rows = torch.zeros(1, rows_per_step, dtype=torch.int64, device=device)
        rate_dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._epoch_rates = torch.zeros(self.steps_per_epoch, dtype=rate_dtype, device=device)
        self._rate = torch.zeros(1, dtype=rate_dtype, device=device)
        self._step_index = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_values = torch.zeros(self.steps_per_epoch, 1 + len(LossTerms._fields), device=device)  # total, terms
        self._batch_sizes = torch.full((self.steps_per_epoch, 1), self.batch_size, dtype=torch.float64, device=device)
        if self.remainder:
            self._batch_sizes[-1] = self.remainder
        self._has_weight = torch.tensor([weight != 0.0 for weight in self.weights], device=device)
        self.dead_code_threshold = dead_code_threshold(
            training.dead_code_threshold, model.quantizer.num_codes, self.rows
        )
        self.optimizer = FusedAdam(
            model.parameters(), self._rate, training.weight_decay, decoupled=training.optimizer == "adamw"
        )

    def log_automatic_settings(self) -> None:
        """Logs the values of settings that are `auto`."""
        if self.model.config.commitment_cost == "auto":
            log.info("model.commitment_cost auto: %.3g", self.model.quantizer.commitment_weight)
        if self.training.dead_code_threshold == "auto":
            log.info("training.dead_code_threshold auto: %.3g", self.dead_code_threshold)

    def kind(self, step: int, reset: bool) -> StepKind:
        """The kind of a step of the epoch, from 0."""
        return StepKind(partial_batch=step >= self.full_batches, reset=reset)

    def begin_epoch(self, order: Tensor, rates: Tensor, steps_done: int) -> None:
        """Sets the order of rows [N] and the learning rate of each step [steps_per_epoch].

        Args:
            steps_done: steps of the epoch that a resumed run has made.
        """
        order = self.feed.begin_epoch(self._rows_of_share(order), steps_done)
        pinned = self._epoch_rows.is_cuda
        rows = torch.zeros(self._epoch_rows.shape, dtype=torch.int64, pin_memory=pinned)
        rows.view(-1)[: len(order)] = order
        self._epoch_rows.copy_(rows, non_blocking=True)
        host_rates = torch.empty(self._epoch_rates.shape, dtype=self._epoch_rates.dtype, pin_memory=pinned)
        self._epoch_rates.copy_(host_rates.copy_(rates), non_blocking=True)
        self._step_index.fill_(steps_done)
        if steps_done == 0:
            self.loss_values.zero_()

    def _rows_of_share(self, order: Tensor) -> Tensor:
        """Numbers of the rows that this rank reads, step by step, from the order of all rows [N]."""
        if self.ranks.size == 1:
            return order
        rows = torch.zeros(self._epoch_rows.shape, dtype=torch.int64)
        full = self.full_batches * self.batch_size
        columns = self._shares[False].columns()
        rows[: self.full_batches, : len(columns)] = order[:full].view(-1, self.batch_size)[:, columns]
        if self.remainder:
            columns = self._shares[True].columns()
            rows[-1, : len(columns)] = order[full:][columns]
        return rows.flatten()

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
        share = self._shares[kind.partial_batch]
        target, x = self._augmented_batch(share)
        if self.exchange is None:
            latents = self._gradients(target, x)
        else:
            latents = self._shared_gradients(target, x, share, self._gathers[kind.partial_batch], self.exchange)
        self.optimizer.step()
        if kind.reset:
            gather = self._latent_gathers.get(kind.partial_batch)
            latents = latents.detach()
            self.reset_dead_codes(latents if gather is None else gather.gather(latents))

    def _gradients(self, target: Tensor, x: Tensor) -> Tensor:
        """Computes the gradients, updates the codes and stores the losses; returns the latents of the batch."""
        if not self.x.is_cuda and native_step.supports(self.model, self.optimizer.parameters):
            self.optimizer.zero_grad()
            samples = self.training.topo_samples
            terms, latents = native_step.loss_and_gradients(self.model, target, x, samples, self.weights)
            self._store_losses(terms)
            return latents
        with self._precision(), deferred_scope(self.x.device):
            # The reconstruction is decoded in `loss_terms`, on a side stream.
            out, apply_ema = self.model.encode_and_quantize(x)
            terms = loss_terms(self.model, target, out, self.training.topo_samples, apply_ema)
            defer(lambda: self._store_losses(terms), [self.loss_values, *terms], after_deferred=True)
            self.optimizer.zero_grad()
            terms.backward(self.weights)
        return out["latents"]

    def _shared_gradients(
        self, target: Tensor, x: Tensor, share: Share, gather: RowGather, exchange: StepExchange
    ) -> Tensor:
        """`_gradients` of a batch that the ranks share; returns the latents of this rank's rows."""
        with self._precision(), deferred_scope(self.x.device):
            out, statistics = self.model.encode_with_statistics(x, share.batch)
            terms = loss_terms(self.model, target, out, self.training.topo_samples, None, share.batch, gather)
            self.optimizer.zero_grad()
            if share.rows:
                terms.backward(share.weights(self.weights, self.ranks))
        exchange.sum_(statistics, share.values(terms, self.ranks) if share.rows else None)
        self.model.quantizer.apply_statistics(exchange.statistics)
        reduced = LossTerms(*exchange.terms)
        if self.model.quantizer.use_ema:
            reduced = reduced._replace(orthogonality=code_orthogonality(self.model.quantizer))
        self._store_losses(reduced)
        return out["latents"]

    @torch.no_grad()
    def _store_losses(self, terms: LossTerms) -> None:
        """Stores the losses of the current step and increments the step counter."""
        values = torch.stack([terms.total(self.weights), *terms])
        self.loss_values.index_copy_(0, self._step_index, values[None])
        self._step_index.add_(1)

    def reset_dead_codes(self, latents: Tensor | None) -> Tensor:
        """Replaces dead codes as the settings say; returns their number per codebook [G]."""
        training = self.training
        replaced = self.model.reset_dead_codes(
            self.dead_code_threshold, training.dead_code_strategy, training.max_reset_fraction, latents
        )
        broadcast_codes(self.model, self.ranks)
        return replaced

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

    def _augmented_batch(self, share: Share) -> tuple[Tensor, Tensor]:
        """This rank's rows of the current batch: reconstruction targets (mixup), and inputs (mixup and noise)."""
        training = self.training
        scale, rate_factor = training.mixup_scale, None
        if training.mixup_decay:
            scale, rate_factor = scale / training.learning_rate, self._rate
        rows = self._batch_rows[0, : share.rows]
        next_row = self._batch_rows[0, share.rows : share.rows + 1] if share.batch is not None else None
        return augmented_rows(
            self.x, rows, scale, training.input_noise, rate_factor, batch=share.batch, next_row=next_row
        )

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

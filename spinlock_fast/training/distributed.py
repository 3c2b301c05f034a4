"""Data-parallel training steps: a rank's share of each batch, and the all-reduce of a step.

Every rank holds the same model and computes consecutive rows of each global batch. Means over rows are weighted by the
rank's fraction of the rows, so that the sum over the ranks of gradients, code statistics and losses is that of the
whole batch. The result does not depend on the number of ranks, up to rounding.
"""

from __future__ import annotations

import signal
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.distributed import Ranks
from spinlock_fast.errors import ConfigError, DataError, TrainingError
from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.messages import one_line
from spinlock_fast.models.losses import LossTerms, LossWeights
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.quantize.code_statistics import statistics_size

_SIGNALS = [int(signal.SIGINT), int(signal.SIGTERM), int(getattr(signal, "SIGHUP", signal.SIGTERM))]


class Share(NamedTuple):
    """A rank's consecutive rows of a batch."""

    first: int
    rows: int
    total: int  # rows of the batch

    @classmethod
    def of(cls, total: int, ranks: Ranks) -> Share:
        share = ranks.share(total)
        return cls(share.start, share.stop - share.start, total)

    @property
    def batch(self) -> BatchSlice | None:
        """Position of the rows in the batch, for random numbers; None if they are the whole batch."""
        return BatchSlice(self.first, self.total) if self.rows < self.total else None

    def columns(self) -> Tensor:
        """[rows + 1] positions of the rows in the batch, and of the row after them, which mixup needs."""
        return torch.arange(self.first, self.first + self.rows + 1) % max(self.total, 1)

    def weights(self, weights: LossWeights, ranks: Ranks) -> LossWeights:
        """Weights of this rank's loss terms, whose gradients sum to those of the batch.

        The topographic term is that of the sample of all ranks, and its gradient reaches this rank's rows only. The
        orthogonality of codes is the same on every rank with rows; ranks without rows backpropagate nothing.
        """
        fraction = self.rows / self.total
        return LossWeights(
            weights.reconstruction * fraction,
            weights.vq * fraction,
            weights.orthogonality / min(self.total, ranks.size),
            weights.informativeness * fraction,
            weights.topographic,
        )

    def values(self, terms: LossTerms, ranks: Ranks) -> Tensor:
        """[5] this rank's part of the loss terms; the sum over the ranks is the terms of the batch."""
        fraction, once = self.rows / self.total, float(ranks.rank == ranks.size - 1)  # the last rank always has rows
        factors = (fraction, fraction, once, fraction, once)
        return torch.stack([term.detach() * factor for term, factor in zip(terms, factors, strict=True)])


class RowGather:
    """Gathers the leading rows of a batch from all ranks, for the topographic term.

    Args:
        rows: rows of the batch.
        samples: number of leading rows.
        ranks: the ranks.
        device: of the rows.
    """

    def __init__(self, rows: int, samples: int, ranks: Ranks, device: torch.device) -> None:
        samples = min(samples, rows)
        shares = [Ranks(rank, ranks.size).share(rows) for rank in range(ranks.size)]
        counts = [max(0, min(share.stop, samples) - share.start) for share in shares]
        self.ranks = ranks
        self.first, self.count = shares[ranks.rank].start, counts[ranks.rank]
        self.most = max(counts)  # rows per rank in the collective operation; shorter parts are padded
        kept = [rank * self.most + i for rank, count in enumerate(counts) for i in range(count)]
        self.kept = torch.tensor(kept, dtype=torch.int64, device=device)  # positions of the rows in the padded result

    def __call__(self, x: Tensor, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [S, F], latents [S, sum D] and codes [S, G] of all ranks, from those of this rank's rows.

        The gradient of the latents reaches this rank's rows.
        """
        columns = [x.shape[1], latents.shape[1], codes.shape[1]]
        everyone = self.gather(torch.cat([t[: self.count].detach().to(torch.float32) for t in (x, latents, codes)], 1))
        all_x, all_latents, all_codes = everyone.split(columns, 1)
        joined: Tensor = _JoinRows.apply(latents, all_latents, self.first, self.count)  # type: ignore[no-untyped-call]
        return all_x, joined, all_codes.to(torch.int64)

    def gather(self, rows: Tensor) -> Tensor:
        """[S, C] rows of all ranks, from the [n, C] rows of this rank; those after its part of the S are ignored."""
        padded = rows.new_zeros(self.most, rows.shape[1])
        padded[: self.count] = rows[: self.count]
        everyone = rows.new_empty(self.ranks.size * self.most, rows.shape[1])
        self.ranks.gather_into(everyone, padded)
        return everyone[self.kept]


class _JoinRows(torch.autograd.Function):
    """The gathered rows; their gradient is passed to the rows of this rank."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, gathered: Tensor, first: int, count: int) -> Tensor:
        ctx.first, ctx.count, ctx.rows = first, count, len(local)
        return gathered.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part = grads[0][ctx.first : ctx.first + ctx.count]
        if ctx.count < ctx.rows:
            part = torch.cat([part, part.new_zeros(ctx.rows - ctx.count, part.shape[1])])
        return part, None, None, None


class StepExchange:
    """The all-reduce of a step: gradients, code statistics, loss terms and requests in one buffer.

    The buffer has a fixed address, so that a CUDA graph can contain the operation. It takes
    4 * (parameters + codes + code entries + 10) bytes.

    Args:
        model: its parameters get the summed gradients.
        ranks: the ranks.
    """

    def __init__(self, model: CategoricalHierarchicalVQVAE, ranks: Ranks) -> None:
        self.ranks = ranks
        self.parameters = list(model.parameters())
        device = self.parameters[0].device
        sizes = [p.numel() for p in self.parameters]
        sizes += [statistics_size(model.quantizer.layout), len(LossTerms._fields), len(_SIGNALS) + 1]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        *gradients, self.statistics, self.terms, self._requests = self.buffer.split(sizes)
        self._gradients = [part.view(p.shape) for part, p in zip(gradients, self.parameters, strict=True)]
        self._trained: list[int] | None = None  # parameters with a gradient, on any rank
        pinned = device.type == "cuda"
        self._own_requests = torch.zeros(len(_SIGNALS) + 1, pin_memory=pinned)
        self._readback = _Readback(self._requests) if pinned else None

    def request(self, stop_signal: int | None, save: bool) -> None:
        """Requests of this rank, which the next step shares: to stop, and (on rank 0) to save the state."""
        for i, number in enumerate(_SIGNALS):
            self._own_requests[i] = float(stop_signal == number)
        self._own_requests[-1] = float(save and self.ranks.is_main)

    def requested(self) -> tuple[int | None, bool]:
        """The signal that stops all ranks, and whether to save: the same on all ranks after the same step.

        On CUDA, as of the launch before the last one, so that the device is not waited for.
        """
        values = self._requests.tolist() if self._readback is None else self._readback.read()
        numbers = [number for number, value in zip(_SIGNALS, values, strict=False) if value]
        if (numbers or values[-1]) and self._readback is not None:
            self._readback.discard()
        if values[-1]:
            self._own_requests[-1] = 0.0  # set again after the step that shared it
        return (numbers[0] if numbers else None), bool(values[-1])

    @torch.no_grad()
    def sum_(self, statistics: Tensor, terms: Tensor | None) -> None:
        """Sums the gradients, code statistics and loss terms of all ranks, and sets the gradients of the parameters.

        Args:
            statistics: of the code update, see `pack_statistics`.
            terms: [5] this rank's part of the loss terms; None without rows: the gradients then count as 0.
        """
        gradients = [None if terms is None else p.grad for p in self.parameters]
        trained = self._agree_on_trained(gradients)
        for i in trained:
            gradient = gradients[i]
            if gradient is None:
                self._gradients[i].zero_()
            else:
                self._gradients[i].copy_(gradient)
        self.statistics.copy_(statistics)
        if terms is None:
            self.terms.zero_()
        else:
            self.terms.copy_(terms)
        self._requests.copy_(self._own_requests, non_blocking=True)
        self.ranks.sum_(self.buffer)
        for i, p in enumerate(self.parameters):
            p.grad = self._gradients[i] if i in trained else None

    def _agree_on_trained(self, gradients: list[Tensor | None]) -> list[int]:
        """Numbers of the parameters that have a gradient on any rank; the same in every step."""
        if self._trained is None:
            has_gradient = torch.tensor([float(gradient is not None) for gradient in gradients])
            self._trained = self.ranks.max_(has_gradient).nonzero().flatten().tolist()
        return self._trained


class _Readback:
    """Copies a small tensor to the host after each launch; the copy before the last one is read without waiting."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._host = [torch.zeros(source.shape, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._launches = 0

    def read(self) -> list[float]:
        now, before = self._launches % 2, (self._launches + 1) % 2
        self._host[now].copy_(self._source, non_blocking=True)
        self._copied[now].record()
        self._launches += 1
        if self._launches == 1:
            return [0.0] * len(self._source)
        self._copied[before].synchronize()
        return self._host[before].tolist()

    def discard(self) -> None:
        """Ignores the copy in flight."""
        self._launches = 0


@torch.no_grad()
def broadcast_model(model: CategoricalHierarchicalVQVAE, ranks: Ranks) -> None:
    """Copies the weights, codes and averages of rank 0 to the other ranks."""
    if ranks.size > 1:
        for tensor in [*model.parameters(), *model.quantizer.buffers(), *model.buffers()]:
            ranks.broadcast_(tensor.data)


@torch.no_grad()
def broadcast_codes(model: CategoricalHierarchicalVQVAE, ranks: Ranks) -> None:
    """Copies the codes and their averages of rank 0 to the other ranks."""
    if ranks.size > 1:
        quantizer = model.quantizer
        for tensor in (quantizer.embedding.data, quantizer.cluster_size, quantizer.embedding_sum):
            ranks.broadcast_(tensor)


def broadcast_random_state(ranks: Ranks, device: torch.device) -> None:
    """Gives all ranks the state of rank 0's torch generators, so that they draw the same numbers."""
    if ranks.size > 1:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        cpu_state, cuda_state = ranks.broadcast_object((torch.get_rng_state(), cuda))
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)


@torch.no_grad()
def check_replicas(model: CategoricalHierarchicalVQVAE, ranks: Ranks, step: int) -> None:
    """Raises TrainingError if the ranks hold different weights, which would silently train different models."""
    if ranks.size == 1:
        return
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    sums = torch.stack([part for t in tensors for part in (t.double().sum(), t.double().square().sum())]).cpu()
    sums = sums.nan_to_num()
    spread = ranks.max_(torch.cat([sums, -sums]))
    largest, smallest = spread[: len(sums)], -spread[len(sums) :]
    if not torch.equal(largest, smallest):
        raise TrainingError(
            f"the ranks hold different weights after step {step}: different processors, libraries or settings on the "
            "hosts; run all ranks on the same kind of machine"
        )


def agreed_signal(number: int | None, ranks: Ranks) -> int | None:
    """The largest of the signals that the ranks have received, on all of them; None if there is none."""
    if ranks.size == 1:
        return number
    return int(ranks.max_(torch.tensor([number or 0]))) or None


def all_ranks_agree(ranks: Ranks, here: bool) -> bool:
    """Whether a condition holds on every rank."""
    return here if ranks.size == 1 else bool(ranks.min_(torch.tensor([int(here)])))


def check_same_arguments(
    config: RunConfig,
    x: NDArray[Any],
    val_rows: ArrayLike | None,
    resume: Mapping[str, Any] | None,
    others: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Checks that all ranks call `Trainer.fit` with the same arguments; all of them call this first.

    Args:
        config: settings of the run.
        x: [N, F] rows; their shape and some of them are compared.
        val_rows, resume: as in `Trainer.fit`; a resumed state is compared by its epoch and step.
        others: arguments by name, compared by their text.
        ranks: the ranks.

    Raises:
        ConfigError: the ranks have different settings, or their process group does not connect CPU tensors.
        DataError: they have different rows.
    """
    if ranks.size == 1:
        return
    if "cpu:" not in str(dist.get_backend_config()):
        raise ConfigError(
            "the process group connects CUDA tensors only, and training also exchanges values in main memory: use "
            "init_process_group('cpu:gloo,cuda:nccl')"
        )
    own = {
        f"{part}.{name}": value
        for part in ("feature_cleaning", "model", "training")
        for name, value in getattr(config, part)
    }
    own |= {"random_seed": config.random_seed, **others}
    own["val_rows"] = None if val_rows is None else _checksum(np.asarray(val_rows))
    own["resume"] = None if resume is None else (resume.get("epoch"), resume.get("step"))
    rows = list(x.shape), x.dtype.str, _checksum(x[:: max(1, len(x) // 256)])
    (first_rows, first), *rest = ranks.gather_objects((rows, {name: repr(value) for name, value in own.items()}))
    for rank, (other_rows, other) in enumerate(rest, start=1):
        for name in first:
            if other[name] != first[name]:
                here, there = (one_line(values[name], 80) for values in (first, other))
                raise ConfigError(
                    f"the ranks have different values of {name}: {here} on rank 0, {there} on rank {rank}"
                )
        if other_rows != first_rows:
            raise DataError(
                f"the ranks were given different rows ({first_rows[0]} on rank 0, {other_rows[0]} on rank {rank}): "
                "every rank passes the whole matrix, and trains on its share of each batch; Trainer(ranks=Ranks()) "
                "trains each process by itself"
            )


def _checksum(values: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).tobytes())

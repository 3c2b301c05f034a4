"""Affine reparameterization of codes by the mean and variance of the latents (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.codebook import OPTIONAL_STATISTICS
from spinlock_fast.kernels._common.higher_order import in_transform
from spinlock_fast.quantize.process_group import Processes

_MIN_VARIANCE = 1e-5
_STATISTICS = ("batch_mean", "batch_variance", "codebook_mean", "codebook_variance")


Statistics = tuple[Tensor | None, ...]  # batch mean and variance, codebook mean and variance, each [H, 1, D]
NO_STATISTICS: Statistics = (None,) * 4


class AffineStatistics:
    """Moving means and variances of codes and latents, registered as buffers of the codebook.

    Args:
        codebook: holds the buffers.
        shape: H, D of the codebook.
        batch_decay: of the statistics of the latents.
        codebook_decay: of those of the codes.
        processes: whose latents one statistic describes; None for those of this process.
    """

    def __init__(
        self,
        codebook: nn.Module,
        shape: tuple[int, int],
        batch_decay: float,
        codebook_decay: float,
        processes: Processes | None = None,
    ) -> None:
        self.batch_decay, self.codebook_decay, self.processes = batch_decay, codebook_decay, processes
        H, D = shape
        for name in OPTIONAL_STATISTICS:
            codebook.register_buffer(name, None)
        for name in ("codebook_mean", "codebook_variance"):
            codebook.register_buffer(f"{name}_needs_init", torch.tensor(True))
            codebook.register_buffer(name, torch.zeros(H, 1, D))

    @staticmethod
    def current(codebook: nn.Module) -> Statistics:
        """The statistics, None before the first batch."""
        return tuple(codebook._buffers[name] for name in _STATISTICS)

    def update(self, codebook: nn.Module, rows: Tensor, embed: Tensor, mask: Tensor | None) -> Statistics:
        """Updates the statistics: those of the batch always, those of the codes in training and on first use.

        A batch without rows is ignored. Under a torch.func transform the new statistics are returned but not stored: a
        transformed function must not change buffers.
        """
        new: dict[str, Tensor] = {}
        with torch.no_grad():
            rows = rows if mask is None else rows[:, mask]
            if codebook.training or bool(codebook.codebook_mean_needs_init):
                decay = self.codebook_decay
                new["codebook_mean"] = self._average(codebook, "codebook_mean", _mean(embed), decay)
                new["codebook_variance"] = self._average(codebook, "codebook_variance", _variance(embed), decay)
            for name, value in self._batch_statistics(rows).items():
                new[name] = self._average(codebook, name, value, self.batch_decay)
            if not in_transform():
                self._store(codebook, new)
        return tuple(new.get(name, old) for name, old in zip(_STATISTICS, self.current(codebook), strict=True))

    def _batch_statistics(self, rows: Tensor) -> dict[str, Tensor]:
        """Mean and variance of rows [H, N, D] of all processes; nothing if there are none."""
        if self.processes is None or self.processes.size() == 1:
            return {"batch_mean": _mean(rows), "batch_variance": _variance(rows)} if rows.shape[1] else {}
        H, N, D = rows.shape
        packed = self.processes.sum_(torch.cat([rows.sum(1).flatten(), rows.new_full((1,), N)]))
        count, mean = packed[-1], (packed[:-1] / packed[-1]).view(H, 1, D)
        if not bool(count > 0):
            return {}
        squares = self.processes.sum_((rows - mean).square().sum(1, keepdim=True))
        return {"batch_mean": mean, "batch_variance": squares / count}

    @staticmethod
    def to_latents(statistics: Statistics, embed: Tensor) -> Tensor:
        """Codes [H, K, D] mapped to the distribution of the latents; unchanged before the first batch."""
        mean, variance, code_mean, code_variance = statistics
        if mean is None or variance is None or code_mean is None or code_variance is None:
            return embed
        return (embed - code_mean) * (_std(variance) / _std(code_variance)) + mean

    @staticmethod
    def to_codes(statistics: Statistics, rows: Tensor) -> Tensor:
        """Latents [H, N, D] mapped to the distribution of the codes; unchanged before the first batch."""
        mean, variance, code_mean, code_variance = statistics
        if mean is None or variance is None or code_mean is None or code_variance is None:
            return rows
        return (rows - mean) * (_std(code_variance) / _std(variance)) + code_mean

    @staticmethod
    def _average(codebook: nn.Module, name: str, value: Tensor, decay: float) -> Tensor:
        """The moving average updated with `value`, or `value` itself on first use."""
        old: Tensor | None = getattr(codebook, name)
        needs_init: Tensor | None = getattr(codebook, f"{name}_needs_init", None)
        if old is None or (needs_init is not None and bool(needs_init)):
            return value
        return old * decay + value * (1.0 - decay)

    @staticmethod
    def _store(codebook: nn.Module, statistics: dict[str, Tensor]) -> None:
        for name, value in statistics.items():
            needs_init: Tensor | None = getattr(codebook, f"{name}_needs_init", None)
            if needs_init is not None:
                needs_init.fill_(False)
            codebook.register_buffer(name, value)


def _mean(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True)


def _variance(x: Tensor) -> Tensor:
    return x.var(1, keepdim=True, unbiased=False)


def _std(variance: Tensor) -> Tensor:
    return variance.clamp(min=_MIN_VARIANCE).sqrt()

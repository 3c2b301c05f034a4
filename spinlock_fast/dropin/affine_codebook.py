"""Affine reparameterization of codes by the mean and variance of the latents (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.codebook import OPTIONAL_STATISTICS
from spinlock_fast.kernels._common.higher_order import in_transform

_MIN_VARIANCE = 1e-5
_STATISTICS = ("batch_mean", "batch_variance", "codebook_mean", "codebook_variance")


Statistics = tuple[Tensor | None, ...]  # batch mean and variance, codebook mean and variance, each [H, 1, D]
NO_STATISTICS: Statistics = (None,) * 4


class AffineStatistics:
    """Moving means and variances of codes and latents, registered as buffers of the codebook."""

    def __init__(self, codebook: nn.Module, H: int, D: int, batch_decay: float, codebook_decay: float) -> None:
        self.batch_decay, self.codebook_decay = batch_decay, codebook_decay
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
            if rows.shape[1] > 0:
                new["batch_mean"] = self._average(codebook, "batch_mean", _mean(rows), self.batch_decay)
                new["batch_variance"] = self._average(codebook, "batch_variance", _variance(rows), self.batch_decay)
            if not in_transform():
                self._store(codebook, new)
        return tuple(new.get(name, old) for name, old in zip(_STATISTICS, self.current(codebook), strict=True))

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

"""Codes that follow mean and variance of the latents by an affine map (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.codebook import OPTIONAL_STATISTICS

_LEAST_VARIANCE = 1e-5


Statistics = tuple[Tensor | None, ...]  # batch mean and variance, codebook mean and variance, each [H, 1, D]
NO_STATISTICS: Statistics = (None,) * 4


class Affine:
    """Moving means and variances of codes and batches, kept as buffers of the codebook under their usual names."""

    def __init__(self, codebook: nn.Module, H: int, D: int, batch_decay: float, codebook_decay: float) -> None:
        self.batch_decay, self.codebook_decay = batch_decay, codebook_decay
        for name in OPTIONAL_STATISTICS:
            codebook.register_buffer(name, None)
        for name in ("codebook_mean", "codebook_variance"):
            codebook.register_buffer(f"{name}_needs_init", torch.tensor(True))
            codebook.register_buffer(name, torch.zeros(H, 1, D))

    @staticmethod
    def statistics(codebook: nn.Module) -> Statistics:
        """Those that there are."""
        names = ("batch_mean", "batch_variance", "codebook_mean", "codebook_variance")
        return tuple(codebook._buffers[name] for name in names)

    def observe(self, codebook: nn.Module, rows: Tensor, embed: Tensor, mask: Tensor | None) -> Statistics:
        """Moves the statistics: those of the codes in training and where there are none, those of the batch always.

        A batch without a row does not count.
        """
        with torch.no_grad():
            rows = rows if mask is None else rows[:, mask]
            if codebook.training or bool(codebook.codebook_mean_needs_init):
                self._move(codebook, "codebook_mean", embed.mean(1, keepdim=True), self.codebook_decay)
                self._move(codebook, "codebook_variance", _variance(embed), self.codebook_decay)
            if rows.shape[1] > 0:
                self._move(codebook, "batch_mean", rows.mean(1, keepdim=True), self.batch_decay)
                self._move(codebook, "batch_variance", _variance(rows), self.batch_decay)
        return self.statistics(codebook)

    @staticmethod
    def apply(statistics: Statistics, embed: Tensor) -> Tensor:
        """Codes [H, K, D] moved to where the latents are; as they are before the first batch."""
        mean, variance, code_mean, code_variance = statistics
        if mean is None or variance is None or code_mean is None or code_variance is None:
            return embed
        return (embed - code_mean) * (_deviation(variance) / _deviation(code_variance)) + mean

    @staticmethod
    def undo(statistics: Statistics, rows: Tensor) -> Tensor:
        """Latents [H, N, D] moved to where the codes are; as they are before the first batch."""
        mean, variance, code_mean, code_variance = statistics
        if mean is None or variance is None or code_mean is None or code_variance is None:
            return rows
        return (rows - mean) * (_deviation(code_variance) / _deviation(variance)) + code_mean

    @staticmethod
    def _move(codebook: nn.Module, name: str, value: Tensor, decay: float) -> None:
        old = getattr(codebook, name)
        first = getattr(codebook, f"{name}_needs_init", None)
        if first is not None and bool(first):
            first.fill_(False)
            old = None
        codebook.register_buffer(name, value if old is None else old * decay + value * (1.0 - decay))


def _variance(x: Tensor) -> Tensor:
    return x.var(1, keepdim=True, unbiased=False)


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=_LEAST_VARIANCE).sqrt()

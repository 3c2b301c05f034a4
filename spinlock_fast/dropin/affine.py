"""Codes that follow mean and variance of the latents by an affine map (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.codebook import OPTIONAL_STATISTICS

_LEAST_VARIANCE = 1e-5


class Affine:
    """Moving means and variances of codes and batches, kept as buffers of the codebook under their usual names."""

    def __init__(self, codebook: nn.Module, H: int, D: int, batch_decay: float, codebook_decay: float) -> None:
        self.batch_decay, self.codebook_decay = batch_decay, codebook_decay
        for name in OPTIONAL_STATISTICS:
            codebook.register_buffer(name, None)
        for name in ("codebook_mean", "codebook_variance"):
            codebook.register_buffer(f"{name}_needs_init", torch.tensor(True))
            codebook.register_buffer(name, torch.zeros(H, 1, D))

    def observe(self, codebook: nn.Module, rows: Tensor, embed: Tensor, mask: Tensor | None) -> None:
        """Moves the statistics: those of the codes in training and where there are none, those of the batch always."""
        with torch.no_grad():
            rows = rows if mask is None else rows[:, mask]
            if codebook.training or bool(codebook.codebook_mean_needs_init):
                self._move(codebook, "codebook_mean", embed.mean(1, keepdim=True), self.codebook_decay)
                self._move(codebook, "codebook_variance", _variance(embed), self.codebook_decay)
            self._move(codebook, "batch_mean", rows.mean(1, keepdim=True), self.batch_decay)
            self._move(codebook, "batch_variance", _variance(rows), self.batch_decay)

    def apply(self, codebook: nn.Module, embed: Tensor) -> Tensor:
        """Codes [H, K, D] moved to where the latents are; as they are before the first batch."""
        if codebook._buffers["batch_mean"] is None:
            return embed
        scale = _deviation(codebook, "batch_variance") / _deviation(codebook, "codebook_variance")
        return (embed - _statistic(codebook, "codebook_mean")) * scale + _statistic(codebook, "batch_mean")

    def undo(self, codebook: nn.Module, rows: Tensor) -> Tensor:
        """Latents [H, N, D] moved to where the codes are."""
        scale = _deviation(codebook, "codebook_variance") / _deviation(codebook, "batch_variance")
        return (rows - _statistic(codebook, "batch_mean")) * scale + _statistic(codebook, "codebook_mean")

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


def _statistic(codebook: nn.Module, name: str) -> Tensor:
    value: Tensor = getattr(codebook, name)
    return value


def _deviation(codebook: nn.Module, name: str) -> Tensor:
    return _statistic(codebook, name).clamp(min=_LEAST_VARIANCE).sqrt()

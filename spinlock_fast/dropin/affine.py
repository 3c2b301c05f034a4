"""Codes that follow mean and variance of the latents by an affine map (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEAST_VARIANCE = 1e-5


Statistics = tuple[Tensor | None, ...]  # batch mean and variance, codebook mean and variance, each [H, 1, D]


class Affine:
    """Moving means and variances of codes and batches, kept as buffers of the codebook under their usual names."""

    def __init__(self, codebook: nn.Module, H: int, D: int, batch_decay: float, codebook_decay: float) -> None:
        self.batch_decay, self.codebook_decay = batch_decay, codebook_decay
        codebook.register_buffer("batch_mean", None)
        codebook.register_buffer("batch_variance", None)
        for name in ("codebook_mean", "codebook_variance"):
            codebook.register_buffer(f"{name}_needs_init", torch.tensor(True))
            codebook.register_buffer(name, torch.empty(H, 1, D))
        self._used: Statistics = (None,) * 4

    def use(self, statistics: Statistics) -> None:
        """`apply` and `undo` go by these from now on."""
        self._used = statistics

    def observe(self, codebook: nn.Module, rows: Tensor, embed: Tensor, mask: Tensor | None) -> Statistics:
        """Moves the statistics: those of the codes in training, those of the batch always, if it has a row."""
        with torch.no_grad():
            rows = rows if mask is None else rows[:, mask]
            if codebook.training:
                self._move(codebook, "codebook_mean", embed.mean(1, keepdim=True), self.codebook_decay)
                self._move(codebook, "codebook_variance", _variance(embed), self.codebook_decay)
            if rows.shape[1] > 0:
                self._move(codebook, "batch_mean", rows.mean(1, keepdim=True), self.batch_decay)
                self._move(codebook, "batch_variance", _variance(rows), self.batch_decay)
        names = ("batch_mean", "batch_variance", "codebook_mean", "codebook_variance")
        return tuple(getattr(codebook, name) for name in names)

    def apply(self, embed: Tensor) -> Tensor:
        """Codes [H, K, D] moved to where the latents are; where no batch had a row yet, they stay."""
        mean, variance, code_mean, code_variance = self._used
        if mean is None or variance is None or code_mean is None or code_variance is None:
            return embed
        return (embed - code_mean) * (_deviation(variance) / _deviation(code_variance)) + mean

    def undo(self, rows: Tensor) -> Tensor:
        """Latents [H, N, D] moved to where the codes are; where no batch had a row yet, they stay."""
        mean, variance, code_mean, code_variance = self._used
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

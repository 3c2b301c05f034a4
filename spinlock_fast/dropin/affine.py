"""Codes that follow mean and variance of the latents by an affine map (Huh et al. 2023, arXiv 2305.08842)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spinlock_fast.dropin.codebook import OPTIONAL_STATISTICS
from spinlock_fast.kernels._common.higher_order import in_transform

_LEAST_VARIANCE = 1e-5
_STATISTICS = ("batch_mean", "batch_variance", "codebook_mean", "codebook_variance")


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
        return tuple(codebook._buffers[name] for name in _STATISTICS)

    def observe(self, codebook: nn.Module, rows: Tensor, embed: Tensor, mask: Tensor | None) -> Statistics:
        """Moves the statistics: those of the codes in training and where there are none, those of the batch always.

        A batch without a row does not count. Under a transform of torch.func the moved statistics are returned, but not
        kept: a transformed function changes no buffer.
        """
        moved: dict[str, Tensor] = {}
        with torch.no_grad():
            rows = rows if mask is None else rows[:, mask]
            if codebook.training or bool(codebook.codebook_mean_needs_init):
                moved["codebook_mean"] = self._moved(
                    codebook, "codebook_mean", embed.mean(1, keepdim=True), self.codebook_decay
                )
                moved["codebook_variance"] = self._moved(
                    codebook, "codebook_variance", _variance(embed), self.codebook_decay
                )
            if rows.shape[1] > 0:
                moved["batch_mean"] = self._moved(codebook, "batch_mean", rows.mean(1, keepdim=True), self.batch_decay)
                moved["batch_variance"] = self._moved(codebook, "batch_variance", _variance(rows), self.batch_decay)
            if not in_transform():
                self._keep(codebook, moved)
        return tuple(moved.get(name, old) for name, old in zip(_STATISTICS, self.statistics(codebook), strict=True))

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
    def _moved(codebook: nn.Module, name: str, value: Tensor, decay: float) -> Tensor:
        """The moving average after `value`, which it starts with."""
        old: Tensor | None = getattr(codebook, name)
        first: Tensor | None = getattr(codebook, f"{name}_needs_init", None)
        return value if old is None or (first is not None and bool(first)) else old * decay + value * (1.0 - decay)

    @staticmethod
    def _keep(codebook: nn.Module, moved: dict[str, Tensor]) -> None:
        for name, value in moved.items():
            first: Tensor | None = getattr(codebook, f"{name}_needs_init", None)
            if first is not None:
                first.fill_(False)
            codebook.register_buffer(name, value)


def _variance(x: Tensor) -> Tensor:
    return x.var(1, keepdim=True, unbiased=False)


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=_LEAST_VARIANCE).sqrt()

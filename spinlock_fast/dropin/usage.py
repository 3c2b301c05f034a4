"""How many of its codes a quantizer uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from spinlock_fast.dropin.codebook import Codebook


def utilization(counts: Tensor) -> Tensor:
    """Share of codes with a count above 0, for counts [..., K]."""
    return (counts > 0).to(torch.float32).mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts [..., K], between 1 and K; 0 where nothing was counted."""
    counts = counts.to(torch.float64)
    total = counts.sum(-1, keepdim=True)
    share = counts / total.clamp(min=1.0)
    entropy = -torch.xlogy(share, share).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0).to(torch.float32)


class CodeUsage:
    """Usage of one `_codebook` in training since `reset_usage`. Nothing waits for the device."""

    _codebook: Codebook

    def utilization(self) -> Tensor:
        """Share of codes used: a scalar, or [heads] with a codebook per head."""
        return utilization(self._counts())

    def perplexity(self) -> Tensor:
        """exp of the entropy of code use: a scalar, or [heads] with a codebook per head."""
        return perplexity(self._counts())

    def reset_usage(self) -> None:
        """Starts a new window."""
        self._codebook.usage.zero_()

    def _counts(self) -> Tensor:
        usage = self._codebook.usage
        return usage[0] if len(usage) == 1 else usage

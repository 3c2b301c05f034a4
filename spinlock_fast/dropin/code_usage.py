"""Codebook usage statistics: utilization and perplexity."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.dropin.codebook import Codebook


def utilization(counts: Tensor) -> Tensor:
    """Fraction of codes with a count above 0, for counts [..., K]."""
    return (counts > 0).to(torch.float32).mean(-1)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of counts [..., K], between 1 and K; 0 if all counts are 0."""
    counts = counts.to(torch.float64)
    total = counts.sum(-1, keepdim=True)
    p = counts / total.clamp(min=1.0)
    entropy = -torch.xlogy(p, p).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), 0.0).to(torch.float32)


class CodeUsage:
    """Mixin: usage of `_codebook` in training since the last `reset_usage`, without host synchronisation."""

    _codebook: Codebook

    def utilization(self) -> Tensor:
        """Fraction of codes used: a scalar, or [heads] with one codebook per head."""
        return utilization(self._usage_counts())

    def perplexity(self) -> Tensor:
        """exp of the entropy of code use: a scalar, or [heads] with one codebook per head."""
        return perplexity(self._usage_counts())

    def reset_usage(self) -> None:
        """Resets the counts behind `utilization` and `perplexity`."""
        self._codebook.usage.zero_()

    def _usage_counts(self) -> Tensor:
        usage = self._codebook.usage
        return usage[0] if len(usage) == 1 else usage

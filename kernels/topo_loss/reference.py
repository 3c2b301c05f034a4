"""The mathematics of the topographic term in plain PyTorch, differentiated by autograd.

d_x are Euclidean distances of features, d_z and d_e the means over codebooks of the distances of latents and of their
codes; what is asked for are the Pearson correlations of d_x with d_z and of d_z with d_e over the pairs i < j.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import quantize


def topographic_correlations(
    x: Tensor, latents: Tensor, quantized: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """How well distances survive encoding and quantization.

    Args:
        x: [S, F] features.
        latents: [S, sum D].
        quantized: [S, sum D] codes of the latents; their distances pass the gradient straight
            through to the latents.

    Returns:
        corr(d_x, d_z) and corr(d_z, d_e).
    """
    d_x = pairwise_distances(x.detach()[None])[0]
    d_z = pairwise_distances(layout.pad_columns(latents)).mean(0)
    d_e = pairwise_distances(layout.pad_columns(quantize(latents, quantized, layout))).mean(0)
    return pair_correlation(d_x, d_z), pair_correlation(d_z, d_e)


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances [G, S, S] between the rows of [G, S, D]; differentiable, with gradient 0 at distance 0.

    Uses |a|^2 + |b|^2 - 2 a.b on centred points. What is below the rounding error of that sum counts
    as distance 0.
    """
    points = points - points.mean(1, keepdim=True)
    norms = points.square().sum(-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = torch.baddbmm(both, points, points.transpose(1, 2), alpha=-2.0)
    distances: Tensor = _RootAbove.apply(square, rounding(points) * both.detach())  # type: ignore[no-untyped-call]
    return distances


def rounding(points: Tensor) -> float:
    """Bound of the rounding error of |a|^2 + |b|^2 - 2 a.b, relative to |a|^2 + |b|^2, for points [..., D]."""
    return (8.0 + math.sqrt(points.shape[-1])) * torch.finfo(points.dtype).eps


class _RootAbove(torch.autograd.Function):
    """sqrt(square) where it is above a floor, else 0 with gradient 0; a third of the passes of `torch.where`."""

    @staticmethod
    def forward(ctx: Any, square: Tensor, floor: Tensor) -> Tensor:
        root = square.sqrt().masked_fill_(square <= floor, 0.0)
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (root,) = ctx.saved_tensors
        return (0.5 * grads[0]).div_(root).masked_fill_(root == 0.0, 0.0), None


def pair_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two distance matrices [S, S] over the pairs i < j; 0 where one is constant."""
    S = a.shape[0]
    off_diagonal = 1.0 - torch.eye(S, dtype=a.dtype, device=a.device)
    pairs = max(S * (S - 1), 1)
    a, a_variance, a_varies = _centred(a, off_diagonal, pairs)
    b, b_variance, b_varies = _centred(b, off_diagonal, pairs)
    both = a_varies & b_varies
    norm = torch.where(both, a_variance, 1.0).sqrt() * torch.where(both, b_variance, 1.0).sqrt()
    return torch.where(both, (a * b).sum() / pairs / norm, 0.0)


def _centred(values: Tensor, off_diagonal: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values without their mean, their variance, and whether it is more than rounding."""
    mean = (values * off_diagonal).sum() / pairs
    centred = (values - mean) * off_diagonal
    variance = centred.square().sum() / pairs
    return centred, variance, varies(mean.detach(), variance)


def varies(mean: Tensor, variance: Tensor) -> Tensor:
    """Whether a variance is more than the rounding of values about `mean`; False where it is NaN."""
    rounding = (16.0 * torch.finfo(mean.dtype).eps * mean).square()
    return variance > rounding.clamp(min=torch.finfo(mean.dtype).tiny)

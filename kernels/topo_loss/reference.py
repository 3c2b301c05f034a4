"""The topographic term in plain PyTorch, differentiated by autograd.

d_x are the Euclidean distances of features, d_z and d_e the means over codebooks of the distances of latents and of
their codes. The term consists of the Pearson correlations of d_x with d_z and of d_z with d_e over the pairs i < j.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import gradients
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import quantize
from spinlock_fast.kernels.vq_assign.reference import gather_codes


def topographic_correlations(
    x: Tensor, latents: Tensor, quantized: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """Correlations between the distances of features, of latents and of codes.

    Args:
        x: [S, F] features.
        latents: [S, sum D].
        quantized: [S, sum D] codes of the latents; the gradient of their distances passes straight through to the
            latents.

    Returns:
        corr(d_x, d_z) and corr(d_z, d_e).
    """
    d_x = pairwise_distances(x.detach()[None])[0]
    d_z = pairwise_distances(layout.pad_columns(latents)).mean(0)
    d_e = pairwise_distances(layout.pad_columns(quantize(latents, quantized, layout))).mean(0)
    return pair_correlation(d_x, d_z), pair_correlation(d_z, d_e)


def correlations_of_codes(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """`topographic_correlations` of the codes [S, G] of the rows; the second is 0 if a code is -1.

    Autograd can differentiate it any number of times, and torch.func can transform it.
    """
    vectors = torch.nan_to_num(codebook.detach(), 0.0, 0.0, 0.0).to(latents.dtype)
    quantized = gather_codes(codes.clamp(min=0), vectors, layout)
    pre, post = topographic_correlations(x, latents, quantized, layout)
    return pre, post.masked_fill((codes < 0).any(), 0.0)


def correlation_gradient(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, grads: Sequence[Tensor | None]
) -> Tensor | None:
    """Gradient of the latents from the gradients of both correlations; it can be differentiated again."""
    return gradients(lambda z: correlations_of_codes(x, z, codes, codebook, layout), [latents], grads, [True])[0]


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances [G, S, S] between the rows of [G, S, D]; differentiable, with gradient 0 at distance 0.

    Computed as |a|^2 + |b|^2 - 2 a.b of centred points; a square within the rounding error of that sum gives
    distance 0.
    """
    points = points - points.mean(1, keepdim=True)
    norms = points.square().sum(-1)
    both = norms[:, :, None] + norms[:, None, :]
    square = torch.baddbmm(both, points, points.transpose(1, 2), alpha=-2.0)
    return _root_above(square, rounding(points) * both.detach())


def rounding(points: Tensor) -> float:
    """Bound of the rounding error of |a|^2 + |b|^2 - 2 a.b for points [..., D], relative to |a|^2 + |b|^2."""
    return (8.0 + math.sqrt(points.shape[-1])) * torch.finfo(points.dtype).eps


def _root_above(square: Tensor, floor: Tensor) -> Tensor:
    """sqrt(square) where square > floor, else 0 with gradient 0."""
    low = square <= floor
    return square.masked_fill(low, 1.0).sqrt().masked_fill(low, 0.0)


def pair_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two distance matrices [S, S] over the pairs i < j; 0 if one is constant."""
    S = a.shape[0]
    off_diagonal = 1.0 - torch.eye(S, dtype=a.dtype, device=a.device)
    pairs = max(S * (S - 1), 1)
    a, a_variance, a_varies = _centred(a, off_diagonal, pairs)
    b, b_variance, b_varies = _centred(b, off_diagonal, pairs)
    both = a_varies & b_varies
    norm = torch.where(both, a_variance, 1.0).sqrt() * torch.where(both, b_variance, 1.0).sqrt()
    return torch.where(both, (a * b).sum() / pairs / norm, 0.0)


def _centred(values: Tensor, off_diagonal: Tensor, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centred values, their variance, and whether it exceeds rounding errors."""
    mean = (values * off_diagonal).sum() / pairs
    centred = (values - mean) * off_diagonal
    variance = centred.square().sum() / pairs
    return centred, variance, varies(mean.detach(), variance)


def varies(mean: Tensor, variance: Tensor) -> Tensor:
    """Whether a variance exceeds the rounding errors of values near `mean`; False if it is NaN."""
    rounding = (16.0 * torch.finfo(mean.dtype).eps * mean).square()
    return variance > rounding.clamp(min=torch.finfo(mean.dtype).tiny)

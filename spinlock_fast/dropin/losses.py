"""Losses beside the fused commitment loss, and gradients of the choice of codes."""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import in_transform
from spinlock_fast.kernels.residual_vq.reference import MIN_LENGTH, lengths, unit

# Requires a gradient, and never gets one. No value is read from it.
_ROOT = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)


class _WithBackward(torch.autograd.Function):
    """`loss`, which then requires a gradient because `root` does."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, root: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def with_backward(loss: Tensor) -> Tensor:
    """`loss`, where `loss.backward()` is no error, even if neither the input nor a parameter takes a gradient."""
    if loss.requires_grad or in_transform():  # whose gradients are formed without `backward`
        return loss
    if torch.compiler.is_compiling():  # `requires_grad_` breaks the graph
        result: Tensor = _WithBackward.apply(loss, _ROOT)  # type: ignore[no-untyped-call]
        return result
    return loss.clone().requires_grad_()


class LossBreakdown(NamedTuple):
    """The parts of the loss, without their weights."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def orthogonality(codes: Tensor, corrected: bool) -> Tensor:
    """Mean squared difference of the codes' Gram matrix from the identity (arXiv 2112.00384, equation 2).

    Args:
        codes: [H, K, D].
        corrected: codes of length 0 count as they are; the original takes every code to be of length 1.
    """
    H, K, _ = codes.shape
    directions = unit(codes)
    gram = directions @ directions.transpose(1, 2)
    if corrected:
        return (gram - torch.eye(K, dtype=gram.dtype, device=gram.device)).square().mean()
    return gram.square().sum() / (H * K**2) - 1.0 / K


def negative_diversity(distances: Tensor, temperature: float) -> Tensor:
    """Minus the entropy of the mean assignment at each position, for distances [..., n, K]; 0 without a row."""
    if distances.numel() == 0:
        return distances.sum()
    share = (distances * temperature).softmax(-1).flatten(0, -3).mean(0)
    return (share * share.clamp(min=1e-5).log()).sum(-1).mean()


def rotate_to(source: Tensor, target: Tensor) -> Tensor:
    """`target` with the gradient of the rotation and scaling that carries `source` there (arXiv 2410.06424)."""
    with torch.no_grad():
        s, t = unit(source), unit(target)
        between = unit(s + t)
        factor = lengths(target) / lengths(source)
    along = (source * between).sum(-1, keepdim=True)
    back = (source * s).sum(-1, keepdim=True)
    turned: Tensor = factor * (source - 2.0 * along * between + 2.0 * back * t)
    return turned


def step_in_direction(source: Tensor, target: Tensor, variance: float = 5e-3) -> Tensor:
    """source plus the length of the error in its direction, up to noise: both sides learn (DiVeQ)."""
    error = target - source
    noised = error + sqrt(variance) * torch.randn_like(error)
    stepped: Tensor = source + unit(noised).detach() * error.norm(dim=-1, keepdim=True)
    return stepped


def straight_through(source: Tensor, target: Tensor) -> Tensor:
    """`target` with the gradient of `source` (Bengio et al. 2013)."""
    return source + (target - source).detach()


def squared_error(codes: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over entries of (codes - rows)^2; over rows where mask [...] is True. 0 where there is no row."""
    if mask is None:
        return F.mse_loss(codes, rows) if rows.numel() else (codes - rows).square().sum()
    weight = mask[..., None].to(rows.dtype)
    error = torch.where(mask[..., None], codes - rows, 0.0).square()
    return error.sum() / (weight.expand_as(error)).sum().clamp(min=1.0)


__all__ = [
    "MIN_LENGTH",
    "LossBreakdown",
    "negative_diversity",
    "orthogonality",
    "rotate_to",
    "squared_error",
    "step_in_direction",
    "straight_through",
    "with_backward",
]

"""The topographic correlations, and the loss made of them, by Triton kernels, as autograd functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches, rows_of
from spinlock_fast.kernels._common.higher_order import needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.topo_loss import pull, triton
from spinlock_fast.kernels.topo_loss.reference import correlation_gradient

_EPS = torch.finfo(torch.float32).eps


def _rounding(width: int) -> float:
    """`reference.rounding` of points of that width, and the 2 bits that three TF32 products lose."""
    return (16.0 + math.sqrt(width)) * _EPS


class Correlations(torch.autograd.Function):
    """`op.topographic_correlations` of float32 tensors on a CUDA device."""

    @staticmethod
    @launches
    def forward(
        ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
    ) -> tuple[Tensor, Tensor]:
        found, _ = _found(ctx, x, latents, codes, codebook, layout, 0.0)
        pre, post = found.unbind()
        return pre.clone(), post.clone()

    @staticmethod
    @launches
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        return None, _gradient(ctx, grads[0], grads[1], (1.0, 1.0)), None, None, None


class Loss(torch.autograd.Function):
    """`op.topographic_loss` of float32 tensors on a CUDA device."""

    @staticmethod
    @launches
    def forward(
        ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
    ) -> Tensor:
        ctx.factors = (-pre_weight, pre_weight - 1.0)
        return _found(ctx, x, latents, codes, codebook, layout, pre_weight)[1]

    @staticmethod
    @launches
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None, None]:
        return None, _gradient(ctx, grads[0], grads[0], ctx.factors), None, None, None, None


def _found(
    ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
) -> tuple[Tensor, Tensor]:
    """Both correlations [2] and the loss; keeps what their gradient needs."""
    given = x, latents, codes, codebook
    x, latents = rows_of(x), rows_of(latents)
    codes, codebook = codes.contiguous(), codebook.contiguous()
    S, F = x.shape
    sets = triton.point_sets(F, layout, x.device)
    points = triton.gather(x, latents, codes, codebook, layout)
    distances = triton.distances(points, sets, S, _rounding(layout.max_dims), _rounding(F))
    found, loss, stats = triton.correlations(distances, sets, layout.groups, pre_weight)
    ctx.layout, ctx.sets = layout, sets
    ctx.save_for_backward(*given, found, stats, distances, *points)
    return found, loss


def _gradient(ctx: Any, grad_pre: Tensor, grad_post: Tensor, factors: tuple[float, float]) -> Tensor | None:
    layout: CodebookLayout = ctx.layout
    x, latents, codes, codebook, found, stats, distances, *points = ctx.saved_tensors
    if needs_graph((grad_pre, grad_post)):
        return correlation_gradient(
            x, latents, codes, codebook, layout, (factors[0] * grad_pre, factors[1] * grad_post)
        )
    codes, codebook = codes.contiguous(), codebook.contiguous()
    return pull.gradient(
        grad_pre, grad_post, found, stats, distances, triton.Points(*points), ctx.sets, codes, codebook, layout,
        _rounding(layout.max_dims), factors,
    )  # fmt: skip

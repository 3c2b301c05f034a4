"""The topographic correlations by Triton kernels, as an autograd function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.topo_loss import pull, triton

_EPS = torch.finfo(torch.float32).eps


def _rounding(width: int) -> float:
    """`reference.rounding` of points of that width, and the 2 bits that three TF32 products lose."""
    return (16.0 + math.sqrt(width)) * _EPS


class Correlations(torch.autograd.Function):
    """`op.topographic_correlations` of float32 tensors on a CUDA device."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
    ) -> tuple[Tensor, Tensor]:
        x, latents = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, latents))
        codes, codebook = codes.contiguous(), codebook.contiguous()
        S, F = x.shape
        sets = triton.point_sets(F, layout, x.device)
        points = triton.gather(x, latents, codes, codebook, layout)
        distances = triton.distances(points, sets, S, _rounding(layout.max_dims), _rounding(F))
        found, stats = triton.correlations(distances, sets, layout.groups)
        ctx.layout, ctx.sets = layout, sets
        ctx.save_for_backward(found, stats, distances, *points, codes, codebook)
        pre, post = found.unbind()
        return pre.clone(), post.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        layout: CodebookLayout = ctx.layout
        found, stats, distances, *points, codes, codebook = ctx.saved_tensors
        grad = pull.gradient(
            grads[0], grads[1], found, stats, distances, triton.Points(*points), ctx.sets, codes, codebook, layout,
            _rounding(layout.max_dims),
        )  # fmt: skip
        return None, grad, None, None, None

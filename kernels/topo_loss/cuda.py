"""The topographic correlations by Triton kernels, as an autograd function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.topo_loss import triton
from spinlock_fast.kernels.topo_loss.triton import serves

__all__ = ["Correlations", "serves"]

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
        x, latents, codes = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, latents, codes))
        codes, codebook = codes.contiguous(), codebook.contiguous()
        S = x.shape[0]
        features = CodebookLayout.cached((1,), (x.shape[1],))
        centre = latents.mean(0)
        rounding = _rounding(layout.max_dims)
        d_x = triton.distances(x, None, x.mean(0), features, S, _rounding(x.shape[1]))
        d_z = triton.distances(latents, None, centre, layout, S, rounding)
        d_e = triton.distances(codebook, codes, centre, layout, S, rounding)
        found, stats = triton.correlations(d_x, d_z, d_e, layout.groups)
        ctx.layout = layout
        ctx.save_for_backward(found, stats, d_x, d_z, d_e, latents, codes, codebook, centre)
        pre, post = found.unbind()
        return pre.clone(), post.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        layout: CodebookLayout = ctx.layout
        rounding = _rounding(layout.max_dims)
        found, stats, d_x, d_z, d_e, latents, codes, codebook, centre = ctx.saved_tensors
        grad = triton.pull(
            grads[0], grads[1], found, stats, d_x, d_z, d_e, latents, codes, codebook, centre, layout, rounding
        )
        return None, grad, None, None, None

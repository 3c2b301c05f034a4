"""Loss functions of the quantizers, beside the commitment loss of the fused operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import in_transform
from spinlock_fast.kernels.residual_vq.reference import unit

# An input of `_RequireGrad` that requires a gradient; its value is never read and its gradient is None.
_GRAD_ROOT = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)


class _RequireGrad(torch.autograd.Function):
    """Returns `loss` with `requires_grad` set, through the unused input `root`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, root: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def ensure_backward(loss: Tensor) -> Tensor:
    """`loss`, made to require a gradient: `loss.backward()` must work even if nothing before it requires one.

    The result is not a leaf, so that callers can change it in place; under `torch.no_grad` it requires no gradient.
    """
    if loss.requires_grad or in_transform():  # torch.func forms gradients without `backward`
        return loss
    if torch.compiler.is_compiling():  # `requires_grad_` breaks the graph
        result: Tensor = _RequireGrad.apply(loss, _GRAD_ROOT)  # type: ignore[no-untyped-call]
        return result
    return loss.detach().requires_grad_().clone()


class LossBreakdown(NamedTuple):
    """Unweighted terms of the loss."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def orthogonality(codes: Tensor, corrected: bool) -> Tensor:
    """Mean squared difference of the codes' Gram matrix from the identity (arXiv 2112.00384, equation 2).

    Args:
        codes: [H, K, D].
        corrected: computes the diagonal; vector-quantize-pytorch assumes that every code has length 1.
    """
    H, K, _ = codes.shape
    directions = unit(codes)
    gram = directions @ directions.transpose(1, 2)
    if corrected:
        return (gram - torch.eye(K, dtype=gram.dtype, device=gram.device)).square().mean()
    return gram.square().sum() / (H * K**2) - 1.0 / K


def negative_entropy(similarities: Tensor, temperature: float) -> Tensor:
    """Negative entropy of the mean assignment per position, for similarities [..., n, K]; 0 without rows."""
    if similarities.numel() == 0:
        return similarities.sum()
    p = (similarities * temperature).softmax(-1).flatten(0, -3).mean(0)
    return (p * p.clamp(min=1e-5).log()).sum(-1).mean()


def squared_error(codes: Tensor, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of (codes - rows)^2 over all entries of the rows where mask [...] is True; 0 without rows."""
    if mask is None:
        return F.mse_loss(codes, rows) if rows.numel() else (codes - rows).square().sum()
    weight = mask[..., None].to(rows.dtype)
    error = torch.where(mask[..., None], codes - rows, 0.0).square()
    return error.sum() / (weight.expand_as(error)).sum().clamp(min=1.0)


def cross_entropy(similarities: Tensor, codes: Tensor) -> Tensor:
    """Mean cross entropy of softmax(similarities [H, N, K]) and codes [H, N], without codes of -1; 0 without rows."""
    total = F.cross_entropy(similarities.flatten(0, 1), codes.flatten(), ignore_index=-1, reduction="sum")
    return total / (codes != -1).sum().clamp(min=1)

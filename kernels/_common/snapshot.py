"""Copies of codebooks that are updated in place before the backward pass reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.operator import operator


def snapshot(codes: Tensor) -> Tensor:
    """A differentiable copy of `codes` that later in-place updates do not change.

    In eager mode this is `clone`. Under `torch.compile` Inductor removes a clone, or recomputes it in the backward pass
    from the updated buffer, so the copy is an opaque operator there.
    """
    return _snapshot(codes) if torch.compiler.is_compiling() and not exporting() else codes.clone()


@operator("snapshot", fake=torch.empty_like, backward=lambda ctx, grad: (grad,))
def _snapshot(codes: Tensor) -> Tensor:
    return codes.clone()

"""The mean squared cosine in plain PyTorch: mean over i != j of (e_i . e_j / (|e_i| |e_j|))^2, then over codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout


def mean_squared_cosine(codebook: Tensor, layout: CodebookLayout) -> Tensor:
    """A scalar, of code vectors [sum K D]. A codebook of one code counts as 0."""
    codes = layout.pad_codebook(codebook)  # [G, K_max, D_max]
    unit = codes / codes.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(codes.dtype).tiny)
    cosine = unit @ unit.transpose(1, 2)
    off_diagonal = 1.0 - torch.eye(layout.max_codes, dtype=codes.dtype, device=codes.device)
    K = layout.indices(codes.device).num_codes
    pairs = (K * (K - 1.0)).clamp(min=1.0)
    mean_square: Tensor = (cosine * off_diagonal).square().sum((1, 2)) / pairs
    return mean_square.mean()

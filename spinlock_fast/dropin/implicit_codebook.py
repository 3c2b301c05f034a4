"""Codebooks that depend on the codes of earlier stages (QINCo, Huijben et al. 2024, arXiv 2401.14732)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImplicitCodebook(nn.Module):
    """Residual MLP that maps a codebook and the sum of earlier code vectors to one codebook per row.

    Args:
        dim: dimension of the codes.
        dim_hidden: hidden width; `dim` by default.
        depth: number of residual layers.
        l2norm_output: normalises the codes to unit length.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )
        self.l2norm_output = l2norm_output

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Codes [..., K, D] and a condition [b, n, D] or [b, D] -> codes [..., b, n, K, D] in the input's dtype."""
        if condition.ndim == 2:
            condition = condition[:, None]
        shape = (*codes.shape[:-2], *condition.shape[:2], *codes.shape[-2:])
        x = torch.cat([condition[:, :, None].expand(shape), codes[..., None, None, :, :].expand(shape)], -1)
        x = self.proj_in(x.to(self.proj_in.weight.dtype))
        for layer in self.layers:
            x = layer(x) + x
        return (F.normalize(x, dim=-1) if self.l2norm_output else x).to(codes.dtype)

"""Codes that depend on what earlier stages chose (QINCo, Huijben et al. 2024, arXiv 2401.14732)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeNetwork(nn.Module):
    """A residual network that turns a codebook into one for each row.

    Args:
        dim: of the codes.
        dim_hidden: of the layers, `dim` by default.
        depth: number of layers.
        l2norm_output: codes of unit length.
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
        """Codes [..., K, D] and a condition [b, n, D] or [b, D] -> [..., b, n, K, D] of the type of the codes."""
        if condition.ndim == 2:
            condition = condition[:, None]
        shape = (*codes.shape[:-2], *condition.shape[:2], *codes.shape[-2:])
        x = torch.cat([condition[:, :, None].expand(shape), codes[..., None, None, :, :].expand(shape)], -1)
        x = self.proj_in(x.to(self.proj_in.weight.dtype))
        for layer in self.layers:
            x = layer(x) + x
        return (F.normalize(x, dim=-1) if self.l2norm_output else x).to(codes.dtype)

"""The topographic correlations by the native CPU kernels: every pair of rows once, all codebooks of a tile in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library

_WIDTH = 32  # rows of the distance matrices are padded to a multiple of it


def forward(x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> tuple[Tensor, ...]:
    """Both correlations, and what `backward` reads."""
    S, F = x.shape
    x, z = ((rows - rows.mean(0)).contiguous() for rows in (x, latents))  # a difference keeps the strides
    codebook = torch.nan_to_num(codebook, 0.0, 0.0, 0.0).contiguous()
    codes = codes.contiguous()
    missing = library.check_codes(address(codes), S, list(layout.num_codes), "topographic_correlations")
    transposed = codes.t().clamp(min=0).to(torch.int32).contiguous()  # [G, S]
    distances = x.new_empty(3, S, -(-S // _WIDTH) * _WIDTH)
    code_distances = x.new_empty(sum(K * K for K in layout.num_codes))
    pre, post, factors = library.topo_forward(
        address(x), F, address(z), address(transposed), address(codebook), S, list(layout.num_codes),
        list(layout.dims), address(distances), address(code_distances), missing, torch.get_num_threads(),
    )  # fmt: skip
    gradient_factors = torch.tensor(factors, dtype=torch.float64, device="cpu")
    saved = z, transposed, codebook, distances, code_distances, gradient_factors
    return x.new_tensor(pre), x.new_tensor(post), *saved


def backward(grad_pre: Tensor, grad_post: Tensor, saved: Sequence[Tensor], layout: CodebookLayout) -> Tensor:
    """Gradient of the latents [S, sum D]."""
    z, transposed, codebook, distances, code_distances, gradient_factors = saved
    grad_z = torch.empty_like(z)
    library.topo_backward(
        float(grad_pre), float(grad_post), gradient_factors.tolist(), address(z), address(transposed),
        address(codebook), z.shape[0], list(layout.num_codes), list(layout.dims), address(distances),
        address(code_distances), address(grad_z), torch.get_num_threads(),
    )  # fmt: skip
    return grad_z

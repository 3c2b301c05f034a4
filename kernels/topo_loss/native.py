"""`op.topographic_correlations` on a CPU: every pair of rows once, all codebooks of a tile while it is in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.topo_loss.reference import correlation_gradient

_WIDTH = 32  # rows of the distance matrices are padded to a multiple of it


class Correlations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
    ) -> tuple[Tensor, Tensor]:
        S, F = x.shape
        given = x, latents, codes, codebook
        x, z = ((rows - rows.mean(0)).contiguous() for rows in (x, latents))  # a difference keeps the strides
        codebook = torch.nan_to_num(codebook, 0.0, 0.0, 0.0).contiguous()
        codes = codes.contiguous()
        missing = library.check_codes(address(codes), S, list(layout.num_codes), "topographic_correlations")
        turned = codes.t().clamp(min=0).to(torch.int32).contiguous()  # [G, S]
        distances = x.new_empty(3, S, -(-S // _WIDTH) * _WIDTH)
        tables = x.new_empty(sum(K * K for K in layout.num_codes))
        sizes = list(layout.num_codes), list(layout.dims)
        pre, post, ctx.factors = library.topo_forward(
            address(x), F, address(z), address(turned), address(codebook), S, *sizes, address(distances),
            address(tables), missing, torch.get_num_threads(),
        )  # fmt: skip
        ctx.layout = layout
        ctx.save_for_backward(*given, z, turned, codebook, distances, tables)
        return x.new_tensor(pre), x.new_tensor(post)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        layout: CodebookLayout = ctx.layout
        *given, z, turned, codebook, distances, tables = ctx.saved_tensors
        if needs_graph(grads):
            features, latents, codes, code_vectors = given
            grad = correlation_gradient(features, latents, codes, code_vectors, layout, grads)
            return None, grad, None, None, None
        of_z = torch.empty_like(z)
        library.topo_backward(
            float(grads[0]), float(grads[1]), ctx.factors, address(z), address(turned), address(codebook), z.shape[0],
            list(layout.num_codes), list(layout.dims), address(distances), address(tables), address(of_z),
            torch.get_num_threads(),
        )  # fmt: skip
        return None, of_z, None, None, None

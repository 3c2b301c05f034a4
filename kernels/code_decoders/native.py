"""`op.partial_loss` on a CPU: ragged, a codebook a task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.code_decoders.reference import gradients_of_loss


class PartialLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        quantized: Tensor,
        codes: Tensor,
        codebook: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        layout: CodebookLayout,
    ) -> Tensor:
        given = x, quantized, w1, b1, w2, b2
        mean = x.mean(0)
        x = (x - mean).contiguous()  # what follows cancels less about the mean; a difference keeps the strides
        codes, codebook = codes.contiguous(), codebook.contiguous()
        w1, b1, w2, b2 = (parameter.contiguous() for parameter in (w1, b1, w2, b2))
        (B, F), H = x.shape, w1.shape[1]
        hidden = x.new_empty(layout.total_codes, H)
        decoded, off = x.new_empty(layout.total_codes, F), x.new_empty(layout.total_codes, F)
        loss = library.decoders_forward(
            address(x), address(mean), address(codes), address(codebook), address(w1), address(b1), address(w2),
            address(b2), list(layout.num_codes), list(layout.dims), B, F, H, address(hidden), address(decoded),
            address(off), torch.get_num_threads(),
        )  # fmt: skip
        ctx.layout = layout
        ctx.save_for_backward(*given, x, codes, codebook, hidden, decoded, off)
        return x.new_tensor(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: CodebookLayout = ctx.layout
        features, *given, x, codes, codebook, hidden, decoded, off = ctx.saved_tensors
        if needs_graph(grads):
            return gradients_of_loss(features, codes, given, layout, grads, ctx.needs_input_grad)
        w1, w2 = given[1].contiguous(), given[3].contiguous()
        (B, F), H, G = x.shape, w1.shape[1], layout.groups
        scale = float(grads[0]) * 2.0 / max(G * B * F, 1)
        of_quantized = x.new_empty(B, layout.total_dims) if ctx.needs_input_grad[1] else None
        of_w1, of_b1 = torch.empty_like(w1), x.new_empty(G, H)
        of_w2, of_b2 = torch.empty_like(w2), x.new_empty(G, F)
        library.decoders_backward(
            scale, address(x), address(codes), address(codebook), address(w1), address(w2), list(layout.num_codes),
            list(layout.dims), B, F, H, address(hidden), address(decoded), address(off), address(of_quantized),
            address(of_w1), address(of_b1), address(of_w2), address(of_b2), torch.get_num_threads(),
        )  # fmt: skip
        return None, of_quantized, None, None, of_w1, of_b1, of_w2, of_b2, None

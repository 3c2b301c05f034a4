"""The partial decoders by the native CPU kernels: ragged, one task per codebook."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library
from spinlock_fast.kernels.code_decoders.reference import Decoders


def forward(
    x: Tensor, codes: Tensor, codebook: Tensor, decoders: Decoders, layout: CodebookLayout
) -> tuple[Tensor, ...]:
    """The loss, and what `backward` reads."""
    mean = x.mean(0)
    x = (x - mean).contiguous()  # centred: the sums over codes cancel less; a difference keeps the strides
    codes, codebook = codes.contiguous(), codebook.contiguous()
    w1, b1, w2, b2 = (parameter.contiguous() for parameter in decoders)
    (B, F), H = x.shape, w1.shape[1]
    hidden = x.new_empty(layout.total_codes, H)
    decoded, residual = x.new_empty(layout.total_codes, F), x.new_empty(layout.total_codes, F)
    loss = library.decoders_forward(
        address(x), address(mean), address(codes), address(codebook), address(w1), address(b1), address(w2),
        address(b2), list(layout.num_codes), list(layout.dims), B, F, H, address(hidden), address(decoded),
        address(residual), torch.get_num_threads(),
    )  # fmt: skip
    return x.new_tensor(loss), x, codes, codebook, hidden, decoded, residual


def backward(
    grad: Tensor, saved: Sequence[Tensor], decoders: Decoders, layout: CodebookLayout, needs_quantized: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of quantized, w1, b1, w2, b2."""
    x, codes, codebook, hidden, decoded, residual = saved
    w1, w2 = decoders.w1.contiguous(), decoders.w2.contiguous()
    (B, F), H, G = x.shape, w1.shape[1], layout.groups
    scale = float(grad) * 2.0 / max(G * B * F, 1)
    grad_quantized = x.new_empty(B, layout.total_dims) if needs_quantized else None
    grad_w1, grad_b1 = torch.empty_like(w1), x.new_empty(G, H)
    grad_w2, grad_b2 = torch.empty_like(w2), x.new_empty(G, F)
    library.decoders_backward(
        scale, address(x), address(codes), address(codebook), address(w1), address(w2), list(layout.num_codes),
        list(layout.dims), B, F, H, address(hidden), address(decoded), address(residual), address(grad_quantized),
        address(grad_w1), address(grad_b1), address(grad_w2), address(grad_b2), torch.get_num_threads(),
    )  # fmt: skip
    return grad_quantized, grad_w1, grad_b1, grad_w2, grad_b2

"""The grouped layers on a CPU: ragged products without padding, with bias, ReLU, dropout and its gradient in the same
pass. Dropout keeps no mask: it is a hash of a seed, row and column, and of the hidden layer zeros tell it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels.grouped_mlp.ragged import Ragged
from spinlock_fast.kernels.native import address, draw_seed, library, operand


class GroupedMLP(torch.autograd.Function):
    """`op.grouped_mlp`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, inputs: Ragged, dropout: float
    ) -> Tensor:
        (G, H, E), B = w2.shape, x.shape[0]
        seed = draw_seed() if dropout > 0.0 else None
        hidden, out = x.new_empty(G, B, H), x.new_empty(G, B, E)
        b1, b2 = b1.contiguous(), b2.contiguous()
        library.mlp_forward(
            operand(x), operand(w1), address(b1), operand(w2[0]), w2.stride(0), address(b2), list(inputs.sizes),
            B, H, E, dropout, address(seed), address(hidden), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.inputs, ctx.dropout = inputs, dropout
        ctx.save_for_backward(x, w1, hidden, w2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, hidden, w2 = ctx.saved_tensors
        (G, H, E), B = w2.shape, x.shape[0]
        grad = grads[0].contiguous()
        # Only the gradient of x needs that of the hidden values in memory.
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        of_b1 = x.new_empty(G, H)
        # Laid out as w1 where the kernel can write it so: one that is turned has many zeros to leave out.
        of_w1 = torch.empty_like(w1) if of_x is not None and w1.stride(0) == 1 else x.new_empty(w1.shape)
        of_w2, of_b2 = x.new_empty(w2.shape), x.new_empty(G, E)
        library.mlp_backward(
            address(grad), operand(x), operand(w1), operand(w2[0]), w2.stride(0), address(hidden),
            list(ctx.inputs.sizes), B, H, E, ctx.dropout, address(of_hidden), address(of_x), operand(of_w1),
            address(of_b1), address(of_w2), address(of_b2), torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_w1, of_b1, of_w2, of_b2, None, None


class ScaledOutputLinear(torch.autograd.Function):
    """`op.scaled_output_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
    ) -> Tensor:
        x, gain, shift, weight, bias = (tensor.contiguous() for tensor in (x, gain, shift, weight, bias))
        _, B, width = x.shape
        scaled, out = torch.empty_like(weight), x.new_empty(B, outputs.total)
        library.output_linear(
            address(x), address(gain), address(shift), address(weight), address(bias), list(outputs.sizes), B, width,
            address(scaled), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.outputs = outputs
        ctx.save_for_backward(x, gain, shift, weight, scaled)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, weight, scaled = ctx.saved_tensors
        _, B, width = x.shape
        outputs: Ragged = ctx.outputs
        grad = grads[0].contiguous()
        of_x, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), x.new_empty(outputs.total)
        of_gain, of_shift = torch.empty_like(gain), torch.empty_like(shift)
        library.output_linear_backward(
            address(grad), address(x), address(gain), address(shift), address(weight), address(scaled),
            list(outputs.sizes), B, width, address(of_x), address(of_gain), address(of_shift), address(of_weight),
            address(of_bias), torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_gain, of_shift, of_weight, of_bias, None


class RaggedLayerNorm(torch.autograd.Function):
    """`op.ragged_layer_norm`, after dropout."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, segments: Ragged, eps: float, dropout: float
    ) -> Tensor:
        x = x.contiguous()
        B = x.shape[0]
        seed = draw_seed() if dropout > 0.0 else None
        normed, deviation, out = torch.empty_like(x), x.new_empty(B, segments.groups), torch.empty_like(x)
        library.segments(
            address(x), B, list(segments.sizes), address(weight), address(bias), eps, dropout, address(seed),
            address(normed), address(deviation), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.segments, ctx.dropout, ctx.seed = segments, dropout, seed
        ctx.save_for_backward(normed, deviation, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, deviation, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x, of_weight, of_bias = torch.empty_like(normed), torch.empty_like(weight), torch.empty_like(weight)
        library.segments_backward(
            address(grad), address(normed), address(deviation), normed.shape[0], list(ctx.segments.sizes),
            address(weight), ctx.dropout, address(ctx.seed), address(of_x), address(of_weight), address(of_bias),
            torch.get_num_threads(),
        )  # fmt: skip
        return of_x, of_weight, of_bias, None, None, None


class Normalize(torch.autograd.Function):
    """`op.normalize_`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        normed = x
        ctx.mark_dirty(x)
        deviation = x.new_empty(x.shape[:-1])
        library.normalize(
            address(normed), deviation.numel(), x.shape[-1], eps, address(deviation), torch.get_num_threads()
        )
        ctx.save_for_backward(normed, deviation)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        normed, deviation = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x = torch.empty_like(grad)
        library.normalize_backward(
            address(grad), address(normed), address(deviation), deviation.numel(), grad.shape[-1], address(of_x),
            torch.get_num_threads(),
        )  # fmt: skip
        return of_x, None

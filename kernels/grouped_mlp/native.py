"""The grouped layers on a CPU: ragged products without padding, with bias, ReLU, dropout and its gradient in the same
pass. Dropout keeps no mask: it is a hash of a seed, row and column, and of the hidden layer zeros tell it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spinlock_fast.kernels._common.higher_order import gradients, needs_graph
from spinlock_fast.kernels._common.native import address, draw_seed, library, operand
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp.reference import mlp_gradients, ragged_layer_norm, scaled_output_linear


class GroupedMLP(torch.autograd.Function):
    """`op.grouped_mlp`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, inputs: Ragged, dropout: float
    ) -> Tensor:
        (G, H, E), B = w2.shape, x.shape[0]
        seed = draw_seed() if dropout > 0.0 else None
        hidden, out = x.new_empty(G, B, H), x.new_empty(G, B, E)
        first_bias, second_bias = b1.contiguous(), b2.contiguous()
        library.mlp_forward(
            operand(x), operand(w1), address(first_bias), operand(w2[0]), w2.stride(0), address(second_bias),
            list(inputs.sizes), B, H, E, dropout, address(seed), address(hidden), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.inputs, ctx.dropout = inputs, dropout
        ctx.save_for_backward(x, w1, b1, w2, b2, hidden)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, hidden = ctx.saved_tensors
        if needs_graph(grads):
            scale, sizes = keep_scale(ctx.dropout), ctx.inputs.sizes
            return *mlp_gradients(inputs, hidden, scale, sizes, grads, ctx.needs_input_grad[:5]), None, None
        x, w1, _, w2, _ = inputs
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
        ctx.outputs = outputs
        given = x, gain, shift, weight, bias  # what a gradient of the gradient is traced back to
        x, gain, shift, weight, bias = (tensor.contiguous() for tensor in given)
        _, B, width = x.shape
        scaled, out = torch.empty_like(weight), x.new_empty(B, outputs.total)
        library.output_linear(
            address(x), address(gain), address(shift), address(weight), address(bias), list(outputs.sizes), B, width,
            address(scaled), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(*given, scaled)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        outputs: Ragged = ctx.outputs
        *given, scaled = ctx.saved_tensors
        if needs_graph(grads):
            return *gradients(
                partial(scaled_output_linear, sizes=outputs.sizes), given, grads, ctx.needs_input_grad[:5]
            ), None
        x, gain, shift, weight, _ = (tensor.contiguous() for tensor in given)
        _, B, width = x.shape
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
        rows, scale, shift = x.contiguous(), weight.contiguous(), bias.contiguous()
        B = x.shape[0]
        seed = draw_seed() if dropout > 0.0 else None
        normed, deviation, out = torch.empty_like(rows), rows.new_empty(B, segments.groups), torch.empty_like(rows)
        library.segments(
            address(rows), B, list(segments.sizes), address(scale), address(shift), eps, dropout, address(seed),
            address(normed), address(deviation), address(out), torch.get_num_threads(),
        )  # fmt: skip
        ctx.segments, ctx.eps, ctx.dropout, ctx.seed = segments, eps, dropout, seed
        ctx.save_for_backward(x, weight, bias, normed, deviation)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if needs_graph(grads):
            if ctx.dropout > 0.0:  # the formula does not know what was dropped
                once: tuple[Tensor | None, ...] = once_differentiable(_layer_norm_gradients)(ctx, *grads)
                return once
            formula = partial(ragged_layer_norm, sizes=ctx.segments.sizes, eps=ctx.eps)
            return *gradients(formula, ctx.saved_tensors[:3], grads, ctx.needs_input_grad[:3]), None, None, None
        return _layer_norm_gradients(ctx, *grads)


def _layer_norm_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    _, weight, _, normed, deviation = ctx.saved_tensors
    grad, weight = grads[0].contiguous(), weight.contiguous()
    of_x, of_weight, of_bias = torch.empty_like(normed), torch.empty_like(weight), torch.empty_like(weight)
    library.segments_backward(
        address(grad), address(normed), address(deviation), normed.shape[0], list(ctx.segments.sizes),
        address(weight), ctx.dropout, address(ctx.seed), address(of_x), address(of_weight), address(of_bias),
        torch.get_num_threads(),
    )  # fmt: skip
    return of_x, of_weight, of_bias, None, None, None


class Normalize(torch.autograd.Function):
    """`op.normalize_`, and the deviations, which carry what a gradient of the gradient needs of the lost input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        deviation = x.new_empty(x.shape[:-1])
        library.normalize(address(x), deviation.numel(), x.shape[-1], eps, address(deviation), torch.get_num_threads())
        ctx.save_for_backward(x, deviation)
        return x, deviation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        normed, deviation = ctx.saved_tensors
        of_normed, of_deviation = grads
        if needs_graph(grads) or of_deviation is not None:
            return _normalize_gradient(of_normed, of_deviation, normed, deviation[..., None]), None
        if of_normed is None:
            return None, None
        grad = of_normed.contiguous()
        of_x = torch.empty_like(grad)
        library.normalize_backward(
            address(grad), address(normed), address(deviation), deviation.numel(), grad.shape[-1], address(of_x),
            torch.get_num_threads(),
        )  # fmt: skip
        return of_x, None


def _normalize_gradient(of_normed: Tensor | None, of_deviation: Tensor | None, y: Tensor, r: Tensor) -> Tensor | None:
    """The gradient of x by those of y = (x - mean) r and r = 1 / sqrt(variance + eps), in plain operations."""
    of_x = None
    if of_normed is not None:
        along = (of_normed * y).mean(-1, keepdim=True)
        of_x = (of_normed - of_normed.mean(-1, keepdim=True) - y * along) * r
    if of_deviation is not None:
        more = -of_deviation[..., None] * r.square() * y / y.shape[-1]
        of_x = more if of_x is None else of_x + more
    return of_x


def keep_scale(dropout: float) -> float:
    """1 / (1 - p), 0 where everything is dropped."""
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0

"""The grouped networks: checks of arguments, choice of the implementation, gradients.

Gradients are written by hand: autograd would scatter instead of gather, store masks that the outputs imply, and make
a pass over memory for every factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend
from spinlock_fast.kernels._common.dropout import BatchSlice, drop, keep_scale
from spinlock_fast.kernels._common.guard import SAME, check, check_batch, check_rate
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.implementation import choose_implementation
from spinlock_fast.kernels._common.precision import dot_precision
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp import cpu, pytorch, reference


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    inputs: Ragged,
    dropout: float = 0.0,
    backend: Backend = "auto",
    batch: BatchSlice | None = None,
) -> Tensor:
    """Two-layer networks of all groups: dropout(relu(x_g W1_g + b1_g)) W2_g + b2_g.

    Args:
        x: [B, sum n] the inputs of group 0, then of group 1, ...
        w1: [sum n, H]; b1: [G, H]; w2: [G, H, E]; b2: [G, E].
        inputs: n of each group.
        dropout: probability that a hidden value is dropped.
        backend: "auto", "triton" or "reference", see `resolve_backend`.
        batch: place of the rows in a larger batch, for which dropout draws random numbers; None if x is the batch.

    Returns:
        [G, B, E].
    """
    G, n = inputs.groups, inputs.total
    check(
        "grouped_mlp",
        ("x", x, ("B", n), SAME),
        ("w1", w1, (n, "H"), SAME),
        ("b1", b1, (G, "H"), SAME),
        ("w2", w2, (G, "H", "E"), SAME),
        ("b2", b2, (G, "E"), SAME),
    )
    check_rate("grouped_mlp", dropout)
    check_batch("grouped_mlp", x.shape[0], batch)
    if in_transform():
        ones = x.new_ones(G, x.shape[0], w1.shape[1]) if dropout > 0.0 else None
        keep = None if ones is None else drop(ones, dropout, batch)
        return reference.grouped_mlp(x, w1, b1, w2, b2, inputs.sizes, keep)
    if torch.compiler.is_compiling():  # autograd and the compiler derive the gradients
        return pytorch.forward(x, w1, b1, w2, b2, inputs, dropout, batch)[0]
    implementation = choose_implementation(backend, x, w1, b1, w2, b2)
    out: Tensor = _GroupedMLP.apply(x, w1, b1, w2, b2, inputs, dropout, batch, implementation)  # type: ignore[no-untyped-call]
    return out


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, w1, b1, w2, b2, inputs, dropout, batch, implementation = arguments
        tensors = x, w1, b1, w2, b2
        if implementation == "cpu":
            out, *saved = cpu.forward(*tensors, inputs, dropout, batch)
        elif implementation == "triton":
            from spinlock_fast.kernels.grouped_mlp import triton_forward

            ctx.precision = dot_precision()
            out, *saved = triton_forward.forward(*tensors, inputs, dropout, batch, ctx.precision)
        else:
            out, *saved = pytorch.forward(*tensors, inputs, dropout, batch)
        ctx.inputs, ctx.dropout, ctx.implementation = inputs, dropout, implementation
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unpacked = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        tensors, saved = unpacked[:5], unpacked[5:]
        inputs, dropout, needed = ctx.inputs, ctx.dropout, ctx.needs_input_grad[:5]
        gradients: tuple[Tensor | None, ...]
        if needs_graph(grads):
            scale = keep_scale(dropout)
            gradients = (*reference.mlp_gradients(tensors, saved[0], scale, inputs.sizes, grads, needed),)
        elif ctx.implementation == "cpu":
            gradients = cpu.backward(grads[0], tensors, saved, inputs, dropout, needed[0])
        elif ctx.implementation == "triton":
            from spinlock_fast.kernels.grouped_mlp import triton_backward

            gradients = triton_backward.backward(grads[0], tensors, saved, inputs, dropout, needed[0], ctx.precision)
        else:
            gradients = pytorch.backward(grads[0], tensors, saved, inputs, dropout, needed[0])
        return *gradients, None, None, None, None

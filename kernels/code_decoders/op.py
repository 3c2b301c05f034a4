"""The loss of the partial decoders in code space, and what evaluation needs of them: checks, dispatch, gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, SAME, check, check_codes
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.implementation import choose_implementation
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.operator import operator, recomputed_gradients
from spinlock_fast.kernels.code_decoders import cpu, pytorch, reference
from spinlock_fast.kernels.code_decoders.reference import Decoders


def partial_loss(
    x: Tensor,
    quantized: Tensor,
    codes: Tensor,
    codebook: Tensor,
    decoders: Decoders,
    layout: CodebookLayout,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over codebooks, rows and features of (P_g(e_g) - x)^2; P_g is evaluated once per code.

    Value and gradients equal those of `reference.partial_loss(x, quantized, decoders, layout)` up to rounding.

    Args:
        x: [B, F]; no gradient.
        quantized: [B, sum D] codes of the rows; differentiable.
        codes: [B, G] int64 indices of the codes; a code of -1 makes the loss NaN; on a GPU, so does one above K_g.
        codebook: [sum K D] code vectors that `codes` index; no gradient.
        decoders: differentiable.
        layout: sizes of the group.
        backend: "auto", "triton" or "reference", see `resolve_backend`. Half precision is computed in float32.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: shapes that do not match, or tensors on different devices.
        IndexError: on a CPU, a code outside its codebook.
    """
    _check_arguments(
        "partial_loss", decoders, layout,
        ("x", x, ("B", "F"), FLOAT),
        ("quantized", quantized, ("B", layout.total_dims), FLOAT),
        ("codes", codes, ("B", layout.groups), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
    )  # fmt: skip
    wide = functools.reduce(torch.promote_types, [t.dtype for t in (x, quantized, *decoders)], torch.float32)
    x, quantized, codebook, *parameters = (t.to(wide) for t in (x, quantized, codebook, *decoders))
    decoders = Decoders(*parameters)
    if in_transform() or exporting():
        return reference.loss_of_codes(x.detach(), quantized, codes, decoders, layout)
    if torch.compiler.is_compiling():
        tensors = x.detach(), quantized, codes, codebook.detach(), *decoders
        return _loss(*tensors, layout.num_codes, layout.dims, backend)
    implementation = choose_implementation(backend, x, quantized, codebook, *decoders)
    if implementation == "pytorch":
        check_codes("partial_loss", codes, layout)
    loss: Tensor = _PartialLoss.apply(  # type: ignore[no-untyped-call]
        x.detach(), quantized, codes, codebook.detach(), *decoders, layout, implementation
    )
    return loss


class _PartialLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, quantized, codes, codebook, w1, b1, w2, b2, layout, implementation = arguments
        decoders = Decoders(w1, b1, w2, b2)
        if implementation == "cpu":
            loss, *saved = cpu.forward(x, codes, codebook, decoders, layout)
        elif implementation == "triton":
            from spinlock_fast.kernels.code_decoders import triton_forward

            loss, *saved = triton_forward.forward(x, codes, codebook, decoders, layout)
        else:
            loss, *saved = pytorch.forward(x, codes, codebook, decoders, layout)
        ctx.layout, ctx.implementation = layout, implementation
        ctx.save_for_backward(x, codes, quantized, *decoders, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, quantized, w1, b1, w2, b2, *saved = ctx.saved_tensors
        layout, implementation, needed = ctx.layout, ctx.implementation, ctx.needs_input_grad
        decoders = Decoders(w1, b1, w2, b2)
        gradients: Sequence[Tensor | None]
        if needs_graph(grads):
            inputs = (quantized, *decoders)
            gradients = reference.loss_gradients(x, codes, inputs, layout, grads, [needed[1], *needed[4:8]])
        elif implementation == "cpu":
            gradients = cpu.backward(grads[0], saved, decoders, layout, needed[1])
        elif implementation == "triton":
            from spinlock_fast.kernels.code_decoders import triton_backward

            gradients = triton_backward.backward(grads[0], saved, decoders, layout, needed[1])
        else:
            gradients = pytorch.backward(grads[0], saved, decoders, layout, needed[1])
        return None, gradients[0], None, None, *gradients[1:], None, None


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _loss_gradients(grads[0], *ctx.saved_tensors, *ctx.options)
    return None, gradients[0], None, None, *gradients[1:]


@operator("partial_loss", fake=_fake, setup_context=_setup_context, backward=_backward)
def _loss(
    x: Tensor,
    quantized: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
    backend: str,
) -> Tensor:
    """`partial_loss` for compiled code."""
    layout = CodebookLayout.of(num_codes, dims)
    return partial_loss(x, quantized, codes, codebook, Decoders(w1, b1, w2, b2), layout, cast(Backend, backend))


def _gradients_fake(grad: Tensor, x: Tensor, quantized: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (quantized, *tensors[2:6]))


@operator("partial_loss_backward", fake=_gradients_fake)
def _loss_gradients(
    grad: Tensor,
    x: Tensor,
    quantized: Tensor,
    codes: Tensor,
    codebook: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = x, quantized, codes, codebook, w1, b1, w2, b2
    implementation = choose_implementation(cast(Backend, backend), x, quantized, codebook, w1, b1, w2, b2)
    arguments = *tensors, CodebookLayout.of(num_codes, dims), implementation
    quantized_gradient, *others = recomputed_gradients(_PartialLoss, arguments, [grad], [1, 4, 5, 6, 7])
    return quantized_gradient, others[0], others[1], others[2], others[3]


def code_statistics(x: Tensor, codes: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Number of rows of every code, and the sums of their features.

    Args:
        x: [B, F].
        codes: [B, G] int64; rows with code -1 are skipped.

    Returns:
        counts [G, K_max, 1] and sums [G, K_max, F].
    """
    check("code_statistics", ("x", x, ("B", "F"), FLOAT), ("codes", codes, ("B", layout.groups), INDEX))
    check_codes("code_statistics", codes, layout)
    return pytorch.code_statistics(x, codes, layout)


def decode_codes(codebook: Tensor, decoders: Decoders, layout: CodebookLayout) -> Tensor:
    """The reconstruction P_g(e) of every code from its codebook alone.

    Args:
        codebook: [sum K D].
        decoders: parameters of P_g.
        layout: sizes of the group.

    Returns:
        [G, K_max, F]; rows beyond K_g are undefined.
    """
    _check_arguments("decode_codes", decoders, layout, ("codebook", codebook, (layout.total_entries,), SAME))
    return pytorch.decode_codes(codebook, decoders, layout)


def _check_arguments(operator: str, decoders: Decoders, layout: CodebookLayout, *arguments: Any) -> None:
    G = layout.groups
    check(
        operator,
        *arguments,
        ("decoders.w1", decoders.w1, (layout.total_dims, "H"), SAME),
        ("decoders.b1", decoders.b1, (G, "H"), SAME),
        ("decoders.w2", decoders.w2, (G, "H", "F"), SAME),
        ("decoders.b2", decoders.b2, (G, "F"), SAME),
    )

"""The topographic correlations and their loss: checks of arguments, choice of the implementation, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, check, check_codes
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.implementation import Implementation
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.operator import operator, recomputed_gradients
from spinlock_fast.kernels._common.precision import full_float32
from spinlock_fast.kernels.topo_loss import cpu, pytorch, reference


def topographic_correlations(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor]:
    """Correlations between the distances of features, of latents and of codes.

    Let d_x be the distances of features, d_z and d_e the means over codebooks of the distances of latents and codes.

    Args:
        x: [S, F] features; no gradient.
        latents: [S, sum D]; the gradient of d_e passes straight through to them.
        codes: [S, G] int64, codes of the latents; a code of -1 makes the second correlation 0.
        codebook: [sum K D] code vectors that `codes` index; no gradient.
        layout: sizes of the group.

    Returns:
        Pearson correlations of d_x with d_z and of d_z with d_e; 0 where one of the two is constant.
    """
    x, latents, codebook = _checked("topographic_correlations", x, latents, codes, codebook, layout)
    if in_transform() or exporting():
        return reference.correlations_of_codes(x.detach(), latents, codes, codebook, layout)
    if torch.compiler.is_compiling():
        pre, post = _correlations(x.detach(), latents, codes, codebook.detach(), layout.num_codes, layout.dims)
        return pre, post
    implementation = _choose(x, latents, codebook)
    if implementation == "pytorch":
        check_codes("topographic_correlations", codes, layout)
    # Not TF32: distances need the full mantissa.
    with full_float32(x.device):
        pre, post = _Topographic.apply(  # type: ignore[no-untyped-call]
            x.detach(), latents, codes, codebook.detach(), layout, implementation, None
        )
    return pre, post


def topographic_loss(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
) -> Tensor:
    """1 - pre_weight * pre - (1 - pre_weight) * post of `topographic_correlations`, which documents the arguments."""
    x, latents, codebook = _checked("topographic_loss", x, latents, codes, codebook, layout)
    eager = not (in_transform() or torch.compiler.is_compiling())
    if eager and _choose(x, latents, codebook) == "triton":
        loss: Tensor = _Topographic.apply(  # type: ignore[no-untyped-call]
            x.detach(), latents, codes, codebook.detach(), layout, "triton", pre_weight
        )
        return loss
    pre, post = topographic_correlations(x, latents, codes, codebook, layout)
    return 1.0 - torch.lerp(post, pre, pre_weight)


def _checked(
    operator: str, x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments; x, latents and codebook in at least float32."""
    check(
        operator,
        ("x", x, ("S", "F"), FLOAT),
        ("latents", latents, ("S", layout.total_dims), FLOAT),
        ("codes", codes, ("S", layout.groups), INDEX),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
    )
    x, latents, codebook = (t.float() if t.itemsize == 2 else t for t in (x, latents, codebook))
    return x, latents, codebook


def _choose(x: Tensor, latents: Tensor, codebook: Tensor) -> Implementation:
    if native_supports(x, latents, codebook):
        return "cpu"
    narrow = x.dtype == latents.dtype == codebook.dtype == torch.float32
    return "triton" if narrow and resolve_backend("auto", x) == "triton" and len(x) > 0 else "pytorch"


class _Topographic(torch.autograd.Function):
    """Both correlations, or, with a `pre_weight`, their loss; the latter in Triton alone, without another launch."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
        x, latents, codes, codebook, layout, implementation, pre_weight = arguments
        inputs = x, latents, codes, codebook
        ctx.layout, ctx.implementation = layout, implementation
        ctx.factors = (1.0, 1.0) if pre_weight is None else (-pre_weight, pre_weight - 1.0)
        if implementation == "triton":
            from spinlock_fast.kernels.topo_loss import triton_forward

            both, loss, *saved = triton_forward.forward(*inputs, layout, pre_weight or 0.0)
            ctx.save_for_backward(*inputs, *saved)
            return (both[0].clone(), both[1].clone()) if pre_weight is None else loss
        pre, post, *saved = (cpu if implementation == "cpu" else pytorch).forward(*inputs, layout)
        ctx.save_for_backward(*inputs, *saved)
        return pre, post

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, latents, codes, codebook, *saved = ctx.saved_tensors
        grad_pre, grad_post = grads[0], grads[-1]  # one and the same of the loss
        grad: Tensor | None
        if needs_graph(grads):
            scaled = [factor * grad for factor, grad in zip(ctx.factors, (grad_pre, grad_post), strict=True)]
            with full_float32(x.device):
                grad = reference.correlation_gradient(x, latents, codes, codebook, ctx.layout, scaled)
        elif ctx.implementation == "triton":
            from spinlock_fast.kernels.topo_loss import triton_backward

            grad = triton_backward.backward(grad_pre, grad_post, saved, x, codes, codebook, ctx.layout, ctx.factors)
        else:
            grad = (cpu if ctx.implementation == "cpu" else pytorch).backward(grad_pre, grad_post, saved, ctx.layout)
        return None, grad, *[None] * 5


def _fake(x: Tensor, latents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return latents.new_empty((), dtype=torch.promote_types(x.dtype, latents.dtype)), latents.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_pre, grad_post = grads
    return None, _latents_gradient(grad_pre, grad_post, *ctx.saved_tensors, *ctx.sizes)


@operator("topographic_correlations", fake=_fake, setup_context=_setup_context, backward=_backward)
def _correlations(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, num_codes: Sequence[int], dims: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`topographic_correlations` for compiled code."""
    return topographic_correlations(x, latents, codes, codebook, CodebookLayout.of(num_codes, dims))


def _gradient_fake(grad_pre: Tensor, grad_post: Tensor, x: Tensor, latents: Tensor, *_: Any) -> Tensor:
    return latents.new_empty(latents.shape)


@operator("topographic_gradient", fake=_gradient_fake)
def _latents_gradient(
    grad_pre: Tensor,
    grad_post: Tensor,
    x: Tensor,
    latents: Tensor,
    codes: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
) -> Tensor:
    layout, implementation = CodebookLayout.of(num_codes, dims), _choose(x, latents, codebook)
    arguments = x, latents, codes, codebook, layout, implementation, None
    with full_float32(x.device):
        return recomputed_gradients(_Topographic, arguments, (grad_pre, grad_post), [1])[0]

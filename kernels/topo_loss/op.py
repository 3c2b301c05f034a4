"""The topographic correlations and their loss: checks of arguments, choice of the implementation, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.guard import FLOAT, INDEX, check, check_codes
from spinlock_fast.kernels._common.higher_order import in_transform, needs_graph
from spinlock_fast.kernels._common.implementation import Implementation
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import native_supports
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
    if in_transform():
        return reference.correlations_of_codes(x.detach(), latents, codes, codebook, layout)
    implementation = _choose(x, latents, codebook)
    if implementation == "pytorch":
        check_codes("topographic_correlations", codes, layout)
    # Not TF32: distances need the full mantissa.
    with full_float32(x.device):
        pre, post = _Correlations.apply(  # type: ignore[no-untyped-call]
            x.detach(), latents, codes, codebook.detach(), layout, implementation
        )
    return pre, post


def topographic_loss(
    x: Tensor, latents: Tensor, codes: Tensor, codebook: Tensor, layout: CodebookLayout, pre_weight: float
) -> Tensor:
    """1 - pre_weight * pre - (1 - pre_weight) * post of `topographic_correlations`, which documents the arguments."""
    x, latents, codebook = _checked("topographic_loss", x, latents, codes, codebook, layout)
    if not in_transform() and _choose(x, latents, codebook) == "triton":
        loss: Tensor = _TritonLoss.apply(  # type: ignore[no-untyped-call]
            x.detach(), latents, codes, codebook.detach(), layout, pre_weight
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


class _Correlations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latents: Tensor,
        codes: Tensor,
        codebook: Tensor,
        layout: CodebookLayout,
        implementation: Implementation,
    ) -> tuple[Tensor, Tensor]:
        inputs = x, latents, codes, codebook
        if implementation == "cpu":
            pre, post, *saved = cpu.forward(*inputs, layout)
        elif implementation == "triton":
            from spinlock_fast.kernels.topo_loss import triton_forward

            both, _, *saved = triton_forward.forward(*inputs, layout, 0.0)
            pre, post = (correlation.clone() for correlation in both.unbind())
        else:
            pre, post, *saved = pytorch.forward(*inputs, layout)
        ctx.layout, ctx.implementation = layout, implementation
        ctx.save_for_backward(*inputs, *saved)
        return pre, post

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, latents, codes, codebook, *saved = ctx.saved_tensors
        grad: Tensor | None
        if needs_graph(grads):
            with full_float32(x.device):
                grad = reference.correlation_gradient(x, latents, codes, codebook, ctx.layout, grads)
        elif ctx.implementation == "cpu":
            grad = cpu.backward(*grads, saved, ctx.layout)
        elif ctx.implementation == "triton":
            from spinlock_fast.kernels.topo_loss import triton_backward

            grad = triton_backward.backward(*grads, saved, x, codes, codebook, ctx.layout)
        else:
            grad = pytorch.backward(*grads, saved, ctx.layout)
        return None, grad, None, None, None, None


class _TritonLoss(torch.autograd.Function):
    """`topographic_loss` without a launch between the correlations and the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latents: Tensor,
        codes: Tensor,
        codebook: Tensor,
        layout: CodebookLayout,
        pre_weight: float,
    ) -> Tensor:
        from spinlock_fast.kernels.topo_loss import triton_forward

        _, loss, *saved = triton_forward.forward(x, latents, codes, codebook, layout, pre_weight)
        ctx.layout, ctx.factors = layout, (-pre_weight, pre_weight - 1.0)
        ctx.save_for_backward(x, latents, codes, codebook, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from spinlock_fast.kernels.topo_loss import triton_backward

        x, latents, codes, codebook, *saved = ctx.saved_tensors
        grad: Tensor | None
        if needs_graph(grads):
            scaled = [factor * grads[0] for factor in ctx.factors]
            grad = reference.correlation_gradient(x, latents, codes, codebook, ctx.layout, scaled)
        else:
            grad = triton_backward.backward(grads[0], grads[0], saved, x, codes, codebook, ctx.layout, ctx.factors)
        return None, grad, None, None, None, None

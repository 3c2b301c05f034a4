"""The projection of embeddings to latents: checks of arguments, choice of the implementation, gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.dropout import BatchSlice, drop
from spinlock_fast.kernels._common.guard import FLOAT, SAME, check, check_batch, check_rate
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.precision import dot_precision
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.latent_projection import cpu, pytorch, reference


def project(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    part_weight: Tensor,
    part_bias: Tensor,
    outputs: Ragged,
    parts: Ragged,
    eps: float = 1e-5,
    part_eps: float = 1e-5,
    dropout: float = 0.0,
    backend: Backend = "auto",
    batch: BatchSlice | None = None,
) -> Tensor:
    """`normalize_`, `scaled_output_linear`, dropout and `ragged_layer_norm`, see `reference`.

    Args:
        x: [G, B, in], may be overwritten; gain, shift: [G, in]; weight: [sum n, in]; bias: [sum n].
        part_weight, part_bias: [sum n], of the second normalisation.
        outputs: n of each group.
        parts: sizes of the parts of the sum n columns that the second normalisation is over.
        dropout: probability that a value is dropped before the second normalisation.
        backend: "auto", "triton" or "reference", see `resolve_backend`.
        batch: place of the rows in a larger batch, for which dropout draws random numbers; None if x is the batch.

    Returns:
        [B, sum n].
    """
    tensors = (x, gain, shift, weight, bias, part_weight, part_bias)
    G, n = outputs.groups, outputs.total
    check(
        "project",
        ("x", x, (G, "B", "in"), SAME),
        ("gain", gain, (G, "in"), SAME),
        ("shift", shift, (G, "in"), SAME),
        ("weight", weight, (n, "in"), SAME),
        ("bias", bias, (n,), SAME),
        ("part_weight", part_weight, (n,), SAME),
        ("part_bias", part_bias, (n,), SAME),
    )
    check_rate("project", dropout)
    check_batch("project", x.shape[1], batch)
    if parts.total != n:
        raise ValueError(f"project: parts must add up to the {n} outputs, got {parts.total}")
    stepwise = in_transform() or (backend == "auto" and native_supports(*tensors))
    if not stepwise and runs_triton(backend, *tensors):
        from spinlock_fast.kernels.latent_projection import triton_forward

        if triton_forward.supports(x, outputs, parts):
            out: Tensor = _TritonProject.apply(*tensors, outputs, parts, eps, part_eps, dropout, batch)  # type: ignore[no-untyped-call]
            return out
    latents = scaled_output_linear(normalize_(x, eps), gain, shift, weight, bias, outputs)
    return ragged_layer_norm(latents, part_weight, part_bias, parts, part_eps, dropout, batch)


class _TritonProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        from spinlock_fast.kernels.latent_projection import triton_forward

        x, *parameters, outputs, parts, eps, part_eps, dropout, batch = arguments
        ctx.precision = dot_precision()
        out, *saved = triton_forward.forward(
            x, parameters, outputs, parts, eps, part_eps, dropout, batch, ctx.precision
        )
        ctx.outputs, ctx.parts, ctx.eps, ctx.dropout, ctx.batch = outputs, parts, (eps, part_eps), dropout, batch
        ctx.save_for_backward(x, *parameters, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not needs_graph(grads):
            return _project_gradients(ctx, *grads)
        if ctx.dropout > 0.0:  # the formula has no dropout mask
            once: tuple[Tensor | None, ...] = once_differentiable(_project_gradients)(ctx, *grads)
            return once
        eps, part_eps = ctx.eps
        options = {"outputs": ctx.outputs.sizes, "parts": ctx.parts.sizes, "eps": eps, "part_eps": part_eps}
        formula = partial(reference.project, **options)
        return *gradients(formula, ctx.saved_tensors[:7], grads, ctx.needs_input_grad[:7]), *[None] * 6


def _project_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    from spinlock_fast.kernels.latent_projection import triton_backward

    unpacked = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
    tensors, saved = unpacked[:7], unpacked[7:]
    results = triton_backward.backward(
        grads[0], tensors, saved, ctx.outputs, ctx.parts, ctx.dropout, ctx.batch, ctx.precision
    )
    return *results, *[None] * 6


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
) -> Tensor:
    """(x_g * gain_g + shift_g) W_g^T + b_g of all groups side by side.

    Gain and shift are folded into the weights, which are smaller than the rows.

    Args:
        x: [G, B, in]; gain, shift: [G, in]; weight: [sum n, in]; bias: [sum n].
        outputs: n of each group.

    Returns:
        [B, sum n].
    """
    G, n = outputs.groups, outputs.total
    check(
        "scaled_output_linear",
        ("x", x, (G, "B", "in"), SAME),
        ("gain", gain, (G, "in"), SAME),
        ("shift", shift, (G, "in"), SAME),
        ("weight", weight, (n, "in"), SAME),
        ("bias", bias, (n,), SAME),
    )
    if in_transform():
        return reference.scaled_output_linear(x, gain, shift, weight, bias, outputs.sizes)
    if torch.compiler.is_compiling():  # autograd and the compiler derive the gradients
        return pytorch.scaled_output_linear(x, gain, shift, weight, bias, outputs)[0]
    native = native_supports(x, gain, shift, weight, bias)
    out: Tensor = _ScaledOutputLinear.apply(x, gain, shift, weight, bias, outputs, native)  # type: ignore[no-untyped-call]
    return out


class _ScaledOutputLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, gain, shift, weight, bias, outputs, native = arguments
        tensors = x, gain, shift, weight, bias
        linear = cpu.scaled_output_linear if native else pytorch.scaled_output_linear
        out, *saved = linear(*tensors, outputs)
        ctx.outputs, ctx.native = outputs, native
        ctx.save_for_backward(*tensors, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        unpacked = ctx.saved_tensors  # read once: activation checkpointing refuses a second time
        tensors, saved = unpacked[:5], unpacked[5:]
        outputs: Ragged = ctx.outputs
        if needs_graph(grads):
            formula = partial(reference.scaled_output_linear, sizes=outputs.sizes)
            return *gradients(formula, tensors, grads, ctx.needs_input_grad[:5]), None, None
        backward = cpu.scaled_output_linear_backward if ctx.native else pytorch.scaled_output_linear_backward
        return *backward(grads[0], tensors, saved, outputs, ctx.needs_input_grad[0]), None, None


def normalize_(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension, without weight and bias; may overwrite x."""
    if not isinstance(x, Tensor) or x.ndim < 1:
        raise TypeError("normalize_: x must be a tensor of at least one dimension")
    check("normalize_", ("x", x, tuple(x.shape), FLOAT))
    if in_transform() or torch.compiler.is_compiling():
        return reference.normalize(x, eps)
    # Autograd refuses in-place changes of a leaf, and of a view by a function with two results.
    in_place = x.is_contiguous() and not x._is_view() and not (x.requires_grad and x.is_leaf)
    if in_place and native_supports(x):
        out: Tensor = _NativeNormalize.apply(x, eps)[0]  # type: ignore[no-untyped-call]
        return out
    return reference.normalize(x, eps)


class _NativeNormalize(torch.autograd.Function):
    """`normalize_` in place. The second result, the reciprocal deviations, serves derivatives of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        deviation = cpu.normalize_(x, eps)
        ctx.save_for_backward(x, deviation)
        return x, deviation

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        normed, deviation = ctx.saved_tensors
        grad_normed, grad_deviation = grads
        if needs_graph(grads) or grad_deviation is not None:
            return reference.normalize_gradient(grad_normed, grad_deviation, normed, deviation), None
        return None if grad_normed is None else cpu.normalize_backward(grad_normed, normed, deviation), None


def ragged_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Ragged,
    eps: float = 1e-5,
    dropout: float = 0.0,
    batch: BatchSlice | None = None,
) -> Tensor:
    """Layer normalisation of each segment of the columns of dropout(x).

    Args:
        x: [B, sum n]; weight, bias: [sum n]. Half precision is computed in float32.
        segments: n of each segment.
        eps: added to the variance.
        dropout: probability that a value is dropped.
        batch: place of the rows in a larger batch, for which dropout draws random numbers; None if x is the batch.

    Returns:
        [B, sum n].
    """
    n = segments.total
    check("ragged_layer_norm", ("x", x, ("B", n), FLOAT), ("weight", weight, (n,), FLOAT), ("bias", bias, (n,), FLOAT))
    check_rate("ragged_layer_norm", dropout)
    check_batch("ragged_layer_norm", x.shape[0], batch)
    out: Tensor
    if not in_transform() and native_supports(x, weight, bias):
        out = _RaggedLayerNorm.apply(x, weight, bias, segments, eps, dropout, batch, True)  # type: ignore[no-untyped-call]
        return out
    x = drop(x, dropout, batch)
    wide = torch.promote_types(x.dtype, torch.float32)
    tensors = (x.to(wide), weight.to(wide), bias.to(wide))
    if in_transform():
        out = reference.ragged_layer_norm(*tensors, segments.sizes, eps)
    elif torch.compiler.is_compiling():
        out = pytorch.ragged_layer_norm(*tensors, segments, eps)[0]
    else:
        out = _RaggedLayerNorm.apply(*tensors, segments, eps, 0.0, None, False)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _RaggedLayerNorm(torch.autograd.Function):
    """Dropout is part of the native implementation alone."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, segments, eps, dropout, batch, native = arguments
        results: tuple[Tensor | None, ...]
        if native:
            results = cpu.ragged_layer_norm(x, weight, bias, segments, eps, dropout, batch)
        else:
            results = pytorch.ragged_layer_norm(x, weight, bias, segments, eps)
        out, *saved = results
        ctx.segments, ctx.eps, ctx.dropout, ctx.batch, ctx.native = segments, eps, dropout, batch, native
        ctx.save_for_backward(x, weight, bias, *saved)
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not needs_graph(grads):
            return _layer_norm_gradients(ctx, *grads)
        if ctx.dropout > 0.0:  # the formula has no dropout mask
            once: tuple[Tensor | None, ...] = once_differentiable(_layer_norm_gradients)(ctx, *grads)
            return once
        formula = partial(reference.ragged_layer_norm, sizes=ctx.segments.sizes, eps=ctx.eps)
        return *gradients(formula, ctx.saved_tensors[:3], grads, ctx.needs_input_grad[:3]), *[None] * 5


def _layer_norm_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    _, weight, _, *saved = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    if ctx.native:
        results = cpu.ragged_layer_norm_backward(grads[0], weight, saved, ctx.segments, ctx.dropout, ctx.batch, needs_x)
    else:
        results = pytorch.ragged_layer_norm_backward(grads[0], weight, saved, ctx.segments, needs_x)
    return *results, *[None] * 5

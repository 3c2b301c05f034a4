"""What callers use. Gradients are written by hand: autograd would scatter where a gather serves, keep masks that the
outputs already tell, and make a pass of its own for every factor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.backend import Backend, runs_triton
from spinlock_fast.kernels._common.guard import FLOAT, SAME, check, check_rate
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp import native, reference


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    inputs: Ragged,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Two-layer networks of all groups: dropout(relu(x_g W1_g + b1_g)) W2_g + b2_g.

    Args:
        x: [B, sum n] the inputs of group 0, then of group 1, ...
        w1: [sum n, H]; b1: [G, H]; w2: [G, H, E]; b2: [G, E].
        inputs: n of each group.
        dropout: probability that a hidden value is dropped.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

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
    if in_transform():
        kept = x.new_ones(G, x.shape[0], w1.shape[1]) if dropout > 0.0 else None
        keep = None if kept is None else torch.nn.functional.dropout(kept, dropout)
        return reference.grouped_mlp(x, w1, b1, w2, b2, inputs.sizes, keep)
    function: type[torch.autograd.Function] = _GroupedMLP
    if backend == "auto" and native_supports(x, w1, b1, w2, b2):
        function = native.GroupedMLP
    elif runs_triton(backend, x, w1, b1, w2, b2):
        from spinlock_fast.kernels.grouped_mlp import triton

        function = triton.GroupedMLP
    out: Tensor = function.apply(x, w1, b1, w2, b2, inputs, dropout)
    return out


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, inputs: Ragged, dropout: float
    ) -> Tensor:
        given = x, w1, b1, w2, b2
        x, w1 = inputs.pad_columns(x), inputs.pad_rows(w1)
        hidden = torch.baddbmm(b1[:, None], x, w1).relu_()  # [G, B, H]
        if dropout > 0.0:
            hidden = torch.native_dropout(hidden, dropout, True)[0]
        ctx.inputs, ctx.scale = inputs, native.keep_scale(dropout)
        ctx.save_for_backward(*given, x, w1, hidden)
        return torch.baddbmm(b2[:, None], hidden, w2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, x, w1, hidden = ctx.saved_tensors
        if needs_graph(grads):
            needed = ctx.needs_input_grad[:5]
            return *reference.mlp_gradients(given, hidden, ctx.scale, ctx.inputs.sizes, grads, needed), None, None
        w2 = given[3]
        (grad,) = grads
        # A hidden value of 0 was cut off or dropped; either way nothing goes back through it.
        of_hidden = torch.baddbmm(grad.new_zeros(()), grad, w2.transpose(1, 2), beta=0.0, alpha=ctx.scale)
        of_hidden = torch.ops.aten.threshold_backward(of_hidden, hidden, 0.0)
        inputs: Ragged = ctx.inputs
        return (
            inputs.pack_columns(of_hidden @ w1.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
            inputs.pack_rows(x.transpose(1, 2) @ of_hidden),
            of_hidden.sum(1),
            hidden.transpose(1, 2) @ grad,
            grad.sum(1),
            None,
            None,
        )


def scaled_output_linear(
    x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
) -> Tensor:
    """(x_g * gain_g + shift_g) W_g^T + b_g for every group, side by side.

    Gain and shift go into the weights, which are fewer than the rows.

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
    function = native.ScaledOutputLinear if native_supports(x, gain, shift, weight, bias) else _ScaledOutputLinear
    out: Tensor = function.apply(x, gain, shift, weight, bias, outputs)  # type: ignore[no-untyped-call]
    return out


class _ScaledOutputLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, outputs: Ragged
    ) -> Tensor:
        given = x, gain, shift, weight, bias
        weight = outputs.pad_rows(weight)  # [G, n_max, in]
        scaled = weight * gain[:, None]
        offset = outputs.pad_rows(bias) + (weight @ shift[:, :, None])[:, :, 0]
        ctx.outputs = outputs
        ctx.save_for_backward(*given, weight, scaled)
        return outputs.pack_columns(torch.baddbmm(offset[:, None], x, scaled.transpose(1, 2)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, weight, scaled = ctx.saved_tensors
        outputs: Ragged = ctx.outputs
        if needs_graph(grads):
            formula = partial(reference.scaled_output_linear, sizes=outputs.sizes)
            return *gradients(formula, given, grads, ctx.needs_input_grad[:5]), None
        x, gain, shift = given[:3]
        grad = outputs.pad_columns(grads[0])  # [G, B, n_max]
        of_bias = grads[0].sum(0)
        of_offset = outputs.pad_rows(of_bias)[:, :, None]
        of_scaled = grad.transpose(1, 2) @ x  # [G, n_max, in]
        return (
            grad @ scaled if ctx.needs_input_grad[0] else None,
            (of_scaled * weight).sum(1),
            (of_offset * weight).sum(1),
            outputs.pack_rows((of_scaled * gain[:, None]).addcmul_(of_offset, shift[:, None])),
            of_bias,
            None,
        )


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
) -> Tensor:
    """`normalize_`, `scaled_output_linear` and `ragged_layer_norm`, one after the other.

    Args:
        x: [G, B, in], may be overwritten; gain, shift: [G, in]; weight: [sum n, in]; bias: [sum n].
        part_weight, part_bias: [sum n], of the normalisation of parts.
        outputs: n of each group.
        parts: sizes of the parts into which the sum n columns are divided for the second normalisation.
        dropout: probability that a value is dropped before the second normalisation.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

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
    if parts.total != n:
        raise ValueError(f"project: parts must add up to the {n} outputs, got {parts.total}")
    in_parts = in_transform() or (backend == "auto" and native_supports(*tensors))
    if not in_parts and runs_triton(backend, *tensors):
        from spinlock_fast.kernels.grouped_mlp import projection

        if projection.fits(x, outputs, parts):
            function: type[torch.autograd.Function] = projection.Project
            out: Tensor = function.apply(*tensors, outputs, parts, eps, part_eps, dropout)
            return out
    latents = scaled_output_linear(normalize_(x, eps), gain, shift, weight, bias, outputs)
    return ragged_layer_norm(latents, part_weight, part_bias, parts, part_eps, dropout)


def normalize_(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension, without scale and shift; x may be overwritten."""
    if not isinstance(x, Tensor) or x.ndim < 1:
        raise TypeError("normalize_: x must be a tensor of at least one dimension")
    check("normalize_", ("x", x, tuple(x.shape), FLOAT))
    # Autograd lets nobody overwrite a leaf, nor a view by a function of two results.
    own = x.is_contiguous() and not x._is_view() and not (x.requires_grad and x.is_leaf)
    if own and not in_transform() and native_supports(x):
        out: Tensor = native.Normalize.apply(x, eps)[0]  # type: ignore[no-untyped-call]
        return out
    return reference.normalize(x, eps)


def ragged_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, segments: Ragged, eps: float = 1e-5, dropout: float = 0.0
) -> Tensor:
    """Layer normalisation of each segment of the columns of dropout(x) [B, sum n], with weight and bias [sum n].

    Half precision is normalised in float32.
    """
    n = segments.total
    check("ragged_layer_norm", ("x", x, ("B", n), FLOAT), ("weight", weight, (n,), FLOAT), ("bias", bias, (n,), FLOAT))
    check_rate("ragged_layer_norm", dropout)
    out: Tensor
    if not in_transform() and native_supports(x, weight, bias):
        out = native.RaggedLayerNorm.apply(x, weight, bias, segments, eps, dropout)  # type: ignore[no-untyped-call]
        return out
    x = torch.nn.functional.dropout(x, dropout)
    wide = torch.promote_types(x.dtype, torch.float32)
    given = (x.to(wide), weight.to(wide), bias.to(wide))
    if in_transform():
        out = reference.ragged_layer_norm(*given, segments.sizes, eps)
    else:
        out = _RaggedLayerNorm.apply(*given, segments, eps)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _RaggedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, segments: Ragged, eps: float) -> Tensor:
        centred = x - _segment_means(x, segments)
        deviation = (_segment_means(centred.square(), segments) + eps).rsqrt_()
        normed = centred.mul_(deviation)
        ctx.segments, ctx.eps = segments, eps
        ctx.save_for_backward(x, weight, bias, normed, deviation)
        return torch.addcmul(bias, normed, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, normed, deviation = ctx.saved_tensors
        segments: Ragged = ctx.segments
        if needs_graph(grads):
            formula = partial(reference.ragged_layer_norm, sizes=segments.sizes, eps=ctx.eps)
            return *gradients(formula, given, grads, ctx.needs_input_grad[:3]), None, None
        weight = given[1]
        (grad,) = grads
        of_normed = grad * weight
        of_x = None
        if ctx.needs_input_grad[0]:
            along = _segment_means(of_normed * normed, segments)
            of_x = (of_normed - _segment_means(of_normed, segments)).addcmul_(normed, along, value=-1.0)
            of_x.mul_(deviation)
        return of_x, (grad * normed).sum(0), grad.sum(0), None, None


def _segment_means(x: Tensor, segments: Ragged) -> Tensor:
    """[B, sum n], in each column the mean over the columns of its segment."""
    index = segments.indices(x.device)
    sums = segments.pad_columns(x).sum(-1)  # [G, B]
    return (sums / index.sizes[:, None].to(x.dtype)).t().index_select(1, index.book)

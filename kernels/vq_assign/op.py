"""Nearest-code assignment, its gradient and code lookup: argument checks, operators, choice of implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.guard import BOOL, FLOAT, INTEGER, check
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import native_supports
from spinlock_fast.kernels._common.operator import operator
from spinlock_fast.kernels._common.precision import full_float32, no_autocast
from spinlock_fast.kernels.vq_assign import cpu, reference
from spinlock_fast.kernels.vq_assign.reference import Result


@dataclass(frozen=True)
class Assignment:
    """Nearest codes of a batch, and the sums over rows that training needs.

    Errors, counts and sums are stored as partial sums, one for each block of rows, and added in a fixed order by
    `squared_error`, `counts` and `sums`, so that results are the same bits in every run.
    """

    codes: Tensor  # [N, G] int64, -1 where masked or not finite
    quantized: Tensor  # [N, sum D], 0 where masked, NaN where a row is not finite
    error_parts: Tensor  # [P, G]
    count_parts: Tensor  # [P, sum K]
    sum_parts: Tensor  # [P, sum K D]

    @property
    def squared_error(self) -> Tensor:
        """[G] sum over rows with a code of ||z_g - e_g||^2."""
        return _add_parts(self.error_parts)

    @property
    def counts(self) -> Tensor:
        """[sum K] rows of each code."""
        return _add_parts(self.count_parts)

    @property
    def sums(self) -> Tensor:
        """[sum K D] sum of the latents of each code."""
        return _add_parts(self.sum_parts)


def _add_parts(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def vq_assign(
    z: Tensor,
    codebook: Tensor,
    layout: CodebookLayout,
    mask: Tensor | None = None,
    centred: bool = True,
    *,
    gradient: Literal["straight_through", "rotation"] | None = None,
    with_sums: bool = True,
    backend: str = "auto",
) -> Assignment:
    """Nearest code of every row in every codebook.

    Args:
        z: [N, sum D] latents; rows may be strided.
        codebook: [sum K D] code vectors, converted to float32, or to float64 where they or z are. They receive no
            gradient.
        layout: sizes of the group.
        mask: [N] bool; False excludes a row (code -1, zeros, no gradient).
        centred: subtract the mean code of each codebook first, which keeps distances accurate far from the origin,
            see `reference.nearest_codes`.
        gradient: gradient of `quantized` with respect to z: straight-through (Bengio et al. 2013) or rotation trick
            (arXiv 2410.06424); `squared_error` then has its own gradient. None: results are not differentiable.
        with_sums: False leaves counts and sums empty.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: z, codebook or mask do not fit the layout, or lie on different devices.
    """
    check(
        "vq_assign",
        ("z", z, ("N", layout.total_dims), FLOAT),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
        ("mask", mask, ("N",), BOOL),
    )
    if gradient not in (None, "straight_through", "rotation"):
        raise ValueError(f"vq_assign: gradient must be straight_through, rotation or None, got {gradient!r}")
    mask = None if mask is None else mask.contiguous()  # kernels read it with stride 1
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    codebook = codebook.detach().to(torch.promote_types(codebook.dtype, wide))
    rotation = gradient == "rotation"
    if gradient is None:
        z = z.detach()
    if in_transform() or (gradient is None and exporting()):
        rows = z if gradient is None else z.detach()
        quantized, codes, error, counts, sums = reference.assign(rows, codebook, layout, mask, centred, with_sums)
        if gradient is not None:
            quantized, error = reference.surrogate(z, quantized, codes, layout, rotation)
        return Assignment(codes, quantized, error, counts, sums)
    backend = resolve_backend(backend, codebook, z)
    quantized, codes, error, counts, sums = _assign(
        z, codebook, layout.num_codes, layout.dims, mask, centred, with_sums, rotation, backend
    )
    if mask is not None:  # the operator returns NaN for every code of -1
        quantized = quantized.masked_fill(~mask[:, None], 0.0)
    return Assignment(codes, quantized, error, counts.detach(), sums.detach())


def _backward_fake(grad_quantized: Tensor, grad_error: Tensor, z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


@operator("vq_assign_backward", fake=_backward_fake)
def _assign_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
    rotation: bool,
    backend: str,
) -> Tensor:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    with no_autocast(z.device):
        if backend == "triton":
            from spinlock_fast.kernels.vq_assign import triton_backward

            return triton_backward.backward(grad_quantized, grad_error, z, quantized, codes, layout, rotation)
        if not rotation and native_supports(grad_quantized, grad_error, z, quantized):
            return cpu.backward(grad_quantized, grad_error, z, quantized, codes, layout)
        return reference.backward(grad_quantized, grad_error, z, quantized, codes, layout, rotation)


def _fake(z: Tensor, codebook: Tensor, num_codes: Sequence[int], dims: Sequence[int], *options: Any) -> Result:
    _, _, with_sums, _, backend = options
    N, G = z.shape[0], len(dims)
    in_tile = backend == "triton" and max(num_codes) <= reference.MAX_TILE_CODES
    parts = reference.row_parts(N, G) if in_tile else 1
    return (
        codebook.new_empty(N, sum(dims)),
        codebook.new_empty(N, G, dtype=torch.int64),
        codebook.new_empty(parts, G),
        codebook.new_empty(parts, sum(num_codes) if with_sums else 0),
        codebook.new_empty(parts, codebook.shape[0] if with_sums else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    z, _, num_codes, dims, _, _, _, rotation, backend = inputs
    quantized, codes, error, *_ = output
    ctx.save_for_backward(z, quantized, codes)
    ctx.layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    ctx.rotation, ctx.backend, ctx.parts = rotation, backend, error.shape[0]
    ctx.set_materialize_grads(False)  # no zeros for codes, counts and sums


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    z, quantized, codes = ctx.saved_tensors
    grad_quantized, _, grad_error, *_ = grads
    if grad_quantized is None and grad_error is None:
        return (None,)
    if needs_graph(grads):

        def surrogate(latents: Tensor) -> tuple[Tensor, Tensor]:
            return reference.surrogate(latents, quantized, codes, ctx.layout, ctx.rotation, ctx.parts)

        return tuple(gradients(surrogate, [z], [grad_quantized, grad_error], [True]))
    if grad_quantized is None:
        grad_quantized = torch.zeros_like(quantized)
    if grad_error is None:
        grad_error = quantized.new_zeros(ctx.parts, codes.shape[1])
    sizes = ctx.layout.num_codes, ctx.layout.dims
    return (_assign_backward(grad_quantized, grad_error, z, quantized, codes, *sizes, ctx.rotation, ctx.backend),)


@operator("vq_assign", fake=_fake, setup_context=_setup_context, backward=_backward)
def _assign(
    z: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    dims: Sequence[int],
    mask: Tensor | None,
    centred: bool,
    with_sums: bool,
    rotation: bool,
    backend: str,
) -> Result:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    # Distances in half precision (autocast) or TF32 would select other codes.
    with no_autocast(z.device), full_float32(z.device):
        if backend == "triton":
            from spinlock_fast.kernels.vq_assign import triton_forward

            return triton_forward.assign(z, codebook, layout, mask, centred, with_sums)
        assign = cpu.assign if native_supports(z, codebook) else reference.assign
        return assign(z, codebook, layout, mask, centred, with_sums)


class _StraightThrough(torch.autograd.Function):
    """The value of `quantized` with the gradient of `z` (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize(z: Tensor, quantized: Tensor, layout: CodebookLayout, rotation_trick: bool = False) -> Tensor:
    """[N, sum D] code vectors, differentiable with respect to z: straight-through, or by the rotation trick."""
    size = ("N", layout.total_dims)
    check("quantize", ("z", z, size, FLOAT), ("quantized", quantized, size, FLOAT))
    if rotation_trick:
        return reference.rotate_to_codes(z, quantized.to(z.dtype), layout)
    if in_transform():
        return quantized.detach().to(z.dtype) + (z - z.detach())
    result: Tensor = _StraightThrough.apply(z, quantized)  # type: ignore[no-untyped-call]
    return result


def lookup(codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Tensor:
    """Code vectors [N, sum D] of indices [N, G].

    Raises:
        IndexError: an index lies outside its codebook. The check synchronises with the device.
    """
    check(
        "lookup",
        ("codes", codes, ("N", layout.groups), INTEGER),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
    )
    codes = codes.to(torch.int64)
    sizes = layout.indices(codes.device).num_codes.to(codes.dtype)
    outside = (codes < 0) | (codes >= sizes)
    if bool(outside.any()):
        row, g = (int(i) for i in outside.nonzero()[0])
        raise IndexError(
            f"token {int(codes[row, g])} of row {row} is outside codebook {g}, which has {layout.num_codes[g]} codes"
        )
    return reference.gather_codes(codes, codebook, layout)

"""What callers use: assignment with or without gradient, lookup. The operators of `torch.library`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from spinlock_fast.kernels._common.guard import BOOL, FLOAT, INTEGER, check
from spinlock_fast.kernels._common.higher_order import gradients, in_transform, needs_graph
from spinlock_fast.kernels.backend import resolve_backend
from spinlock_fast.kernels.export import exporting
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.native import serves
from spinlock_fast.kernels.precision import full_float32
from spinlock_fast.kernels.vq_assign import native, reference

# Codebooks up to this size are held whole in a tile by the kernels.
MAX_TILE_CODES = 64


@dataclass(frozen=True)
class Assignment:
    """Nearest codes of a batch and what training needs of them.

    Errors, counts and sums come in parts, one for each run of rows that a program adds up; adding the
    parts in their order gives the same bits each time. `squared_error`, `counts` and `sums` do so.
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
        codebook: [sum K D] code vectors, computed with as float32, or as float64 where they or z are. They take no
            gradient here.
        layout: sizes of the group.
        mask: [N] bool; rows that are False take no part (code -1, zeros, no gradient).
        centred: subtract each codebook's mean code first: exact far from the origin, see
            `reference.nearest_codes`.
        gradient: how `quantized` passes its gradient to z (Bengio et al. 2013, or arXiv 2410.06424);
            squared_error then carries its own. None: nothing is differentiable.
        with_sums: False leaves counts and sums empty.
        backend: "auto", "triton" or "reference", see `resolve_backend`.

    Raises:
        TypeError: an argument of another type.
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
    mask = None if mask is None else mask.contiguous()  # kernels step through it one by one
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    codebook = codebook.detach().to(torch.promote_types(codebook.dtype, wide))
    z = z.detach() if gradient is None else z
    if gradient is None and exporting():
        codes, quantized, *parts = reference.assign(z, codebook, layout, mask, centred, with_sums)
        return Assignment(codes, quantized, *parts)
    if in_transform():
        return _in_plain_torch(z, codebook, layout, mask, centred, with_sums, gradient)
    found = torch.ops.spinlock_fast.vq_assign(
        z,
        codebook,
        layout.num_codes,
        layout.dims,
        mask,
        centred,
        with_sums,
        gradient == "rotation",
        resolve_backend(backend, codebook, z),
    )
    quantized, codes, error, counts, sums = found
    if mask is not None:  # the operator gives NaN for every code of -1
        quantized = quantized.masked_fill(~mask[:, None], 0.0)
    return Assignment(codes, quantized, error, counts.detach(), sums.detach())


def _in_plain_torch(
    z: Tensor,
    codebook: Tensor,
    layout: CodebookLayout,
    mask: Tensor | None,
    centred: bool,
    with_sums: bool,
    gradient: str | None,
) -> Assignment:
    codes, quantized, error, counts, sums = reference.assign(z.detach(), codebook, layout, mask, centred, with_sums)
    if gradient is not None:
        quantized, error = reference.passed_on(z, quantized, codes, layout, gradient == "rotation")
    return Assignment(codes, quantized, error, counts, sums)


# Not `torch.library.custom_op`: its first call imports torch's compiler, which takes more than a second.
torch.library.define(
    "spinlock_fast::vq_assign",
    "(Tensor z, Tensor codebook, int[] num_codes, int[] dims, Tensor? mask, bool centred, bool with_sums,"
    " bool rotation, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "spinlock_fast::vq_assign_backward",
    "(Tensor grad_quantized, Tensor grad_error, Tensor z, Tensor quantized, Tensor codes, int[] num_codes,"
    " int[] dims, bool rotation, str backend) -> Tensor",
)


@torch.library.impl("spinlock_fast::vq_assign", "default")
def _vq_assign(
    z: Tensor,
    codebook: Tensor,
    num_codes: list[int],
    dims: list[int],
    mask: Tensor | None,
    centred: bool,
    with_sums: bool,
    rotation: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    # Autocast would form the distances in half precision, TF32 in ten bits of fraction: both pick other codes.
    with torch.autocast(z.device.type, enabled=False), full_float32(z.device):
        if backend == "triton":
            from spinlock_fast.kernels.vq_assign import dispatch

            codes, quantized, *rest = dispatch.assign(z, codebook, layout, mask, centred, with_sums)
        elif serves(z, codebook):
            codes, quantized, *rest = native.assign(z, codebook, layout, mask, centred, with_sums)
        else:
            codes, quantized, *rest = reference.assign(z, codebook, layout, mask, centred, with_sums)
    error, counts, sums = rest
    return quantized, codes, error, counts, sums


def _fake_vq_assign(
    z: Tensor,
    codebook: Tensor,
    num_codes: list[int],
    dims: list[int],
    mask: Tensor | None,
    centred: bool,
    with_sums: bool,
    rotation: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N = z.shape[0]
    in_tile = backend == "triton" and max(num_codes) <= MAX_TILE_CODES
    parts = reference.row_parts(N, len(dims)) if in_tile else 1
    return (
        codebook.new_empty(N, sum(dims)),
        codebook.new_empty(N, len(dims), dtype=torch.int64),
        codebook.new_empty(parts, len(dims)),
        codebook.new_empty(parts, sum(num_codes) if with_sums else 0),
        codebook.new_empty(parts, codebook.shape[0] if with_sums else 0),
    )


torch.library.register_fake("spinlock_fast::vq_assign", _fake_vq_assign)


@torch.library.impl("spinlock_fast::vq_assign_backward", "default")
def _vq_assign_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    num_codes: list[int],
    dims: list[int],
    rotation: bool,
    backend: str,
) -> Tensor:
    layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))
    with torch.autocast(z.device.type, enabled=False):
        if backend == "triton":
            from spinlock_fast.kernels.vq_assign import dispatch

            return dispatch.backward(grad_quantized, grad_error, z, quantized, codes, layout, rotation)
        if not rotation and serves(grad_quantized, grad_error, z, quantized):
            return native.backward(grad_quantized, grad_error, z, quantized, codes, layout)
        return reference.backward(grad_quantized, grad_error, z, quantized, codes, layout, rotation)


def _fake_vq_assign_backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    num_codes: list[int],
    dims: list[int],
    rotation: bool,
    backend: str,
) -> Tensor:
    return z.new_empty(z.shape)


torch.library.register_fake("spinlock_fast::vq_assign_backward", _fake_vq_assign_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, _, num_codes, dims, _, _, _, rotation, backend = inputs
    quantized, codes, *_ = output
    ctx.save_for_backward(z, quantized, codes)
    ctx.sizes = num_codes, dims
    ctx.rotation, ctx.backend = rotation, backend
    ctx.set_materialize_grads(False)  # zeros for codes, counts and sums would be made in vain
    ctx.parts = output[2].shape[0]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    z, quantized, codes = ctx.saved_tensors
    if grads[0] is None and grads[2] is None:
        return (None,) * 9
    if needs_graph(grads):
        num_codes, dims = ctx.sizes
        layout = CodebookLayout.cached(tuple(num_codes), tuple(dims))

        def formula(latents: Tensor) -> tuple[Tensor, Tensor]:
            return reference.passed_on(latents, quantized, codes, layout, ctx.rotation, ctx.parts)

        return gradients(formula, [z], [grads[0], grads[2]], [True])[0], *(None,) * 8
    of_quantized = torch.zeros_like(quantized) if grads[0] is None else grads[0]
    of_error = quantized.new_zeros(ctx.parts, codes.shape[1]) if grads[2] is None else grads[2]
    grad_z = torch.ops.spinlock_fast.vq_assign_backward(
        of_quantized, of_error, z, quantized, codes, *ctx.sizes, ctx.rotation, ctx.backend
    )
    return grad_z, None, None, None, None, None, None, None, None


torch.library.register_autograd("spinlock_fast::vq_assign", _backward, setup_context=_keep)


class _StraightThrough(torch.autograd.Function):
    """The value of `quantized` with the gradient of `z` (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(z.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize(z: Tensor, quantized: Tensor, layout: CodebookLayout, rotation_trick: bool = False) -> Tensor:
    """[N, sum D] the codes, differentiable with respect to z: straight through, or by rotation."""
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
        IndexError: an index outside its codebook (checking it waits for the device).
    """
    check(
        "lookup",
        ("codes", codes, ("N", layout.groups), INTEGER),
        ("codebook", codebook, (layout.total_entries,), FLOAT),
    )
    codes = codes.to(torch.int64)
    sizes = layout.indices(codes.device).num_codes.to(codes.dtype)
    if bool(((codes < 0) | (codes >= sizes)).any()):
        row, g = (int(i) for i in ((codes < 0) | (codes >= sizes)).nonzero()[0])
        raise IndexError(
            f"token {int(codes[row, g])} of row {row} is outside codebook {g}, which has {layout.num_codes[g]} codes"
        )
    return reference.gather_codes(codes, codebook, layout)

"""What callers use: assignment, straight-through quantization, lookup."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import reference


class Assignment(NamedTuple):
    """Nearest codes of a batch and the sums over them."""

    codes: Tensor  # [N, G] int64, -1 where masked or not finite
    quantized: Tensor  # [N, sum D], NaN where codes is -1
    squared_error: Tensor  # [G]
    counts: Tensor  # [sum K]
    sums: Tensor  # [sum K D]


@torch.no_grad()
def vq_assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None = None, centred: bool = True
) -> Assignment:
    """Nearest code of every row in every codebook, without gradient.

    Args:
        z: [N, sum D] latents.
        codebook: [sum K D] code vectors, float32 or wider.
        layout: sizes of the group.
        mask: [N] bool; rows that are False take no part (code -1).
        centred: subtract each codebook's mean code first: exact far from the origin, see `nearest_codes`.

    Raises:
        ValueError: z or codebook do not fit the layout.
    """
    if z.ndim != 2 or z.shape[1] != layout.total_dims:
        raise ValueError(f"z must be [N, {layout.total_dims}], got {list(z.shape)}")
    if codebook.shape != (layout.total_entries,):
        raise ValueError(f"codebook must be [{layout.total_entries}], got {list(codebook.shape)}")
    codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    z = z.to(codebook.dtype)
    # Autocast would form the distances in half precision, which picks other codes.
    with torch.autocast(z.device.type, enabled=False):
        codes = reference.nearest_codes(z, codebook, layout, centred)
        if mask is not None:
            codes = codes.masked_fill(~mask[:, None], -1)
        quantized = reference.gather_codes(codes, codebook, layout)
        counts, sums = reference.accumulate(z, codes, layout)
        return Assignment(codes, quantized, reference.squared_error(z, quantized, codes, layout), counts, sums)


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
    if rotation_trick:
        return reference.rotate_to_codes(z, quantized.to(z.dtype), layout)
    result: Tensor = _StraightThrough.apply(z, quantized)  # type: ignore[no-untyped-call]
    return result


def lookup(codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Tensor:
    """Code vectors [N, sum D] of indices [N, G].

    Raises:
        IndexError: an index outside its codebook (checking it waits for the device).
    """
    if codes.ndim != 2 or codes.shape[1] != layout.groups:
        raise ValueError(f"codes must be [N, {layout.groups}], got {list(codes.shape)}")
    codes = codes.to(torch.int64)
    sizes = layout.indices(codes.device).num_codes.to(codes.dtype)
    if bool(((codes < 0) | (codes >= sizes)).any()):
        row, g = (int(i) for i in ((codes < 0) | (codes >= sizes)).nonzero()[0])
        raise IndexError(
            f"token {int(codes[row, g])} of row {row} is outside codebook {g}, which has {layout.num_codes[g]} codes"
        )
    return reference.gather_codes(codes, codebook, layout)

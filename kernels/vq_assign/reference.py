"""Nearest-code assignment in plain PyTorch.

For codebook g: code(i) = argmin_k ||z_i - e_k||^2, the lowest k on ties, with
||z - e||^2 = ||z||^2 + ||e||^2 - 2 z.e; ||z||^2 does not depend on k and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import exporting
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.rotation import rotate

# Rows are processed in blocks of at most this many distances, which bounds memory.
_MAX_DISTANCES = 1 << 24

# Triton kernels form partial sums of errors, counts and latents over blocks of this many rows, or a multiple: enough
# blocks to fill a large GPU, and the same number on every device.
PART_ROWS = 64
_MAX_PARTS = 1024

# The Triton kernels hold all codes of a codebook up to this size in one tile, and stream larger codebooks.
MAX_TILE_CODES = 64

# Unit vectors whose sum is shorter than this point in opposite directions, up to rounding.
OPPOSITE = 1e-6

# quantized [N, sum D], codes [N, G], squared_error [P, G], counts [P, sum K], sums [P, sum K D]
Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def row_parts(rows: int, groups: int) -> int:
    """Number of partial sums P of the Triton kernels for small codebooks, given N and G; at least 1."""
    limit = max(1, _MAX_PARTS // groups)
    return torch.sym_max(1, torch.sym_min((rows + PART_ROWS - 1) // PART_ROWS, limit))  # type: ignore[no-any-return]


def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> Result:
    """quantized [N, sum D], codes [N, G], squared_error [1, G], counts [1, sum K], sums [1, sum K D].

    The leading 1 of the last three is the number of partial sums. The last two have width 0 without `with_sums`.
    Half-precision latents are compared as float32.
    """
    z = z.to(codebook.dtype)
    codes = nearest_codes(z, codebook, layout, centred)
    if mask is not None:
        codes = codes.masked_fill(~mask[:, None], -1)
    quantized = gather_codes(codes, codebook, layout)
    error = squared_error(z, quantized, codes, layout)
    counts, sums = accumulate(z, codes, layout) if with_sums else (z.new_empty(0), z.new_empty(0))
    return quantized, codes, error[None], counts[None], sums[None]


def backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    layout: CodebookLayout,
    rotation: bool,
) -> Tensor:
    """Gradient with respect to z [N, sum D], in the type of z.

    dL/dz = J^T dL/dquantized + 2 (z - e) dL/dsquared_error, where J is the identity (straight-through) or lambda R of
    `rotate_to_codes`.
    """
    index = layout.indices(z.device)
    wide = z.to(quantized.dtype)
    grad = grad_quantized.to(quantized.dtype)
    no_code = (codes < 0)[:, index.codebook_of_column]
    if rotation:
        # Rows without a code hold NaN; zeros select the straight-through gradient.
        grad = _rotation_gradient(grad, wide.masked_fill(no_code, 0.0), quantized.masked_fill(no_code, 0.0), layout)
    distance_gradient = (2.0 * grad_error[0])[index.codebook_of_column] * (wide - quantized)
    return (grad + distance_gradient.masked_fill(no_code, 0.0)).to(z.dtype)


def surrogate(
    z: Tensor, quantized: Tensor, codes: Tensor, layout: CodebookLayout, rotation: bool, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """`quantized` [N, sum D] and squared_error [parts, G] of `assign` as differentiable functions of z.

    Codes are constants. All operations are PyTorch's own, so autograd differentiates them any number of times and
    torch.func transforms them. `backward` is the gradient of this function.
    """
    index = layout.indices(z.device)
    no_code = (codes < 0)[:, index.codebook_of_column]
    quantized = quantized.detach()
    wide = z.to(quantized.dtype)
    e = quantized.masked_fill(no_code, 0.0)
    estimate = wide
    if rotation:  # straight-through in rows without a code
        estimate = torch.where(no_code, wide, rotate_to_codes(wide.masked_fill(no_code, 0.0), e, layout))
    squares = (wide - e).masked_fill(no_code, 0.0).square()
    if parts > 1:
        blocks = -(-z.shape[0] // PART_ROWS)
        rows_per_part = -(-blocks // parts) * PART_ROWS
        part = torch.arange(z.shape[0], device=z.device) // rows_per_part
        sums = squares.new_zeros(parts, squares.shape[1]).index_add(0, part, squares)
    else:
        sums = squares.sum(0, keepdim=True)
    error = sums.new_zeros(sums.shape[0], layout.groups).index_add(1, index.codebook_of_column, sums)
    return quantized + (estimate - estimate.detach()), error


def nearest_codes(z: Tensor, codebook: Tensor, layout: CodebookLayout, centred: bool = True) -> Tensor:
    """Index of the nearest code within each codebook.

    Args:
        z: [N, sum D] latents, finite or not.
        codebook: [sum K D] code vectors.
        layout: sizes of the group.
        centred: subtract the codebook's mean code from both sides first. Far from the origin, |e|^2 - 2 z.e would
            round to the same distance for different codes. Costs a pass over z.

    Returns:
        [N, G] int64; -1 where the row is not finite in that codebook, or where no code is finite.
    """
    index = layout.indices(z.device)
    codes = layout.pad_codebook(codebook)  # [G, K_max, D_max]
    # An exported graph has one block for any number of rows, and no operation that hashes bits.
    first_index = None if exporting() else first_equal(codes, index.hash_factors)
    z_padded = layout.pad_columns(z)  # [G, N, D_max]
    if centred:
        centre = torch.where(torch.isfinite(codes), codes, 0.0).sum(1, keepdim=True)
        centre = torch.where(torch.isfinite(centre), centre / index.num_codes[:, None, None].to(codes.dtype), 0.0)
        codes, z_padded = codes - centre, z_padded - centre
    norms = codes.square().sum(-1).masked_fill(~index.code_mask, torch.inf)  # [G, K_max]
    transposed = codes.transpose(1, 2)
    rows = max(1, _MAX_DISTANCES // (layout.groups * layout.max_codes))
    blocks = []
    for block in (z_padded,) if exporting() else z_padded.split(rows, dim=1):  # [G, rows, D_max]
        distance = torch.baddbmm(norms[:, None, :], block, transposed, alpha=-2.0)
        distance = distance.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best, code = distance.min(-1) if exporting() or distance.numel() else _empty_minimum(distance)
        code = code if first_index is None else first_index.gather(1, code)
        blocks.append(torch.where(torch.isfinite(block).all(-1) & (best < torch.inf), code, -1))
    return torch.cat(blocks, dim=1).transpose(0, 1).contiguous()


def first_equal(codes: Tensor, factors: Tensor) -> Tensor:
    """[G, K] lowest index of a code with the same entries, for codes [G, K, D].

    A matrix product may round the distances to two equal codes differently, depending on their columns, so ties
    between equal codes are broken here. Codes are compared by a 64-bit hash: the sum of their bits weighted by odd
    `factors` [D].
    """
    K = codes.shape[1]
    bits = (codes + 0.0).contiguous()  # -0 becomes +0
    words = bits.view(torch.int32 if bits.element_size() == 4 else torch.int64).to(torch.int64)
    hashes = (words * factors).sum(-1)  # [G, K], modulo 2^64
    ordered, index = hashes.sort(dim=1, stable=True)  # equal codes next to each other, lowest index first
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    position = torch.where(starts, torch.arange(K, device=codes.device), 0).cummax(1).values
    return torch.empty_like(index).scatter_(1, index, index.gather(1, position))


def _empty_minimum(distance: Tensor) -> tuple[Tensor, Tensor]:
    """`distance.min(-1)`, which torch refuses for no elements."""
    shape = distance.shape[:-1]
    return distance.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=distance.device)


def gather_codes(codes: Tensor, codebook: Tensor, layout: CodebookLayout) -> Tensor:
    """Code vectors of given indices.

    Args:
        codes: [N, G] int64, -1 for none.
        codebook: [sum K D]; differentiable.

    Returns:
        [N, sum D]; NaN where the index is -1.
    """
    index = layout.indices(codes.device)
    padded = layout.pad_codebook(codebook).flatten(0, 1)  # [G * K_max, D_max]
    first = torch.arange(layout.groups, device=codes.device) * layout.max_codes
    rows = padded[(codes.clamp(min=0) + first).flatten()]  # [N * G, D_max]
    packed = rows.view(codes.shape[0], layout.groups * layout.max_dims)[:, index.packed_columns]
    return packed.masked_fill((codes < 0)[:, index.codebook_of_column], torch.nan)


def accumulate(z: Tensor, codes: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """Number of rows and sum of the latents of every code.

    Args:
        z: [N, sum D].
        codes: [N, G] int64, -1 for rows that are left out.

    Returns:
        counts [sum K] and sums [sum K D], float32 or wider.
    """
    G, K = layout.groups, layout.max_codes
    dtype = torch.promote_types(z.dtype, torch.float32)
    no_code = G * K  # slot for rows without a code
    first = torch.arange(G, device=z.device)[:, None] * K
    rows = codes.transpose(0, 1)  # [G, N]
    target = torch.where(rows < 0, no_code, rows + first).flatten()
    counts = torch.zeros(G * K + 1, dtype=dtype, device=z.device)
    counts.index_add_(0, target, torch.ones_like(target, dtype=dtype))
    sums = torch.zeros(G * K + 1, layout.max_dims, dtype=dtype, device=z.device)
    sums.index_add_(0, target, layout.pad_columns(z).to(dtype).flatten(0, 1))
    index = layout.indices(z.device)
    return counts[index.packed_codes], sums[:no_code].flatten()[index.packed_entries]


def squared_error(z: Tensor, quantized: Tensor, codes: Tensor, layout: CodebookLayout) -> Tensor:
    """[G] sum over rows with a code of ||z_g - e_g||^2."""
    index = layout.indices(z.device)
    error = (z - quantized).masked_fill((codes < 0)[:, index.codebook_of_column], 0.0).square().sum(0)
    return error.new_zeros(layout.groups).index_add_(0, index.codebook_of_column, error)


def rotate_to_codes(z: Tensor, quantized: Tensor, layout: CodebookLayout) -> Tensor:
    """`quantized` with the gradient of the rotation that carries z to it (arXiv 2410.06424).

    q = lambda R z with lambda = |q| / |z| and the rotation R = 1 - 2 r r^T + 2 q^ z^^T, where
    r = (z^ + q^) / |z^ + q^| and ^ marks unit length; lambda and R are constants.

    Args:
        z: [N, sum D], differentiable.
        quantized: [N, sum D] the codes of z, without gradient.

    Returns:
        [N, sum D], equal to `quantized` up to rounding.
    """
    zp, qp = layout.pad_columns(z), layout.pad_columns(quantized)  # [G, N, D_max]
    scale, z_unit, q_unit, bisector, nonzero = _rotation(zp.detach(), qp.detach())
    straight_through = zp + (qp - zp).detach()
    rotated = rotate(zp, scale, z_unit, q_unit, bisector)
    return layout.pack_columns(torch.where(nonzero, rotated, straight_through))


def _rotation_gradient(grad: Tensor, z: Tensor, quantized: Tensor, layout: CodebookLayout) -> Tensor:
    """lambda R^T grad [N, sum D]: the gradient of `rotate_to_codes` with respect to z."""
    padded = layout.pad_columns(grad)
    scale, z_unit, q_unit, bisector, nonzero = _rotation(layout.pad_columns(z), layout.pad_columns(quantized))
    rotated = rotate(padded, scale, q_unit, z_unit, bisector)
    return layout.pack_columns(torch.where(nonzero, rotated, padded))


def _rotation(z: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """lambda, z^, q^, r, and where z is not zero: no rotation carries a zero latent to a code."""
    tiny = torch.finfo(z.dtype).tiny
    z_norm = z.norm(dim=-1, keepdim=True).clamp(min=tiny)
    q_norm = q.norm(dim=-1, keepdim=True).clamp(min=tiny)
    z_unit, q_unit = z / z_norm, q / q_norm
    bisector = z_unit + q_unit
    length = bisector.norm(dim=-1, keepdim=True)
    # Where z and q are opposite, r is rounding error; with r = 0 the formula reflects z onto q.
    bisector = torch.where(length > OPPOSITE, bisector / length.clamp(min=tiny), 0.0)
    return q_norm / z_norm, z_unit, q_unit, bisector, z_norm > tiny

"""Triton kernels of residual quantization: all stages in one launch, the residual of a tile of rows in registers.

Codes pass by in tiles while each row keeps its nearest so far; no buffer grows with N x K, none with N x Q x D. Sums
come from rows sorted by code, whose residuals are formed again from their codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._triton.specimen import Specimen
from spinlock_fast.kernels._triton.tables import book_table, capability, power_of_two
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.residual_vq.reference import SHORT, Result
from spinlock_fast.kernels.vq_assign.streamed import add_segments, centred_codes

# The residual of a row is held whole; wider rows go stage by stage.
MAX_DIMS = 128
_SHORT = tl.constexpr(SHORT)
_GRADIENTS = {"none": 0, "straight_through": 1, "rotation": 2}


@dataclass(frozen=True)
class ResidualConfig:
    """Tile sizes, chosen by dimensions and device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int

    @classmethod
    def of(cls, dims: int, capability: int) -> ResidualConfig:
        """For a device of compute capability `capability` (80, 90, 100): as many rows as fit without a spill."""
        block_d = power_of_two(dims, 32)
        block_n = 16 if block_d > 64 else 64 if capability >= 90 else 32
        return cls(block_n=block_n, block_k=64, block_d=block_d, num_warps=8)


@triton.jit
def _lengths(x):
    """[BLOCK_N], at least 1e-6."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), _SHORT)


@triton.jit(do_not_specialize=["N", "x_stride"])
def residual_vq_fwd_kernel(
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    table_ptr,  # [5, Q] int32
    centres_ptr,  # [Q * D]
    centred_ptr,  # [Q, K_pad, D_pad]
    norms_ptr,  # [Q, K_pad], Inf where padded or not finite
    mask_ptr,  # [N] bool, or not read
    codes_ptr,  # [N, Q] int64
    lengths_ptr,  # [N, Q]: of what each stage quantized, where COSINE
    zero_ptr,  # [N] int32: stage from which on the residual is 0 and stays 0
    error_ptr,  # [row tiles, Q]
    N,
    Q,
    D,
    K_pad,
    D_pad,
    x_stride,
    COSINE: tl.constexpr,
    ROTATION: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < N - start
    valid = inside
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=inside, other=0) != 0)
    here = valid[:, None] & (d < D)[None, :]
    residual = tl.load(x_ptr + (start + n)[:, None] * x_stride + d[None, :], mask=here, other=0.0)  # [BLOCK_N, BLOCK_D]
    zero = tl.full([BLOCK_N], 0, dtype=tl.int32) + Q
    for q in range(Q):
        K = tl.load(table_ptr + q)
        first_code = tl.load(table_ptr + 2 * Q + q).to(tl.int64)
        if COSINE:
            length = _lengths(residual)
            tl.store(lengths_ptr + (start + n) * Q + q, length, mask=inside)
            y = residual / length[:, None]
            moved = y
        else:
            y = residual
            moved = y - tl.load(centres_ptr + q * D + d, mask=d < D, other=0.0)[None, :]
        best = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
        code = tl.full([BLOCK_N], -1, dtype=tl.int32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            at = tl.cast(q, tl.int64) * K_pad + k
            e = tl.load(centred_ptr + at[:, None] * D_pad + d[None, :], mask=(d < D_pad)[None, :], other=0.0)
            norms = tl.load(norms_ptr + at)
            products = tl.dot(moved, tl.trans(e), input_precision="tf32x3")  # [BLOCK_N, BLOCK_K]
            distance = -2.0 * products
            if not COSINE:
                distance += norms[None, :]
            # NaN compares unequal to itself: a code that is not finite is never near.
            distance = tl.where((norms < float("inf"))[None, :] & (distance == distance), distance, float("inf"))
            nearest, index = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
            nearer = nearest < best
            best = tl.where(nearer, nearest, best)
            code = tl.where(nearer, first + index, code)
        bad = tl.max((tl.abs(residual) < float("inf")).to(tl.int32) ^ 1, axis=1)
        has = valid & (code >= 0) & (bad == 0)
        code = tl.where(has, code, -1)
        tl.store(codes_ptr + (start + n) * Q + q, code.to(tl.int64), mask=inside)
        chosen = first_code + tl.where(has, code, 0).to(tl.int64)
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=here & has[:, None], other=0.0)
        e = tl.where(here & (has == 0)[:, None], float("nan"), e)
        off = tl.where(here, y - e, 0.0)
        tl.store(error_ptr + tl.program_id(0).to(tl.int64) * Q + q, tl.sum(tl.sum(off * off, axis=1), axis=0))
        if ROTATION:  # rotating and scaling 0 gives 0
            zero = tl.where(tl.sum((residual != 0.0).to(tl.int32), axis=1) == 0, tl.minimum(zero, q), zero)
            e = tl.where((zero <= q)[:, None], 0.0, e)
        residual = tl.where(here, residual - e, 0.0)
    tl.store(zero_ptr + start + n, zero, mask=inside)


@triton.jit(do_not_specialize=["N"])
def residual_gather_kernel(
    codebook_ptr,  # [sum K, D]
    table_ptr,  # [5, Q] int32
    mask_ptr,  # [N] bool, or not read
    codes_ptr,  # [N, Q] int64
    zero_ptr,  # [N] int32
    quantized_ptr,  # [N, D]
    N,
    Q,
    D,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the code vectors of all stages: apart from the search, which needs the registers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < N - start
    valid = inside
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=inside, other=0) != 0)
    zero = tl.load(zero_ptr + start + n, mask=inside, other=0)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for q in range(Q):
        code = tl.load(codes_ptr + (start + n) * Q + q, mask=valid, other=0)
        chosen = tl.load(table_ptr + 2 * Q + q).to(tl.int64) + tl.where(code < 0, 0, code)
        here = (valid & (q < zero))[:, None] & (d < D)[None, :]
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=here, other=0.0)
        total += tl.where((code < 0)[:, None] & here, float("nan"), e)
    tl.store(quantized_ptr + (start + n)[:, None] * D + d[None, :], total, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["N", "x_stride"])
def residual_vq_bwd_kernel(
    grad_ptr,  # [N, D]
    of_errors_ptr,  # [Q]
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    table_ptr,  # [5, Q] int32
    mask_ptr,  # [N] bool, or not read
    codes_ptr,  # [N, Q] int64
    out_ptr,  # [N, D]
    N,
    Q,
    D,
    x_stride,
    COSINE: tl.constexpr,
    GRADIENT: tl.constexpr,  # 0: none of the output, 1: straight through, 2: by rotation
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < N - start
    valid = inside
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + n, mask=inside, other=0) != 0)
    here = valid[:, None] & (d < D)[None, :]
    at = (start + n)[:, None] * D + d[None, :]
    residual = tl.load(x_ptr + (start + n)[:, None] * x_stride + d[None, :], mask=here, other=0.0)  # [BLOCK_N, BLOCK_D]
    grad = tl.load(grad_ptr + at, mask=here, other=0.0)
    out = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for q in range(Q):
        code = tl.load(codes_ptr + (start + n) * Q + q, mask=valid, other=0)
        first_code = tl.load(table_ptr + 2 * Q + q).to(tl.int64)
        chosen = first_code + tl.where(code < 0, 0, code)
        e = tl.load(codebook_ptr + chosen[:, None] * D + d[None, :], mask=here, other=0.0)
        e = tl.where((code < 0)[:, None] & here, float("nan"), e)
        if COSINE:
            length = _lengths(residual)
            y = residual / length[:, None]
        else:
            y = residual
        if GRADIENT == 2:
            of_y = 1.0 / _lengths(y)
            of_e = 1.0 / _lengths(e)
            between = y * of_y[:, None] + e * of_e[:, None]
            between = between / _lengths(between)[:, None]
            along = 2.0 * tl.sum(grad * between, axis=1)
            back = 2.0 * tl.sum(grad * e, axis=1) * of_e * of_y
            factor = of_y / of_e
            passed = factor[:, None] * (grad - along[:, None] * between + back[:, None] * y)
        elif GRADIENT == 1:
            passed = grad
        else:
            passed = tl.zeros_like(grad)
        passed += 2.0 * tl.load(of_errors_ptr + q) * (y - e)
        if COSINE:
            along = tl.where(length > _SHORT, tl.sum(passed * y, axis=1), 0.0)
            passed = (passed - along[:, None] * y) / length[:, None]
        out += tl.where(here, passed, 0.0)
        if GRADIENT == 2:
            e = tl.where((tl.sum((residual != 0.0).to(tl.int32), axis=1) == 0)[:, None], 0.0, e)
        residual = tl.where(here, residual - e, 0.0)
    tl.store(out_ptr + at, out, mask=inside[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["x_stride", "limit"])
def residual_sum_kernel(
    x_ptr,  # [N, D], row stride x_stride
    codebook_ptr,  # [sum K, D]
    codes_ptr,  # [N, Q] int64
    lengths_ptr,  # [N, Q], or not read
    zero_ptr,  # [N] int32
    order_ptr,  # [N * Q] int64 positions in codes, sorted by code
    item_code_ptr,  # [items] int64 code of an item, `limit` for none
    item_first_ptr,  # [items] int64 first sorted position
    item_last_ptr,  # [items] int64 one past the last
    code_book_ptr,  # [sum K] int64
    table_ptr,  # [5, Q] int32
    out_ptr,  # [items, D]
    Q,
    D,
    x_stride,
    limit,
    COSINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    code = tl.load(item_code_ptr + item)
    if code < limit:
        q = tl.load(code_book_ptr + code)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(item_first_ptr + item)
        last = tl.load(item_last_ptr + item)
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for position in range(first, last, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            given = at < last
            here = given[:, None] & (d < D)[None, :]
            row = tl.load(order_ptr + at, mask=given, other=0) // Q
            value = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=here, other=0.0)
            zero = tl.load(zero_ptr + row, mask=given, other=0)
            for s in range(q):
                before = tl.load(codes_ptr + row * Q + s, mask=given, other=0)
                before += tl.load(table_ptr + 2 * Q + s).to(tl.int64)
                taken = here & (s < zero)[:, None]
                value -= tl.load(codebook_ptr + before[:, None] * D + d[None, :], mask=taken, other=0.0)
            if COSINE:
                value = value / tl.load(lengths_ptr + row * Q + q, mask=given, other=1.0)[:, None]
            total += tl.where(here, value, 0.0)
        tl.store(out_ptr + item * D + d, tl.sum(total, axis=0), mask=d < D)


def row_block(block_d: int) -> int:
    """Rows that a program holds where it does no more than add them up."""
    return 16 if block_d <= 32 else 8


@launches
def assign(
    x: Tensor,
    codebook: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
    with_sums: bool,
) -> Result:
    """`reference.assign`, for at most `MAX_DIMS` dimensions."""
    (N, D), Q = x.shape, len(num_codes)
    layout = CodebookLayout.of(num_codes, [D] * Q)
    x = x if x.stride(1) == 1 else x.contiguous()
    codebook = codebook.contiguous()
    codes = torch.empty(N, Q, dtype=torch.int64, device=x.device)
    quantized = x.new_empty(N, D)
    total = len(codebook) if with_sums else 0
    if N == 0:
        return quantized, codes, x.new_zeros(Q), x.new_zeros(total), x.new_zeros(total, D)
    config = ResidualConfig.of(D, capability(x.device))
    centred, norms, centres = centred_codes(codebook, layout, not cosine, config.block_k)
    lengths = x.new_empty(N, Q if cosine else 0)
    zero = torch.empty(N, dtype=torch.int32, device=x.device)
    tiles = triton.cdiv(N, config.block_n)
    errors = x.new_empty(tiles, Q)
    residual_vq_fwd_kernel[(tiles,)](
        x, codebook, book_table(layout, x.device), centres, centred, norms, x if mask is None else mask, codes, lengths,
        zero, errors, N, Q, D, centred.shape[1], centred.shape[2], x.stride(0),
        COSINE=cosine, ROTATION=gradient == "rotation", HAS_MASK=mask is not None, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    block_n = row_block(config.block_d)
    residual_gather_kernel[(triton.cdiv(N, block_n),)](
        codebook, book_table(layout, x.device), x if mask is None else mask, codes, zero, quantized, N, Q, D,
        HAS_MASK=mask is not None, BLOCK_N=block_n, BLOCK_D=config.block_d, num_warps=4,
    )  # fmt: skip
    errors = errors.sum(0)
    if not with_sums:
        return quantized, codes, errors, x.new_empty(0), x.new_empty(0, D)

    def add_rows(segments: tuple[Tensor, ...], parts: Tensor, blocks: int, block_r: int, block_d: int) -> None:
        index = layout.indices(x.device)
        residual_sum_kernel[(len(parts), blocks)](
            x, codebook, codes, lengths, zero, *segments, index.code_book, book_table(layout, x.device), parts, Q, D,
            x.stride(0), total, COSINE=cosine, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip

    counts, sums = add_segments(codes, layout, add_rows)
    return quantized, codes, errors, counts, sums.view(-1, D)


@launches
def backward(
    grad: Tensor,
    grad_errors: Tensor,
    x: Tensor,
    codebook: Tensor,
    codes: Tensor,
    num_codes: Sequence[int],
    mask: Tensor | None,
    cosine: bool,
    gradient: str,
) -> Tensor:
    """`reference.backward`, for at most `MAX_DIMS` dimensions."""
    (N, D), Q = x.shape, len(num_codes)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(N, D)
    if N == 0:
        return out
    layout = CodebookLayout.of(num_codes, [D] * Q)
    block_d = power_of_two(D, 32)
    block_n = row_block(block_d)
    residual_vq_bwd_kernel[(triton.cdiv(N, block_n),)](
        grad.contiguous(), grad_errors.contiguous(), x, codebook.contiguous(), book_table(layout, x.device),
        x if mask is None else mask, codes.contiguous(), out, N, Q, D, x.stride(0), COSINE=cosine,
        GRADIENT=_GRADIENTS[gradient], HAS_MASK=mask is not None, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def specimens(capability: int) -> list[Specimen]:
    """Launches for the report: 65,536 rows, 8 stages of 1,024 codes."""
    N, Q, K = 65536, 8, 1024
    found = []
    for D, variants in ((64, ((False, True), (True, True), (False, False))), (128, ((True, True),))):
        config = ResidualConfig.of(D, capability)
        shape = f"65,536 x {D}, 8 x 1,024"
        tile = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_D": config.block_d}
        block = {"BLOCK_N": row_block(config.block_d), "BLOCK_D": config.block_d}
        books = 4 * Q * K * D
        for cosine, rotation in variants:
            named = shape + (", cosine" if cosine else "") + (", rotation" if rotation else "")
            options = {"COSINE": cosine, "ROTATION": rotation, "HAS_MASK": cosine, **tile}
            options |= {"num_warps": config.num_warps, "num_stages": 1}
            num_bytes, operations = 4 * N * D + books + 8 * N * Q, 2 * N * Q * K
            found.append(
                Specimen.launched(residual_vq_fwd_kernel, named, options, num_bytes, operations, operations * D)
            )
            constants = {"COSINE": cosine, "GRADIENT": 2 if rotation else 1, "HAS_MASK": cosine, **block}
            num_bytes = 12 * N * D + books + 8 * N * Q
            found.append(Specimen(residual_vq_bwd_kernel, named, constants, num_bytes, 20 * N * Q * D, 0))
        constants = {"HAS_MASK": True, **block}
        found.append(Specimen(residual_gather_kernel, shape, constants, num_bytes, N * Q * D, 0))
        constants = {"COSINE": True, "BLOCK_R": 32, "BLOCK_D": 64}
        num_bytes = 4 * N * D + 2 * books + 28 * N * Q
        found.append(Specimen(residual_sum_kernel, shape, constants, num_bytes, N * Q * Q * D, 0))
    return found

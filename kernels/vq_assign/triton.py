"""Triton kernels of the nearest-code assignment for groups of small codebooks (K <= 64).

One program holds a tile of rows and all codes of one codebook: distances by |e|^2 - 2 z.e with products
accurate to float32 (three TF32 products each, never plain TF32), nearest code, then codes, errors and the
counts and sums of its rows. Those parts are added up in their order by whoever uses them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._triton.specimen import ROWS, SEED, Specimen
from spinlock_fast.kernels._triton.tables import book_table, capability, power_of_two
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign.reference import PART_ROWS, row_parts


@dataclass(frozen=True)
class AssignConfig:
    """Tile sizes, chosen by shape and device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 1  # the loops over D are short, and stages cost registers

    @classmethod
    def of(cls, layout: CodebookLayout, capability: int) -> AssignConfig:
        """For a device of compute capability `capability` (80, 90, 100)."""
        # Tiles of 32 codes spill on sm_100.
        return cls(PART_ROWS, power_of_two(layout.max_codes, 64 if capability >= 100 else 16), block_d=16)


@triton.jit(do_not_specialize=["N", "G", "total_codes", "total_dims", "total_entries", "z_stride", "tiles"])
def vq_assign_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    codebook_ptr,  # [sum K D] float32
    mask_ptr,  # [N] bool, or not read
    table_ptr,  # [5, G] int32, see book_table
    codes_ptr,  # [N, G] int64
    quantized_ptr,  # [N, sum D] float32
    error_ptr,  # [parts, G] float32
    counts_ptr,  # [parts, sum K] float32
    sums_ptr,  # [parts, sum K D] float32
    N,
    G,
    total_codes,
    total_dims,
    total_entries,
    z_stride,
    tiles,
    HAS_MASK: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0)
    g = tl.program_id(1)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_code = tl.load(table_ptr + 2 * G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    first_entry = tl.load(table_ptr + 4 * G + g)
    codebook_ptr += first_entry
    k = tl.arange(0, BLOCK_K)
    counts_out = counts_ptr + part.to(tl.int64) * total_codes + first_code
    sums_out = sums_ptr + part.to(tl.int64) * total_entries + first_entry

    error = tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in range(tiles):
        # 64-bit offsets of the tile, 32-bit offsets within it: half the registers.
        start = (part * tiles + tile).to(tl.int64) * BLOCK_N
        r = tl.arange(0, BLOCK_N)
        inside = r < N - start
        z_tile = z_ptr + start * z_stride + first_column

        products = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        squares = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        bad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.int1)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = inside[:, None] & (d < D)[None, :]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_tile, other=0.0).to(tl.float32)
            in_codes = (k < K)[:, None] & (d < D)[None, :]
            e = tl.load(codebook_ptr + (k[:, None] * D + d[None, :]), mask=in_codes, other=0.0)  # [BLOCK_K, BLOCK_D]
            bad = bad | (tl.abs(z) >= float("inf")) | (z != z)
            if CENTRED:
                centre = tl.sum(tl.where(tl.abs(e) < float("inf"), e, 0.0), axis=0) / K  # [BLOCK_D]
                centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
                e = tl.where(in_codes, e - centre[None, :], 0.0)
                z -= centre[None, :]
            squares += e * e
            products = tl.dot(z, tl.trans(e), products, input_precision="tf32x3")
        distance = tl.sum(squares, axis=1)[None, :] - 2.0 * products  # |z - e|^2 but for |z|^2
        # NaN compares unequal to itself: a code that is not finite is never near.
        distance = tl.where((k < K)[None, :] & (distance == distance), distance, float("inf"))
        best, code = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
        valid = inside & (tl.max(bad.to(tl.int32), axis=1) == 0) & (best < float("inf"))
        if HAS_MASK:
            valid = valid & (tl.load(mask_ptr + start + r, mask=inside, other=0) != 0)
        code = tl.where(valid, code, -1)
        tl.store(codes_ptr + start * G + g + r * G, code.to(tl.int64), mask=inside)

        hot = (code[:, None] == k[None, :]).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        chosen = tl.where(valid, code, 0) * D  # [BLOCK_N]
        out_tile = quantized_ptr + start * total_dims + first_column
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_tile = inside[:, None] & (d < D)[None, :]
            here = in_tile & valid[:, None]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=here, other=0.0).to(tl.float32)
            q = tl.load(codebook_ptr + (chosen[:, None] + d[None, :]), mask=here, other=0.0)  # [BLOCK_N, BLOCK_D]
            out = tl.where(valid[:, None], q, float("nan"))
            tl.store(out_tile + ((r * total_dims)[:, None] + d[None, :]), out, mask=in_tile)
            error += tl.sum((z - q) * (z - q), axis=1)
            if WITH_SUMS:
                sums = tl.dot(tl.trans(hot), z, input_precision="tf32x3")  # [BLOCK_K, BLOCK_D]
                entries = sums_out + (k[:, None] * D + d[None, :])
                in_codes = (k < K)[:, None] & (d < D)[None, :]
                if tile > 0:  # this program alone writes its part, each thread its own entries
                    sums += tl.load(entries, mask=in_codes, other=0.0)
                tl.store(entries, sums, mask=in_codes)
        if WITH_SUMS:
            counts = tl.sum(hot, axis=0)  # [BLOCK_K]
            if tile > 0:
                counts += tl.load(counts_out + k, mask=k < K, other=0.0)
            tl.store(counts_out + k, counts, mask=k < K)

    tl.store(error_ptr + part.to(tl.int64) * G + g, tl.sum(error, axis=0))


@triton.jit(do_not_specialize=["N", "G", "total_dims", "z_stride", "grad_stride", "rows_per_part"])
def vq_assign_bwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    quantized_ptr,  # [N, sum D] float32
    codes_ptr,  # [N, G] int64
    grad_quantized_ptr,  # [N, sum D], row stride grad_stride
    grad_error_ptr,  # [parts, G] float32
    table_ptr,  # [5, G] int32
    grad_z_ptr,  # [N, sum D], the type of z
    N,
    G,
    total_dims,
    z_stride,
    grad_stride,
    rows_per_part,  # a multiple of BLOCK_N, or there is one part
    ROTATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    part = tl.program_id(0).to(tl.int64) * BLOCK_N // rows_per_part
    grad_error = tl.load(grad_error_ptr + part * G + g)
    inside = n < N
    valid = tl.load(codes_ptr + n * G + g, mask=inside, other=-1) >= 0  # [BLOCK_N]

    # The rotation needs norms first, then products with r = (z^ + q^) / |z^ + q^|, where ^ marks unit length.
    if ROTATE:
        zz = tl.zeros([BLOCK_N], dtype=tl.float32)
        qq = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = (inside & valid)[:, None] & (d < D)[None, :]
            column = first_column + d[None, :]
            z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=here, other=0.0).to(tl.float32)
            q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=here, other=0.0)
            zz += tl.sum(z * z, axis=1)
            qq += tl.sum(q * q, axis=1)
        tiny = 1.1754943508222875e-38
        z_norm = tl.maximum(tl.sqrt(zz), tiny)
        q_norm = tl.maximum(tl.sqrt(qq), tiny)
        ratio = q_norm / z_norm
        rotated = z_norm > tiny
        rr = tl.zeros([BLOCK_N], dtype=tl.float32)
        ur = tl.zeros([BLOCK_N], dtype=tl.float32)
        uq = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            here = (inside & valid)[:, None] & (d < D)[None, :]
            column = first_column + d[None, :]
            z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=here, other=0.0).to(tl.float32)
            q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=here, other=0.0)
            u = tl.load(grad_quantized_ptr + n[:, None] * grad_stride + column, mask=here, other=0.0).to(tl.float32)
            r = z / z_norm[:, None] + q / q_norm[:, None]
            rr += tl.sum(r * r, axis=1)
            ur += tl.sum(u * r, axis=1)
            uq += tl.sum(u * q, axis=1)
        # Where z points away from q, r is rounding alone; see reference.OPPOSITE.
        along_r = tl.where(rr > 1e-12, ur / tl.maximum(rr, tiny), 0.0)
        along_q = uq / q_norm

    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_tile = inside[:, None] & (d < D)[None, :]
        here = in_tile & valid[:, None]
        column = first_column + d[None, :]
        u = tl.load(grad_quantized_ptr + n[:, None] * grad_stride + column, mask=in_tile, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + n[:, None] * z_stride + column, mask=here, other=0.0).to(tl.float32)
        q = tl.load(quantized_ptr + n[:, None] * total_dims + column, mask=here, other=0.0)
        grad = u
        if ROTATE:
            z_unit = z / z_norm[:, None]
            r = z_unit + q / q_norm[:, None]
            turned = ratio[:, None] * (u - 2.0 * along_r[:, None] * r + 2.0 * along_q[:, None] * z_unit)
            grad = tl.where(rotated[:, None] & valid[:, None], turned, u)
        grad += 2.0 * grad_error * (z - q)
        tl.store(grad_z_ptr + n[:, None] * total_dims + column, grad, mask=in_tile)


@launches
def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.assign` in one launch; error, counts and sums come in parts of rows."""
    config = AssignConfig.of(layout, capability(z.device))
    N, G = z.shape[0], layout.groups
    z = z if z.stride(-1) == 1 else z.contiguous()
    codebook = codebook.contiguous()
    parts = row_parts(N, G)
    tiles = triton.cdiv(triton.cdiv(N, config.block_n), parts)
    codes = torch.empty(N, G, dtype=torch.int64, device=z.device)
    quantized = torch.empty(N, layout.total_dims, dtype=torch.float32, device=z.device)
    error = torch.empty(parts, G, dtype=torch.float32, device=z.device)
    counts = torch.empty(parts, layout.total_codes if with_sums else 0, dtype=torch.float32, device=z.device)
    sums = torch.empty(parts, layout.total_entries if with_sums else 0, dtype=torch.float32, device=z.device)
    if N == 0:
        return codes, quantized, error.zero_(), counts.zero_(), sums.zero_()
    vq_assign_fwd_kernel[(parts, G)](
        z,
        codebook,
        mask if mask is not None else z,
        book_table(layout, z.device),
        codes,
        quantized,
        error,
        counts,
        sums,
        N,
        G,
        layout.total_codes,
        layout.total_dims,
        layout.total_entries,
        z.stride(0),
        tiles,
        HAS_MASK=mask is not None,
        WITH_SUMS=with_sums,
        CENTRED=centred,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return codes, quantized, error, counts, sums


@launches
def backward(
    grad_quantized: Tensor,
    grad_error: Tensor,
    z: Tensor,
    quantized: Tensor,
    codes: Tensor,
    layout: CodebookLayout,
    rotation: bool,
) -> Tensor:
    """`reference.backward` in one launch."""
    N = z.shape[0]
    z = z if z.stride(-1) == 1 else z.contiguous()
    grad_quantized = grad_quantized if grad_quantized.stride(-1) == 1 else grad_quantized.contiguous()
    grad_z = torch.empty(N, layout.total_dims, dtype=z.dtype, device=z.device)
    if N:
        block_d = min(64, power_of_two(layout.max_dims, 16))
        block_n = 1024 // block_d
        parts = grad_error.shape[0]
        tiles = triton.cdiv(triton.cdiv(N, PART_ROWS), parts)
        vq_assign_bwd_kernel[(triton.cdiv(N, block_n), layout.groups)](
            z,
            quantized,
            codes,
            grad_quantized,
            grad_error.contiguous(),
            book_table(layout, z.device),
            grad_z,
            N,
            layout.groups,
            layout.total_dims,
            z.stride(0),
            grad_quantized.stride(0),
            tiles * PART_ROWS if parts > 1 else max(N, block_n),
            ROTATE=rotation,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return grad_z


def specimens(capability: int) -> list[Specimen]:
    """Launches for the report."""
    found = []
    width, entries, codes = SEED.total_dims, SEED.total_entries, SEED.total_codes
    for largest in (16, 32, 64):
        config = AssignConfig.of(CodebookLayout.cached((largest,), (16,)), capability)
        for centred in (False, True):
            for with_sums in (True, False):
                found.append(
                    Specimen(
                        vq_assign_fwd_kernel,
                        f"512 rows, 33 codebooks, K <= {largest}"
                        + (", centred" if centred else "")
                        + ("" if with_sums else ", codes only"),
                        {
                            "HAS_MASK": True,
                            "WITH_SUMS": with_sums,
                            "CENTRED": centred,
                            "BLOCK_N": config.block_n,
                            "BLOCK_K": config.block_k,
                            "BLOCK_D": config.block_d,
                        },
                        num_bytes=4 * (2 * ROWS * width + entries + (codes + entries) * with_sums) + 8 * ROWS * 33,
                        float_ops=4 * ROWS * width,
                        dot_ops=2 * ROWS * entries * (1 + with_sums),
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                    )
                )
    for block_d in (16, 32, 64):
        for rotate in (False, True):
            found.append(
                Specimen(
                    vq_assign_bwd_kernel,
                    f"512 rows, 33 codebooks, D <= {block_d}" + (", rotation" if rotate else ""),
                    {"ROTATE": rotate, "BLOCK_N": 1024 // block_d, "BLOCK_D": block_d},
                    num_bytes=4 * 4 * ROWS * width + 8 * ROWS * 33,
                    float_ops=(18 if rotate else 3) * ROWS * width,
                    dot_ops=0,
                )
            )
    return found

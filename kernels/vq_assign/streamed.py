"""Triton kernels of the nearest-code assignment for large codebooks.

Codes pass by in tiles while each row keeps its nearest so far; with few rows several programs share the
codes of a codebook, and the winners of their shares are compared afterwards. No buffer grows with N x K.
Counts and sums come from the rows sorted by code: each code adds its rows in their order, so that the
result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.guard import launches
from spinlock_fast.kernels._triton.specimen import Specimen
from spinlock_fast.kernels._triton.tables import book_table, capability, power_of_two
from spinlock_fast.kernels.layout import CodebookLayout

# Programs that fill a large GPU; the number of shares depends on it, never on the device.
_PROGRAMS = 1024
_SEGMENT_ROWS = 32
_PAD_D = 32  # codes are padded to a multiple, which aligns their rows


@dataclass(frozen=True)
class SearchConfig:
    """Tile sizes, chosen by device."""

    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, capability: int) -> SearchConfig:
        """For a device of compute capability `capability` (80, 90, 100)."""
        if capability >= 90:
            return cls(block_n=128, block_k=128, block_d=32, num_warps=8, num_stages=1)
        return cls(block_n=128, block_k=128, block_d=16, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["G"])
def code_centres_kernel(codebook_ptr, table_ptr, centres_ptr, G, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean of the finite entries over the codes of each codebook: centres [sum D]."""
    g = tl.program_id(1)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    codebook_ptr += tl.load(table_ptr + 4 * G + g).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = (k < K)[:, None] & (d < D)[None, :]
        e = tl.load(codebook_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=here, other=0.0)
        total += tl.where(tl.abs(e) < float("inf"), e, 0.0)
    centre = tl.sum(total, axis=0) / K
    tl.store(centres_ptr + first_column + d, tl.where(tl.abs(centre) < float("inf"), centre, 0.0), mask=d < D)


@triton.jit(do_not_specialize=["G"])
def centre_codes_kernel(
    codebook_ptr,  # [sum K D]
    table_ptr,
    centres_ptr,  # [sum D]
    centred_ptr,  # [G, K_pad, D_pad]: e - centre, zero where padded
    norms_ptr,  # [G, K_pad]: |e - centre|^2, Inf where padded or not finite
    G,
    K_pad,
    D_pad,
    CENTRED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    codebook_ptr += tl.load(table_ptr + 4 * G + g).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    code = g.to(tl.int64) * K_pad + k
    norms = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in range(0, D_pad, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        here = (k < K)[:, None] & (d < D)[None, :]
        e = tl.load(codebook_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=here, other=0.0)
        if CENTRED:
            centre = tl.load(centres_ptr + first_column + d, mask=d < D, other=0.0)
            e = tl.where(here, e - centre[None, :], 0.0)
        norms += tl.sum(e * e, axis=1)
        tl.store(centred_ptr + code[:, None] * D_pad + d[None, :], e)
    tl.store(norms_ptr + code, tl.where((k < K) & (norms == norms), norms, float("inf")))


@triton.jit(do_not_specialize=["N", "G", "z_stride", "share"])
def vq_search_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    centred_ptr,  # [G, K_pad, D_pad] float32
    table_ptr,  # [5, G] int32
    centres_ptr,  # [sum D]
    norms_ptr,  # [G, K_pad]
    best_ptr,  # [splits, G, N] float32
    code_ptr,  # [splits, G, N] int32, -1 where the row or every code is not finite
    N,
    G,
    K_pad,
    D_pad,
    z_stride,
    share,  # codes of a codebook that one program searches, a multiple of BLOCK_K
    CENTRED: tl.constexpr,
    ALIGNED: tl.constexpr,  # every D_g is a multiple of 32, and z_stride too
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1)
    split = tl.program_id(2)
    K = tl.load(table_ptr + g)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    if ALIGNED:
        first_column = tl.multiple_of(first_column, 32)
        z_stride = tl.multiple_of(z_stride, 32)
    centres_ptr += first_column
    norms_ptr += g.to(tl.int64) * K_pad
    centred_ptr += g.to(tl.int64) * K_pad * D_pad
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    inside = r < N - start
    z_tile = z_ptr + start * z_stride + first_column
    e_offsets = tl.arange(0, BLOCK_K)[:, None] * D_pad + tl.arange(0, BLOCK_D)[None, :]

    best = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
    code = tl.full([BLOCK_N], -1, dtype=tl.int32)
    for first_code in range(split * share, tl.minimum(K, (split + 1) * share), BLOCK_K):
        products = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        e_tile = centred_ptr + tl.cast(first_code, tl.int64) * D_pad
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            in_rows = inside[:, None] if ALIGNED else inside[:, None] & (d < D)[None, :]
            z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_rows, other=0.0).to(tl.float32)
            if CENTRED:
                z -= tl.load(centres_ptr + d, mask=d < D, other=0.0)[None, :]
            e = tl.load(e_tile + first + e_offsets)  # [BLOCK_K, BLOCK_D]
            products = tl.dot(z, tl.trans(e), products, input_precision="tf32x3")
        norms = tl.load(norms_ptr + first_code + tl.arange(0, BLOCK_K))
        distance = norms[None, :] - 2.0 * products
        # NaN compares unequal to itself: a code that is not finite is never near.
        distance = tl.where((norms < float("inf"))[None, :] & (distance == distance), distance, float("inf"))
        nearest, index = tl.min(distance, axis=1, return_indices=True)  # the lowest index on ties
        nearer = nearest < best
        best = tl.where(nearer, nearest, best)
        code = tl.where(nearer, first_code + index, code)
    out = (split * G + g).to(tl.int64) * N + start + r
    tl.store(best_ptr + out, best, mask=inside)
    tl.store(code_ptr + out, code, mask=inside)


@triton.jit(do_not_specialize=["N", "G", "total_dims", "z_stride", "splits"])
def vq_finish_fwd_kernel(
    z_ptr,  # [N, sum D], row stride z_stride
    codebook_ptr,  # [sum K D] float32
    mask_ptr,  # [N] bool, or not read
    table_ptr,  # [5, G] int32
    best_ptr,  # [splits, G, N] float32
    code_ptr,  # [splits, G, N] int32
    codes_ptr,  # [N, G] int64
    quantized_ptr,  # [N, sum D] float32
    error_ptr,  # [row tiles, G] float32
    N,
    G,
    total_dims,
    z_stride,
    splits,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(1)
    D = tl.load(table_ptr + G + g)
    first_column = tl.load(table_ptr + 3 * G + g)
    codebook_ptr += tl.load(table_ptr + 4 * G + g).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    r = tl.arange(0, BLOCK_N)
    inside = r < N - start
    at = g.to(tl.int64) * N + start + r
    best = tl.load(best_ptr + at, mask=inside, other=float("inf"))
    code = tl.load(code_ptr + at, mask=inside, other=-1)
    for split in range(1, splits):
        other = at + tl.cast(split, tl.int64) * G * N
        nearest = tl.load(best_ptr + other, mask=inside, other=float("inf"))
        index = tl.load(code_ptr + other, mask=inside, other=-1)
        nearer = nearest < best  # earlier shares hold the lower indices
        best = tl.where(nearer, nearest, best)
        code = tl.where(nearer, index, code)
    z_tile = z_ptr + start * z_stride + first_column
    bad = tl.zeros([BLOCK_N], dtype=tl.int32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = inside[:, None] & (d < D)[None, :]
        z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=in_tile, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, tl.max((tl.abs(z) < float("inf")).to(tl.int32) ^ 1, axis=1))
    valid = inside & (code >= 0) & (bad == 0)
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + start + r, mask=inside, other=0) != 0)
    code = tl.where(valid, code, -1)
    tl.store(codes_ptr + start * G + g + r * G, code.to(tl.int64), mask=inside)
    chosen = tl.where(valid, code, 0).to(tl.int64) * D
    out_tile = quantized_ptr + start * total_dims + first_column
    error = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = inside[:, None] & (d < D)[None, :]
        here = in_tile & valid[:, None]
        z = tl.load(z_tile + ((r * z_stride)[:, None] + d[None, :]), mask=here, other=0.0).to(tl.float32)
        q = tl.load(codebook_ptr + (chosen[:, None] + d[None, :]), mask=here, other=0.0)
        tl.store(
            out_tile + ((r * total_dims)[:, None] + d[None, :]), tl.where(valid[:, None], q, float("nan")), mask=in_tile
        )
        error += tl.sum((z - q) * (z - q), axis=1)
    tl.store(error_ptr + tl.program_id(0).to(tl.int64) * G + g, tl.sum(error, axis=0))


@triton.jit(do_not_specialize=["G", "stride", "out_stride", "items", "limit"])
def segment_sum_kernel(
    values_ptr,  # rows with stride `stride`
    order_ptr,  # [n] int64 positions sorted by code, or not read
    item_code_ptr,  # [items] int64 code of an item, `limit` for none
    item_first_ptr,  # [items] int64 first sorted position
    item_last_ptr,  # [items] int64 one past the last
    code_book_ptr,  # [sum K] int64
    table_ptr,  # [5, G] int32
    first_entries_ptr,  # [sum K] int64, or not read
    out_ptr,
    G,
    stride,
    out_stride,
    items,
    limit,
    LEVEL: tl.constexpr,  # 0: rows of z into a row per item; 1: rows per item into the packed sums
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    code = tl.load(item_code_ptr + item)
    if code < limit:
        g = tl.load(code_book_ptr + code)
        D = tl.load(table_ptr + G + g)
        column = tl.load(table_ptr + 3 * G + g)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(item_first_ptr + item)
        last = tl.load(item_last_ptr + item)
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for position in range(first, last, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            here = (at < last)[:, None] & (d < D)[None, :]
            if LEVEL == 0:
                row = tl.load(order_ptr + at, mask=at < last, other=0) // G
                value = tl.load(values_ptr + (row * stride + column)[:, None] + d[None, :], mask=here, other=0.0)
            else:
                value = tl.load(values_ptr + (at * stride)[:, None] + d[None, :], mask=here, other=0.0)
            total += value.to(tl.float32)
        result = tl.sum(total, axis=0)
        if LEVEL == 0:
            tl.store(out_ptr + item * out_stride + d, result, mask=d < D)
        else:
            tl.store(out_ptr + tl.load(first_entries_ptr + code) + d, result, mask=d < D)


@launches
def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.assign` for codebooks of any size."""
    N, G = z.shape[0], layout.groups
    z = z if z.stride(-1) == 1 else z.contiguous()
    codebook = codebook.contiguous()
    codes = torch.empty(N, G, dtype=torch.int64, device=z.device)
    quantized = torch.empty(N, layout.total_dims, dtype=torch.float32, device=z.device)
    if N == 0:
        empty = z.new_zeros(1, layout.total_codes if with_sums else 0, dtype=torch.float32)
        sums = z.new_zeros(1, layout.total_entries if with_sums else 0, dtype=torch.float32)
        return codes, quantized, z.new_zeros(1, G, dtype=torch.float32), empty, sums
    best, code = search(z, codebook, layout, centred)
    block_n = 32
    tiles = triton.cdiv(N, block_n)
    error = torch.empty(tiles, G, dtype=torch.float32, device=z.device)
    vq_finish_fwd_kernel[(tiles, G)](
        z,
        codebook,
        mask if mask is not None else z,
        book_table(layout, z.device),
        best,
        code,
        codes,
        quantized,
        error,
        N,
        G,
        layout.total_dims,
        z.stride(0),
        best.shape[0],
        HAS_MASK=mask is not None,
        BLOCK_N=block_n,
        BLOCK_D=32,
        num_warps=4,
    )
    if with_sums:
        counts, sums = accumulate(z, codes, layout)
    else:
        counts, sums = codebook.new_empty(0), codebook.new_empty(0)
    return codes, quantized, error.sum(0, keepdim=True), counts[None], sums[None]


def centred_codes(
    codebook: Tensor, layout: CodebookLayout, centred: bool, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [G, K_pad, D_pad] about the mean code of each codebook, their squared norms, and the means [sum D]."""
    G, device = layout.groups, codebook.device
    table = book_table(layout, device)
    K_pad = triton.cdiv(layout.max_codes, block_k) * block_k
    D_pad = triton.cdiv(layout.max_dims, _PAD_D) * _PAD_D
    centres = torch.empty(layout.total_dims, dtype=torch.float32, device=device)
    codes = torch.empty(G, K_pad, D_pad, dtype=torch.float32, device=device)
    norms = torch.empty(G, K_pad, dtype=torch.float32, device=device)
    if centred:
        code_centres_kernel[(triton.cdiv(layout.max_dims, 32), G)](
            codebook, table, centres, G, BLOCK_K=32, BLOCK_D=32, num_warps=4
        )
    centre_codes_kernel[(K_pad // 32, G)](
        codebook, table, centres, codes, norms, G, K_pad, D_pad, CENTRED=centred, BLOCK_K=32, BLOCK_D=32, num_warps=4
    )
    return codes, norms, centres


def search(z: Tensor, codebook: Tensor, layout: CodebookLayout, centred: bool) -> tuple[Tensor, Tensor]:
    """Distances (but for |z|^2) and indices [splits, G, N] of the nearest code in each share of the codes."""
    N, G = z.shape[0], layout.groups
    table = book_table(layout, z.device)
    config = SearchConfig.of(capability(z.device))
    tiles = triton.cdiv(N, config.block_n)
    most = triton.cdiv(layout.max_codes, config.block_k)
    codes, norms, centres = centred_codes(codebook, layout, centred, config.block_k)
    K_pad, D_pad = codes.shape[1:]
    splits = max(1, min(most, 16, _PROGRAMS // (tiles * G)))
    share = triton.cdiv(most, splits) * config.block_k
    splits = triton.cdiv(layout.max_codes, share)
    best = torch.empty(splits, G, N, dtype=torch.float32, device=z.device)
    code = torch.empty(splits, G, N, dtype=torch.int32, device=z.device)
    vq_search_fwd_kernel[(tiles, G, splits)](
        z,
        codes,
        table,
        centres,
        norms,
        best,
        code,
        N,
        G,
        K_pad,
        D_pad,
        z.stride(0),
        share,
        CENTRED=centred,
        ALIGNED=all(d % 32 == 0 for d in layout.dims) and z.stride(0) % 32 == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return best, code


def accumulate(z: Tensor, codes: Tensor, layout: CodebookLayout) -> tuple[Tensor, Tensor]:
    """`reference.accumulate` in a fixed order."""
    index, table = layout.indices(z.device), book_table(layout, z.device)

    def add_rows(segments: tuple[Tensor, ...], parts: Tensor, blocks: int, block_r: int, block_d: int) -> None:
        order, code, first, last = segments
        segment_sum_kernel[(len(parts), blocks)](
            z, order, code, first, last, index.code_book, table, first, parts, layout.groups, z.stride(0),
            parts.shape[1], len(parts), layout.total_codes, LEVEL=0, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip

    return add_segments(codes, layout, add_rows)


def add_segments(codes: Tensor, layout: CodebookLayout, add_rows: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Rows of each code [sum K] and their sums [sum K D]: rows sorted by code, long segments added in parts.

    Args:
        codes: [N, G] int64, -1 for rows that count nowhere.
        add_rows: called with (order, code, first, last) of each part, the parts [items, D_max] to fill, and the number
            and sizes of blocks. A part is the sum of the rows at positions order[first:last] of the flattened codes.
    """
    N, G = codes.shape
    device = codes.device
    index = layout.indices(device)
    total = layout.total_codes
    ids = torch.where(codes < 0, total, codes + index.code_offsets).flatten()
    ids, order = ids.to(torch.int32).sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(total + 1, dtype=torch.int32, device=device))  # [sum K + 1]
    lengths = bounds.diff()
    # A code of many rows takes several items of at most `length` rows, each summed by itself.
    length = power_of_two(4 * N * G // total, 128)
    needed = (lengths + length - 1) // length
    ends = needed.cumsum(0)
    items = total + N * G // length
    item = torch.arange(items, device=device)
    code = torch.searchsorted(ends, item, right=True)  # sum K where there is no such item
    safe = code.clamp(max=total - 1)
    first = bounds[safe] + (item - (ends[safe] - needed[safe])) * length
    last = torch.minimum(first + length, bounds[safe + 1])
    width = layout.max_dims
    block_d = min(64, power_of_two(width, 16))
    blocks = triton.cdiv(width, block_d)
    parts = torch.empty(items, width, dtype=torch.float32, device=device)
    sums = torch.zeros(layout.total_entries, dtype=torch.float32, device=device)
    add_rows((order, code, first, last), parts, blocks, _SEGMENT_ROWS, block_d)
    codes_once = torch.arange(total, device=device)
    segment_sum_kernel[(total, blocks)](
        parts, order, codes_once, ends - needed, ends, index.code_book, book_table(layout, device),
        index.first_entries, sums, G, width, 0, total, total, LEVEL=1, BLOCK_R=_SEGMENT_ROWS, BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    return lengths.to(torch.float32), sums


def specimens(capability: int) -> list[Specimen]:
    """Launches for the report: 65,536 rows of 256 dimensions, 1,024 codes."""
    N, K, D = 65536, 1024, 256
    shape = "65,536 x 256, K = 1,024"
    config = SearchConfig.of(capability)
    constants: dict[str, object] = {"HAS_MASK": True, "BLOCK_N": 32, "BLOCK_D": 32}
    found = [
        Specimen(code_centres_kernel, shape, {"BLOCK_K": 32, "BLOCK_D": 32}, 4 * (K + 1) * D, 2 * K * D, 0),
        Specimen(vq_finish_fwd_kernel, shape, constants, 4 * (2 * N * D + K * D + 2 * N) + 8 * N, 4 * N * D, 0),
    ]
    for centred in (False, True):
        with_centre = shape + (", centred" if centred else "")
        constants = {"CENTRED": centred, "BLOCK_K": 32, "BLOCK_D": 32}
        found.append(Specimen(centre_codes_kernel, with_centre, constants, 4 * (2 * K * D + K), 3 * K * D, 0))
        for aligned in (False, True):
            found.append(
                Specimen(
                    vq_search_fwd_kernel,
                    with_centre + (", aligned" if aligned else ""),
                    {
                        "CENTRED": centred,
                        "ALIGNED": aligned,
                        "BLOCK_N": config.block_n,
                        "BLOCK_K": config.block_k,
                        "BLOCK_D": config.block_d,
                    },
                    4 * (N * D + K * D + 2 * N),
                    2 * N * K,
                    2 * N * K * D,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            )
    for level in (0, 1):
        for block_d in (16, 64):
            constants = {"LEVEL": level, "BLOCK_R": _SEGMENT_ROWS, "BLOCK_D": block_d}
            rows = N if level == 0 else 2 * K
            found.append(
                Specimen(segment_sum_kernel, f"{rows:,} x {block_d}", constants, 4 * rows * block_d, rows * block_d, 0)
            )
    return found

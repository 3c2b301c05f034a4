"""Triton kernels of deterministic sums by code: rows are sorted by code and added in their order.

sums_k = sum over rows i with code(i) = k of value_i. The rows of a code are split into segments, which are summed in
parallel (by a kernel of the caller, or `segment_sum_kernel`) and then added in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout

SEGMENT_ROWS = 32

# Rows times codes up to which each program searches the codes of all rows for its own: one launch. Beyond, torch sorts.
MAX_SEARCHED = 1 << 30


@triton.jit(do_not_specialize=["N", "G", "row_stride", "group_stride", "length"])
def order_by_code_kernel(
    codes_ptr,  # code of row n in codebook g at n row_stride + g group_stride, of any integer type; below 0: none
    counts32_ptr,  # [sum K] int32 rows of each code
    offsets_ptr,  # [5, G] int32
    sorted_rows_ptr,  # [G, N] int32 rows by ascending code, written where SEARCH
    item_code_ptr,  # [items] int32 code of a segment, -1 for none
    item_first_ptr,  # [items] int32 first sorted position of the segment
    item_last_ptr,  # [items] int32 one past its last position
    first_item_ptr,  # [sum K] int32 first segment of each code
    N,
    G,
    row_stride,
    group_stride,
    length,  # rows of a segment
    SEARCH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of BLOCK_K codes in ascending order, and their segments.

    Segments of code k start at item k + floor(first sorted position / length): at least ceil(n_k / length) items later
    the next code starts, so that no program needs the number of segments of other codes.
    """
    g = tl.program_id(1)
    first_k = tl.program_id(0) * BLOCK_K
    K = tl.load(offsets_ptr + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    k = first_k + tl.arange(0, BLOCK_K)
    in_codes = k < K
    counts = tl.load(counts32_ptr + first_code + k, mask=in_codes, other=0)  # [BLOCK_K]
    earlier = tl.zeros([BLOCK_N], dtype=tl.int32)
    last = tl.minimum(first_k, K)  # programs beyond the last code of a small codebook have no codes
    for first in range(0, last, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        earlier += tl.load(counts32_ptr + first_code + j, mask=j < last, other=0)
    start = tl.sum(earlier, axis=0) + tl.cumsum(counts, axis=0) - counts  # [BLOCK_K] first sorted position

    full = N // length  # segments of all rows of a codebook, beside one for each code
    item = k + start // length
    next_item = tl.where(k == K - 1, K + full, k + 1 + (start + counts) // length)
    first_item = first_code + g * full + item
    tl.store(first_item_ptr + first_code + k, first_item, mask=in_codes)
    slots = tl.where(in_codes, next_item - item, 0)
    for first in range(0, tl.max(slots, axis=0), 32):
        s = first + tl.arange(0, 32)
        at = first_item[:, None] + s[None, :]  # [BLOCK_K, 32]
        begin = start[:, None] + s[None, :] * length
        end = (start + counts)[:, None]
        in_slots = s[None, :] < slots[:, None]
        tl.store(item_code_ptr + at, tl.where(begin < end, (first_code + k)[:, None], -1), mask=in_slots)
        tl.store(item_first_ptr + at, begin, mask=in_slots)
        tl.store(item_last_ptr + at, tl.minimum(begin + length, end), mask=in_slots)

    if SEARCH:
        position = g.to(tl.int64) * N + start
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            at = n.to(tl.int64) * row_stride + g.to(tl.int64) * group_stride
            code = tl.load(codes_ptr + at, mask=n < N, other=-1)
            match = (code[None, :] == k[:, None]).to(tl.int32)  # [BLOCK_K, BLOCK_N]
            rank = position[:, None] + tl.cumsum(match, axis=1) - 1
            tl.store(sorted_rows_ptr + rank, tl.broadcast_to(n[None, :], [BLOCK_K, BLOCK_N]), mask=match != 0)
            position += tl.sum(match, axis=1)


@triton.jit(do_not_specialize=["N", "G", "stride"])
def segment_sum_kernel(
    z_ptr,  # [N, sum D], row stride `stride`
    sorted_rows_ptr,  # [G, N] int32
    item_code_ptr,  # [items] int32
    item_first_ptr,  # [items] int32
    item_last_ptr,  # [items] int32
    codebook_of_code_ptr,  # [sum K] int64
    offsets_ptr,  # [5, G] int32
    out_ptr,  # [items, D_max]
    N,
    G,
    stride,
    width,  # D_max
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum over the rows of a segment of z, in order."""
    item = tl.program_id(0).to(tl.int64)
    code = tl.load(item_code_ptr + item)
    if code >= 0:
        g = tl.load(codebook_of_code_ptr + code)
        D = tl.load(offsets_ptr + G + g)
        column = tl.load(offsets_ptr + 3 * G + g)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        first = tl.load(item_first_ptr + item)
        last = tl.load(item_last_ptr + item)
        total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
        for position in range(first, last, BLOCK_R):
            at = position + tl.arange(0, BLOCK_R)
            in_tile = (at < last)[:, None] & (d < D)[None, :]
            row = tl.load(sorted_rows_ptr + g * N + at, mask=at < last, other=0).to(tl.int64)
            value = tl.load(z_ptr + (row * stride + column)[:, None] + d[None, :], mask=in_tile, other=0.0)
            total += value.to(tl.float32)  # [BLOCK_R, BLOCK_D]
        tl.store(out_ptr + item * width + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def add_segments(segments_ptr, first_item, items, d, in_tile, width, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_K, BLOCK_D] sums of the segments first_item, ..., first_item + items - 1 of each code, in order."""
    total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    at = segments_ptr + first_item.to(tl.int64)[:, None] * width + d[None, :]
    for s in range(tl.max(items, axis=0)):
        total += tl.load(at + tl.cast(s, tl.int64) * width, mask=in_tile & (s < items)[:, None], other=0.0)
    return total


@triton.jit(do_not_specialize=["G", "length"])
def code_sum_kernel(
    segments_ptr,  # [items, D_max]
    first_item_ptr,  # [sum K] int32
    counts32_ptr,  # [sum K] int32
    offsets_ptr,  # [5, G] int32
    sums_ptr,  # [sum K D]
    out_counts_ptr,  # [sum K] float32
    G,
    length,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums_k = sum of the segments of code k; counts as float32."""
    g = tl.program_id(1)
    K = tl.load(offsets_ptr + g)
    D = tl.load(offsets_ptr + G + g)
    first_code = tl.load(offsets_ptr + 2 * G + g)
    sums_ptr += tl.load(offsets_ptr + 4 * G + g).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_codes = k < K
    counts = tl.load(counts32_ptr + first_code + k, mask=in_codes, other=0)
    first_item = tl.load(first_item_ptr + first_code + k, mask=in_codes, other=0)
    items = (counts + length - 1) // length
    tl.store(out_counts_ptr + first_code + k, counts.to(tl.float32), mask=in_codes)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        in_tile = in_codes[:, None] & (d < D)[None, :]
        total = add_segments(segments_ptr, first_item, items, d, in_tile, width, BLOCK_K, BLOCK_D)
        tl.store(sums_ptr + k.to(tl.int64)[:, None] * D + d[None, :], total, mask=in_tile)


@dataclass(frozen=True)
class Segments:
    """Rows sorted by code, split into segments of the same code."""

    layout: CodebookLayout
    length: int  # rows of a segment, except the last of a code
    counts: Tensor  # [sum K] int32
    sorted_rows: Tensor  # [G, N] int32 rows by ascending code
    item_code: Tensor  # [items] int32 code of a segment, -1 for none
    item_first: Tensor  # [items] int32 first sorted position
    item_last: Tensor  # [items] int32 one past the last
    first_item: Tensor  # [sum K] int32 first segment of each code

    @classmethod
    def of(cls, codes: Tensor, counts: Tensor, layout: CodebookLayout) -> Segments:
        """The segments of codes [N, G], -1 for none; counts [sum K] int32 must be the numbers of rows of each code."""
        (N, G), device = codes.shape, codes.device
        length = next_power_of_two(4 * N * G // layout.total_codes, 128)
        items = torch.empty(3, layout.total_codes + G * (N // length), dtype=torch.int32, device=device)
        item_code, item_first, item_last = items.unbind(0)
        first_item = torch.empty(layout.total_codes, dtype=torch.int32, device=device)
        search = N * layout.max_codes <= MAX_SEARCHED
        if search:
            sorted_rows = torch.empty(G, N, dtype=torch.int32, device=device)
        else:
            order = codes.t().masked_fill(codes.t() < 0, torch.iinfo(codes.dtype).max)
            sorted_rows = order.sort(dim=1, stable=True).indices.to(torch.int32)
        block_k = 4 if layout.max_codes >= 256 else 1
        order_by_code_kernel[(triton.cdiv(layout.max_codes, block_k), G)](
            codes, counts, codebook_offsets(layout, device), sorted_rows, item_code, item_first, item_last, first_item,
            N, G, codes.stride(0), codes.stride(1), length, SEARCH=search, BLOCK_K=block_k, BLOCK_N=1024, num_warps=4,
        )  # fmt: skip
        return cls(layout, length, counts, sorted_rows, item_code, item_first, item_last, first_item)

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Arguments of the kernels that sum segments."""
        return self.sorted_rows, self.item_code, self.item_first, self.item_last

    @property
    def num_items(self) -> int:
        return len(self.item_code)

    @property
    def block_d(self) -> int:
        """Dimensions per program of the kernels that sum segments."""
        return min(64, next_power_of_two(self.layout.max_dims, 16))

    def new_sums(self) -> Tensor:
        """Empty sums of the segments [items, D_max]."""
        return torch.empty(self.num_items, self.layout.max_dims, dtype=torch.float32, device=self.counts.device)

    def sum_rows(self, z: Tensor) -> Tensor:
        """[items, D_max] sums of the rows of z [N, sum D] of each segment; only segments with a code are written."""
        sums, (N, G) = self.new_sums(), (z.shape[0], self.layout.groups)
        segment_sum_kernel[(self.num_items, triton.cdiv(self.layout.max_dims, self.block_d))](
            z, *self.tables, self.layout.indices(z.device).codebook_of_code, codebook_offsets(self.layout, z.device),
            sums, N, G, z.stride(0), self.layout.max_dims, BLOCK_R=SEGMENT_ROWS, BLOCK_D=self.block_d, num_warps=4,
        )  # fmt: skip
        return sums

    def add(self, segment_sums: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Number of rows of each code [sum K] and their sums [sum K D], from the sums of segments.

        Args:
            segment_sums: [items, D_max].
            out: contiguous float32 tensors that the results are written to.
        """
        layout, device = self.layout, segment_sums.device
        if out is None:
            counts = torch.empty(layout.total_codes, dtype=torch.float32, device=device)
            sums = torch.empty(layout.total_entries, dtype=torch.float32, device=device)
        else:
            counts, sums = out
        code_sum_kernel[(triton.cdiv(layout.max_codes, 16), layout.groups)](
            segment_sums, self.first_item, self.counts, codebook_offsets(layout, device), sums, counts, layout.groups,
            self.length, layout.max_dims, BLOCK_K=16, BLOCK_D=min(32, self.block_d), num_warps=4,
        )  # fmt: skip
        return counts, sums

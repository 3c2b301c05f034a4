"""Triton kernel of deterministic sums by code: rows are sorted by code and added in their order.

sums_k = sum over rows i with code(i) = k of value_i.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from spinlock_fast.kernels._common.launch_helpers import codebook_offsets, next_power_of_two
from spinlock_fast.kernels._common.layout import CodebookLayout

SEGMENT_ROWS = 32


@triton.jit(do_not_specialize=["G", "stride", "out_stride", "items", "limit"])
def segment_sum_kernel(
    values_ptr,  # [rows, ...] with row stride `stride`
    order_ptr,  # [N * G] int64 positions in the flattened codes, sorted by code; read at level 0
    item_code_ptr,  # [items] int64 code of a segment, `limit` for none
    item_first_ptr,  # [items] int64 first sorted position of the segment
    item_last_ptr,  # [items] int64 one past its last position
    codebook_of_code_ptr,  # [sum K] int64
    offsets_ptr,  # [5, G] int32
    first_entries_ptr,  # [sum K] int64; read at level 1
    out_ptr,  # [items, out_stride] at level 0, packed sums [sum K D] at level 1
    G,
    stride,
    out_stride,
    items,
    limit,
    LEVEL: tl.constexpr,  # 0: rows of z -> one row per segment; 1: rows of segments -> packed sums
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum over the rows of a segment of values, in order."""
    item = tl.program_id(0).to(tl.int64)
    code = tl.load(item_code_ptr + item)
    if code < limit:
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
            if LEVEL == 0:
                row = tl.load(order_ptr + at, mask=at < last, other=0) // G
                value = tl.load(values_ptr + (row * stride + column)[:, None] + d[None, :], mask=in_tile, other=0.0)
            else:
                value = tl.load(values_ptr + (at * stride)[:, None] + d[None, :], mask=in_tile, other=0.0)
            total += value.to(tl.float32)
        result = tl.sum(total, axis=0)
        if LEVEL == 0:
            tl.store(out_ptr + item * out_stride + d, result, mask=d < D)
        else:
            tl.store(out_ptr + tl.load(first_entries_ptr + code) + d, result, mask=d < D)


def sum_by_code(codes: Tensor, layout: CodebookLayout, sum_segments: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Number of rows of each code [sum K] and their sums [sum K D], added in a fixed order.

    Rows are sorted by code. The rows of a code are split into segments, which are summed in parallel and then added.

    Args:
        codes: [N, G] int64, -1 for rows that are left out.
        sum_segments: called with (order, code, first, last) of the segments, the output [items, D_max], and the number
            and sizes of blocks. It writes the sum over positions order[first:last] of the flattened codes.
    """
    N, G = codes.shape
    device = codes.device
    index = layout.indices(device)
    total = layout.total_codes
    ids = torch.where(codes < 0, total, codes + index.code_offsets).flatten()
    ids, order = ids.to(torch.int32).sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(total + 1, dtype=torch.int32, device=device))  # [sum K + 1]
    lengths = bounds.diff()
    # A segment has at most `length` rows; a code of many rows has several segments.
    length = next_power_of_two(4 * N * G // total, 128)
    needed = (lengths + length - 1) // length
    ends = needed.cumsum(0)
    items = total + N * G // length
    item = torch.arange(items, device=device)
    code = torch.searchsorted(ends, item, right=True)  # sum K where there is no such segment
    safe = code.clamp(max=total - 1)
    first = bounds[safe] + (item - (ends[safe] - needed[safe])) * length
    last = torch.minimum(first + length, bounds[safe + 1])
    width = layout.max_dims
    block_d = min(64, next_power_of_two(width, 16))
    blocks = triton.cdiv(width, block_d)
    parts = torch.empty(items, width, dtype=torch.float32, device=device)
    sums = torch.zeros(layout.total_entries, dtype=torch.float32, device=device)
    sum_segments((order, code, first, last), parts, blocks, SEGMENT_ROWS, block_d)
    codes_once = torch.arange(total, device=device)
    segment_sum_kernel[(total, blocks)](
        parts, order, codes_once, ends - needed, ends, index.codebook_of_code, codebook_offsets(layout, device),
        index.first_entries, sums, G, width, 0, total, total, LEVEL=1, BLOCK_R=SEGMENT_ROWS, BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    return lengths.to(torch.float32), sums

"""Which Triton kernels serve a group; imported where Triton can run."""

from __future__ import annotations

from torch import Tensor

from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.vq_assign import streamed
from spinlock_fast.kernels.vq_assign import triton as small
from spinlock_fast.kernels.vq_assign.op import MAX_TILE_CODES

backward = small.backward


def assign(
    z: Tensor, codebook: Tensor, layout: CodebookLayout, mask: Tensor | None, centred: bool, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`reference.assign` by kernels: codebooks held in a tile, or streamed."""
    if layout.max_codes > MAX_TILE_CODES:
        return streamed.assign(z, codebook, layout, mask, centred, with_sums)
    return small.assign(z, codebook, layout, mask, centred, with_sums)

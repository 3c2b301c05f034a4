"""Rearranges inputs [b, n, heads * D] into the rows [H, N, D] of each codebook, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeadLayout:
    """With one codebook per head, H = heads and N = b n; with a shared codebook, H = 1 and N = b n heads."""

    heads: int
    separate_codebooks: bool

    @property
    def rows_per_position(self) -> int:
        """Rows of one codebook per input position."""
        return 1 if self.separate_codebooks else self.heads

    def split(self, x: Tensor) -> Tensor:
        """[b, n, heads * D] -> [H, N, D]."""
        if not self.separate_codebooks:
            return x.reshape(1, -1, x.shape[-1] // self.heads)
        return x.reshape(-1, self.heads, x.shape[-1] // self.heads).transpose(0, 1)

    def merge(self, rows: Tensor, batch_shape: Sequence[int]) -> Tensor:
        """[H, N, D] -> [b, n, heads * D]; with k codes per row, [1, N, k, D] -> [b, n, k, D]."""
        if rows.ndim == 4:
            return rows.view(*batch_shape, *rows.shape[2:])
        rows = rows.transpose(0, 1) if self.separate_codebooks else rows
        return rows.reshape(*batch_shape, self.heads * rows.shape[-1])

    def split_codes(self, codes: Tensor) -> Tensor:
        """[b, n] or [b, n, heads] -> [H, N]."""
        return codes.reshape(-1, self.heads).transpose(0, 1) if self.separate_codebooks else codes.reshape(1, -1)

    def merge_codes(self, codes: Tensor, batch_shape: Sequence[int]) -> Tensor:
        """[H, N] -> [b, n] or [b, n, heads]; with k codes per row, [1, N, k] -> [b, n, k]."""
        if codes.ndim == 3:
            return codes.view(*batch_shape, codes.shape[-1])
        codes = codes.transpose(0, 1) if self.separate_codebooks else codes
        return codes.reshape(*batch_shape, self.heads) if self.heads > 1 else codes.reshape(*batch_shape)

    def row_mask(self, mask: Tensor) -> Tensor:
        """[b, n] -> [N]."""
        return mask.flatten().repeat_interleave(self.rows_per_position)

    def to_sequences(self, rows: Tensor, batch_shape: Sequence[int]) -> Tensor:
        """[H, N, D] -> [H, b, n, D], or [1, b heads, n, D]: the layout that vector-quantize-pytorch returns."""
        b, n = batch_shape
        if self.rows_per_position == 1:
            return rows.reshape(rows.shape[0], b, n, rows.shape[-1])
        return rows.view(b, n, self.heads, rows.shape[-1]).transpose(1, 2).reshape(1, b * self.heads, n, rows.shape[-1])

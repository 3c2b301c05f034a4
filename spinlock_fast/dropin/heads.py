"""Channels split over heads: [b, n, heads * D] <-> rows [H, N, D] of each codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """With a codebook per head H = heads and N = b n; else H = 1 and N = b n heads."""

    heads: int
    separate: bool

    @property
    def fold(self) -> int:
        """Rows of a codebook that one position gives."""
        return 1 if self.separate else self.heads

    def split(self, x: Tensor) -> Tensor:
        """[b, n, heads * D] -> [H, N, D]."""
        if not self.separate:
            return x.reshape(1, -1, x.shape[-1] // self.heads)
        return x.reshape(-1, self.heads, x.shape[-1] // self.heads).transpose(0, 1)

    def join(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        """[H, N, D] -> [b, n, heads * D]; with k choices [1, N, k, D] -> [b, n, k, D]."""
        if rows.ndim == 4:
            return rows.view(*positions, *rows.shape[2:])
        return (rows.transpose(0, 1) if self.separate else rows).reshape(*positions, self.heads * rows.shape[-1])

    def split_codes(self, codes: Tensor) -> Tensor:
        """[b, n] or [b, n, heads] -> [H, N]."""
        return codes.reshape(-1, self.heads).transpose(0, 1) if self.separate else codes.reshape(1, -1)

    def join_codes(self, codes: Tensor, positions: Sequence[int]) -> Tensor:
        """[H, N] -> [b, n] or [b, n, heads]; with k choices [1, N, k] -> [b, n, k]."""
        if codes.ndim == 3:
            return codes.view(*positions, codes.shape[-1])
        codes = codes.transpose(0, 1) if self.separate else codes
        return codes.reshape(*positions, self.heads) if self.heads > 1 else codes.reshape(*positions)

    def row_mask(self, mask: Tensor) -> Tensor:
        """[b, n] -> [N]."""
        return mask.flatten().repeat_interleave(self.fold)

    def by_sequence(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        """[H, N, D] -> [H, b, n, D], or [1, b heads, n, D]: the order in which the original returns them."""
        b, n = positions
        if self.fold == 1:
            return rows.reshape(rows.shape[0], b, n, rows.shape[-1])
        return rows.view(b, n, self.heads, rows.shape[-1]).transpose(1, 2).reshape(1, b * self.heads, n, rows.shape[-1])

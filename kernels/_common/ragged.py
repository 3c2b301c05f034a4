"""Groups of different sizes: index tensors between packed rows [sum n] and padded rows [G, n_max], and offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import constant_in_traces, real_tensors
from spinlock_fast.kernels._common.table_cache import TableCache, is_capturing, retain

_offsets: TableCache[Tensor] = TableCache(256)


@dataclass(frozen=True)
class _Indices:
    packed: Tensor  # [sum n] position in the flattened [G * n_max]
    sizes: Tensor  # [G] n, float32
    group: Tensor  # [sum n] group of a row


@constant_in_traces
def _build_indices(sizes: tuple[int, ...], device: torch.device) -> _Indices:
    host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # independent of the default dtype and device
    with real_tensors():
        n = torch.tensor(sizes, **host)
        mask = torch.arange(max(sizes), **host) < n[:, None]
        parts = {
            "packed": mask.flatten().nonzero().flatten(),
            "sizes": n.to(torch.float32),
            "group": torch.repeat_interleave(torch.arange(len(sizes), **host), n),
        }
        return _Indices(**{name: tensor.to(device) for name, tensor in parts.items()})


@dataclass(frozen=True)
class Ragged:
    """Sizes n of G groups of rows (or columns) that are packed one after the other."""

    sizes: tuple[int, ...]
    _cache: dict[torch.device, _Indices] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Ragged:
        return cls(tuple(int(n) for n in sizes))

    def __getstate__(self) -> dict[str, object]:
        return {"sizes": self.sizes, "_cache": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, object]) -> Ragged:
        return self  # immutable

    @property
    def groups(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        return max(self.sizes)

    def indices(self, device: torch.device) -> _Indices:
        """The index tensors on `device`; cached."""
        indices = self._cache.get(device)
        if indices is None:
            indices = self._cache[device] = _build_indices(self.sizes, device)
        if is_capturing(device):
            retain(indices)
        return indices

    def pad_rows(self, rows: Tensor) -> Tensor:
        """[sum n, ...] -> [G, n_max, ...], zero where padded."""
        if self.groups == 1:
            return rows[None]
        padded = rows.new_zeros(self.groups * self.widest, *rows.shape[1:])
        padded.index_copy_(0, self.indices(rows.device).packed, rows)
        return padded.view(self.groups, self.widest, *rows.shape[1:])

    def pack_rows(self, padded: Tensor) -> Tensor:
        """[G, n_max, ...] -> [sum n, ...]."""
        if self.groups == 1:
            return padded[0]
        return padded.flatten(0, 1).index_select(0, self.indices(padded.device).packed)

    def pad_columns(self, columns: Tensor) -> Tensor:
        """[B, sum n] -> [G, B, n_max], zero where padded."""
        if self.groups == 1:
            return columns[None]
        padded = columns.new_zeros(columns.shape[0], self.groups * self.widest)
        padded.index_copy_(1, self.indices(columns.device).packed, columns)
        return padded.view(-1, self.groups, self.widest).transpose(0, 1)

    def pack_columns(self, padded: Tensor) -> Tensor:
        """[G, B, n_max] -> [B, sum n]."""
        if self.groups == 1:
            return padded[0]
        flat = padded.transpose(0, 1).flatten(1)
        return flat.index_select(1, self.indices(padded.device).packed)


def part_offsets(groups: tuple[int, ...], parts: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets of groups that are divided into parts, for kernels; cached.

    Args:
        groups: sizes of G groups.
        parts: sizes of S parts; empty if groups are not divided.
        device: of the result.

    Returns:
        [3 G + 1 + 3 S] int32: size and start of each group, first part of each group and S; size, start and group of
        each part.
    """

    def make() -> Tensor:
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # independent of the default dtype and device
        sizes, part_sizes = torch.tensor(groups, **host), torch.tensor(parts, **host)
        starts, part_starts = sizes.cumsum(0) - sizes, part_sizes.cumsum(0) - part_sizes
        first_part = torch.searchsorted(part_starts, torch.cat([starts, sizes.sum()[None]]))
        group_of_part = torch.searchsorted(first_part[1:], torch.arange(len(parts), **host), right=True)
        table = torch.cat([sizes, starts, first_part, part_sizes, part_starts, group_of_part])
        return table.to(torch.int32).to(device)

    return _offsets.get((groups, parts, device), device, make)

"""Index tensors between packed rows [sum n] and padded rows [G, n_max]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import real_tensors
from spinlock_fast.kernels._common.table_cache import is_capturing, retain


@dataclass(frozen=True)
class _Indices:
    gather: Tensor  # [G * n_max] packed row, 0 where padded
    packed: Tensor  # [sum n] position in the flattened [G * n_max]
    mask: Tensor  # [G, n_max] bool
    sizes: Tensor  # [G] n, float32
    book: Tensor  # [sum n] group of a row


@dataclass(frozen=True)
class Ragged:
    """G groups of n rows (features, outputs, dimensions) each, packed one after the other."""

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
        """The index tensors on `device`, made once."""
        found = self._cache.get(device)
        if found is None:
            with real_tensors():
                found = self._cache[device] = self._build(device)
        if is_capturing(device):
            retain(found)
        return found

    def _build(self, device: torch.device) -> _Indices:
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # whatever the caller's defaults are
        n = torch.tensor(self.sizes, **host)
        mask = torch.arange(self.widest, **host) < n[:, None]
        gather = torch.zeros(mask.shape, **host)
        gather[mask] = torch.arange(self.total, **host)
        parts = {
            "gather": gather.flatten(),
            "packed": mask.flatten().nonzero().flatten(),
            "mask": mask,
            "sizes": n.to(torch.float32),
            "book": torch.repeat_interleave(torch.arange(self.groups, **host), n),
        }
        return _Indices(**{name: tensor.to(device) for name, tensor in parts.items()})

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

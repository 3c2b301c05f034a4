"""Memory layout of a group of G codebooks; codebook g has K_g codes of D_g dimensions.

Packed tensors store the codebooks one after the other:

- latents `z` [N, sum D]: columns of codebook 0, then of codebook 1, ...
- values per code [sum K]: codes of codebook 0, then of codebook 1, ...
- code vectors [sum K_g D_g]: codebook 0 in row-major order, then codebook 1, ...

Padded forms ([G, N, D_max], [G, K_max, D_max]) are used for batched matrix products; padding is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import real_tensors
from spinlock_fast.kernels._common.table_cache import is_capturing, retain


@dataclass(frozen=True, eq=False)
class LayoutIndices:
    """Index tensors of a layout on one device."""

    columns: Tensor  # [G, D_max] column of z; sum D where padded
    column_mask: Tensor  # [G, D_max] bool
    packed_columns: Tensor  # [sum D] position in a flattened [G, D_max]
    codebook_of_column: Tensor  # [sum D] codebook of a column
    entries: Tensor  # [G, K_max, D_max] entry of the packed code vectors; their number where padded
    packed_entries: Tensor  # [sum K D] position in a flattened [G, K_max, D_max]
    code_mask: Tensor  # [G, K_max] bool
    packed_codes: Tensor  # [sum K] position in a flattened [G, K_max]
    codebook_of_code: Tensor  # [sum K] codebook of a code
    code_of_entry: Tensor  # [sum K D] code (0 .. sum K) of a packed entry
    code_offsets: Tensor  # [G] first code of each codebook
    first_entries: Tensor  # [sum K] first packed entry of a code
    num_codes: Tensor  # [G] K_g, float32
    dims: Tensor  # [G] D_g, float32
    hash_factors: Tensor  # [D_max] odd random int64 weights of the hash of a code


@dataclass(frozen=True)
class CodebookLayout:
    """Sizes of a group of codebooks.

    Args:
        num_codes: K_g, at least 1 each.
        dims: D_g, at least 1 each; as many as `num_codes`.

    Raises:
        ValueError: a size below 1, no codebook, or different lengths.
    """

    num_codes: tuple[int, ...]
    dims: tuple[int, ...]
    _cache: dict[torch.device, LayoutIndices] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.num_codes or len(self.num_codes) != len(self.dims):
            raise ValueError(
                f"num_codes and dims must be equally long and not empty, got {len(self.num_codes)} and {len(self.dims)}"
            )
        if min(self.num_codes) < 1 or min(self.dims) < 1:
            raise ValueError(f"every codebook needs at least 1 code and 1 dimension, got {self.num_codes}, {self.dims}")

    @classmethod
    def of(cls, num_codes: Sequence[int], dims: Sequence[int]) -> CodebookLayout:
        """The layout of these sizes, from a cache."""
        return cls.cached(tuple(int(k) for k in num_codes), tuple(int(d) for d in dims))

    @staticmethod
    @lru_cache(maxsize=256)
    def cached(num_codes: tuple[int, ...], dims: tuple[int, ...]) -> CodebookLayout:
        """`of` for tuples: layouts of the same sizes are one object, with one set of index tensors."""
        return CodebookLayout(num_codes, dims)

    def __getstate__(self) -> dict[str, object]:
        return {"num_codes": self.num_codes, "dims": self.dims, "_cache": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, object]) -> CodebookLayout:
        return self  # immutable

    @property
    def groups(self) -> int:
        return len(self.num_codes)

    @cached_property
    def total_codes(self) -> int:
        return sum(self.num_codes)

    @cached_property
    def total_dims(self) -> int:
        return sum(self.dims)

    @cached_property
    def total_entries(self) -> int:
        return sum(k * d for k, d in zip(self.num_codes, self.dims, strict=True))

    @cached_property
    def max_codes(self) -> int:
        return max(self.num_codes)

    @cached_property
    def max_dims(self) -> int:
        return max(self.dims)

    def code_slice(self, g: int) -> slice:
        """Codes of codebook g in tensors [sum K]."""
        start = sum(self.num_codes[:g])
        return slice(start, start + self.num_codes[g])

    def column_slice(self, g: int) -> slice:
        """Columns of codebook g in latents [N, sum D]."""
        start = sum(self.dims[:g])
        return slice(start, start + self.dims[g])

    def entry_slice(self, g: int) -> slice:
        """Entries of codebook g in code vectors [sum K D]."""
        start = sum(k * d for k, d in zip(self.num_codes[:g], self.dims[:g], strict=True))
        return slice(start, start + self.num_codes[g] * self.dims[g])

    def indices(self, device: torch.device) -> LayoutIndices:
        """The index tensors on `device`, cached."""
        indices = self._cache.get(device)
        if indices is None:
            with real_tensors():
                indices = self._cache[device] = self._build(device)
        if is_capturing(device):
            retain(indices)
        return indices

    def _build(self, device: torch.device) -> LayoutIndices:
        G, K, D = self.groups, self.max_codes, self.max_dims
        host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # overrides default types and devices
        k = torch.tensor(self.num_codes, **host)
        d = torch.tensor(self.dims, **host)
        code_mask = torch.arange(K, **host) < k[:, None]
        column_mask = torch.arange(D, **host) < d[:, None]
        entry_mask = code_mask[:, :, None] & column_mask[:, None, :]
        columns = torch.full((G, D), self.total_dims, **host)
        columns[column_mask] = torch.arange(self.total_dims, **host)
        entries = torch.full((G, K, D), self.total_entries, **host)
        entries[entry_mask] = torch.arange(self.total_entries, **host)
        code_ids = torch.zeros(G, K, **host)
        code_ids[code_mask] = torch.arange(self.total_codes, **host)
        flat = LayoutIndices(
            columns=columns,
            column_mask=column_mask,
            packed_columns=column_mask.flatten().nonzero().flatten(),
            codebook_of_column=torch.repeat_interleave(torch.arange(G, **host), d),
            entries=entries,
            packed_entries=entry_mask.flatten().nonzero().flatten(),
            code_mask=code_mask,
            packed_codes=code_mask.flatten().nonzero().flatten(),
            codebook_of_code=torch.repeat_interleave(torch.arange(G, **host), k),
            code_of_entry=code_ids[:, :, None].expand(G, K, D)[entry_mask],
            code_offsets=torch.cumsum(k, 0) - k,
            first_entries=(torch.repeat_interleave(d, k).cumsum(0) - torch.repeat_interleave(d, k)),
            num_codes=k.to(torch.float32),
            dims=d.to(torch.float32),
            hash_factors=torch.randint(-(2**62), 2**62, (D,), generator=torch.Generator("cpu").manual_seed(0), **host)
            * 2
            + 1,
        )
        return LayoutIndices(**{name: tensor.to(device) for name, tensor in vars(flat).items()})

    def pad_columns(self, z: Tensor) -> Tensor:
        """[N, sum D] -> [G, N, D_max]."""
        index = self.indices(z.device)
        padded = torch.cat([z, z.new_zeros(z.shape[0], 1)], 1)[:, index.columns.flatten()]
        return padded.view(z.shape[0], self.groups, self.max_dims).transpose(0, 1)

    def pack_columns(self, padded: Tensor) -> Tensor:
        """[G, N, D_max] -> [N, sum D]."""
        index = self.indices(padded.device)
        flat = padded.transpose(0, 1).reshape(padded.shape[1], self.groups * self.max_dims)
        return flat[:, index.packed_columns]

    def pad_codebook(self, codebook: Tensor) -> Tensor:
        """[sum K D] -> [G, K_max, D_max]."""
        index = self.indices(codebook.device)
        return torch.cat([codebook, codebook.new_zeros(1)])[index.entries]

    def pack_codebook(self, padded: Tensor) -> Tensor:
        """[G, K_max, D_max] -> [sum K D]."""
        return padded.flatten()[self.indices(padded.device).packed_entries]

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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.kernels._common.export import constant_in_traces, real_tensors
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
    # Not cached properties, whose lock (Python 3.11) torch.compile cannot trace.
    total_codes: int = field(init=False, repr=False, compare=False)
    total_dims: int = field(init=False, repr=False, compare=False)
    total_entries: int = field(init=False, repr=False, compare=False)
    max_codes: int = field(init=False, repr=False, compare=False)
    max_dims: int = field(init=False, repr=False, compare=False)
    _cache: dict[torch.device, LayoutIndices] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.num_codes or len(self.num_codes) != len(self.dims):
            raise ValueError(
                f"num_codes and dims must be equally long and not empty, got {len(self.num_codes)} and {len(self.dims)}"
            )
        if min(self.num_codes) < 1 or min(self.dims) < 1:
            raise ValueError(f"every codebook needs at least 1 code and 1 dimension, got {self.num_codes}, {self.dims}")
        self.__dict__.update(
            total_codes=sum(self.num_codes),
            total_dims=sum(self.dims),
            total_entries=sum(k * d for k, d in zip(self.num_codes, self.dims, strict=True)),
            max_codes=max(self.num_codes),
            max_dims=max(self.dims),
        )

    @classmethod
    def of(cls, num_codes: Sequence[int], dims: Sequence[int]) -> CodebookLayout:
        """The layout of these sizes, from a cache."""
        return cls.cached(tuple(int(k) for k in num_codes), tuple(int(d) for d in dims))

    @staticmethod
    @lru_cache(maxsize=256)
    def cached(num_codes: tuple[int, ...], dims: tuple[int, ...]) -> CodebookLayout:
        """`of` for tuples: layouts of the same sizes are one object, with one set of index tensors."""
        return CodebookLayout(num_codes, dims)

    def __reduce__(self) -> tuple[Any, ...]:
        return CodebookLayout.cached, (self.num_codes, self.dims)

    def __deepcopy__(self, memo: dict[int, object]) -> CodebookLayout:
        return self  # immutable

    @property
    def groups(self) -> int:
        return len(self.num_codes)

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
            indices = self._cache[device] = _build_indices(self.num_codes, self.dims, device)
        if is_capturing(device):
            retain(indices)
        return indices

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


@constant_in_traces
def _build_indices(num_codes: tuple[int, ...], dims: tuple[int, ...], device: torch.device) -> LayoutIndices:
    with real_tensors():
        host = _host_indices(CodebookLayout.cached(num_codes, dims))
        return LayoutIndices(**{name: tensor.to(device) for name, tensor in vars(host).items()})


def _host_indices(layout: CodebookLayout) -> LayoutIndices:
    G, K, D = layout.groups, layout.max_codes, layout.max_dims
    host: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}  # overrides default types and devices
    k = torch.tensor(layout.num_codes, **host)
    d = torch.tensor(layout.dims, **host)
    code_mask = torch.arange(K, **host) < k[:, None]
    column_mask = torch.arange(D, **host) < d[:, None]
    entry_mask = code_mask[:, :, None] & column_mask[:, None, :]
    columns = torch.full((G, D), layout.total_dims, **host)
    columns[column_mask] = torch.arange(layout.total_dims, **host)
    entries = torch.full((G, K, D), layout.total_entries, **host)
    entries[entry_mask] = torch.arange(layout.total_entries, **host)
    code_ids = torch.zeros(G, K, **host)
    code_ids[code_mask] = torch.arange(layout.total_codes, **host)
    return LayoutIndices(
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
        num_codes=k.to(torch.float32),
        dims=d.to(torch.float32),
        hash_factors=torch.randint(-(2**62), 2**62, (D,), generator=torch.Generator("cpu").manual_seed(0), **host) * 2
        + 1,
    )

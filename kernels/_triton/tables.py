"""The offset table of a group of codebooks, as kernels read it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.table_cache import TableCache

_tables: TableCache[Tensor] = TableCache(256)


def book_table(layout: CodebookLayout, device: torch.device) -> Tensor:
    """[5, G] int32 on `device`: K_g, D_g, first code, first column, first entry. Made once per layout."""

    def make() -> Tensor:
        check_offsets("the packed codebooks", layout.total_entries)
        codes = torch.tensor(layout.num_codes, device="cpu")
        dims = torch.tensor(layout.dims, device="cpu")
        entries = codes * dims
        rows = [codes, dims, *(size.cumsum(0) - size for size in (codes, dims, entries))]
        return torch.stack(rows).to(torch.int32).to(device)

    return _tables.get((layout.num_codes, layout.dims, device), device, make)


@cache
def capability(device: torch.device) -> int:
    """10 times the compute capability of a CUDA device; 90 elsewhere (the interpreter)."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_offsets(what: str, entries: int) -> None:
    """Raises ValueError for memory whose places do not fit the 32 bits that kernels count the entries of weights in.

    Rows are counted in 64 bits.
    """
    if entries >= 2**31:
        raise ValueError(f"{what}: {entries:,} entries; Triton kernels serve fewer than 2**31")


def power_of_two(n: int, least: int) -> int:
    """The smallest power of two that holds n, at least `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())

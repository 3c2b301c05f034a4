"""What launchers of Triton kernels share: the offsets of a group of codebooks, checks of sizes, tile sizes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.table_cache import TableCache

_offsets: TableCache[Tensor] = TableCache(256)


def codebook_offsets(layout: CodebookLayout, device: torch.device) -> Tensor:
    """[5, G] int32 on `device`: K_g, D_g, first code, first column and first entry of each codebook; cached."""

    def make() -> Tensor:
        check_int32_offsets("the packed codebooks", layout.total_entries)
        codes = torch.tensor(layout.num_codes, device="cpu")
        dims = torch.tensor(layout.dims, device="cpu")
        entries = codes * dims
        rows = [codes, dims, *(size.cumsum(0) - size for size in (codes, dims, entries))]
        return torch.stack(rows).to(torch.int32).to(device)

    return _offsets.get((layout.num_codes, layout.dims, device), device, make)


@cache
def compute_capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; 90 for the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_int32_offsets(name: str, entries: int) -> None:
    """Raises ValueError if offsets into `entries` entries overflow int32, which kernels use within weights.

    Offsets of rows are int64.
    """
    if entries >= 2**31:
        raise ValueError(f"{name}: {entries:,} entries, Triton kernels support fewer than 2**31")


def next_power_of_two(n: int, minimum: int) -> int:
    """The smallest power of two that is at least n and at least `minimum`."""
    return max(minimum, 1 << max(n - 1, 0).bit_length())

"""64-bit hash keys of raw rows, by which a checkpoint recognises its training rows in any file."""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_MAX_VALUES = 512  # values hashed per row; evenly spaced in a longer row
_NAN_BITS = 0x7FC00000


def row_keys(raw: Tensor, family: str) -> Tensor:
    """[B] int64 keys of raw rows [B, ...] of one family; the key of a row is the sum over its families modulo 2^64.

    A multilinear hash (Carter and Wegman 1979) of the float32 bits of at most 512 evenly spaced values. Independent of
    the device and of the division of rows into files and blocks. All NaN are equal.
    """
    flat = raw.to(torch.float32).flatten(1)
    places, factors = (part.to(flat.device) for part in _multipliers(family, math.prod(raw.shape[1:])))
    chosen = flat[:, places]
    bits = torch.where(torch.isnan(chosen), _NAN_BITS, chosen.view(torch.int32)).to(torch.int64)
    keys: Tensor = (bits * factors).sum(1)
    return keys


@lru_cache(maxsize=64)
def _multipliers(family: str, width: int) -> tuple[Tensor, Tensor]:
    places = np.unique(np.linspace(0, width - 1, min(width, _MAX_VALUES)).astype(np.int64))
    generator = np.random.default_rng([zlib.crc32(family.encode()), 0x6B6579])
    factors = generator.integers(-(2**63), 2**63 - 1, len(places), dtype=np.int64) | 1
    return torch.from_numpy(places), torch.from_numpy(factors)

"""Vector quantizers."""

from spinlock_fast.quantize.grouped import GroupedVectorQuantizer
from spinlock_fast.quantize.sizing import commitment_weight, resolve_levels, size_codebooks

__all__ = ["GroupedVectorQuantizer", "commitment_weight", "resolve_levels", "size_codebooks"]

"""Vector quantizers."""

from spinlock_fast.quantize.grouped import GroupedVectorQuantizer
from spinlock_fast.quantize.sizing import resolve_levels, size_codebooks

__all__ = ["GroupedVectorQuantizer", "resolve_levels", "size_codebooks"]

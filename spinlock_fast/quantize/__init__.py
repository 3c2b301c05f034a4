"""Vector quantizers."""

from spinlock_fast.quantize.grouped import GroupedVectorQuantizer
from spinlock_fast.quantize.sizing import commitment_weight, dead_code_threshold, resolve_levels, size_codebooks

__all__ = ["GroupedVectorQuantizer", "commitment_weight", "dead_code_threshold", "resolve_levels", "size_codebooks"]

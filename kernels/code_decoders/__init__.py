"""Partial decoders, which reconstruct the features from one codebook each: evaluated once per code, not per row."""

from spinlock_fast.kernels.code_decoders.op import code_statistics, decode_codes, partial_loss
from spinlock_fast.kernels.code_decoders.reference import Decoders

__all__ = ["Decoders", "code_statistics", "decode_codes", "partial_loss"]

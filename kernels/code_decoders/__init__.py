"""Decoders that see one code each, evaluated once per code instead of once per row."""

from spinlock_fast.kernels.code_decoders.op import code_statistics, decode_codes, partial_loss
from spinlock_fast.kernels.code_decoders.reference import Decoders

__all__ = ["Decoders", "code_statistics", "decode_codes", "partial_loss"]

"""Compatibility with other projects: quantizer and checkpoints of the original project, and pretrained codebooks."""

from spinlock_fast.compat.codecs import FactorizedResidualVQ, SplitResidualVQ
from spinlock_fast.compat.vector_quantizer import VectorQuantizer

__all__ = ["FactorizedResidualVQ", "SplitResidualVQ", "VectorQuantizer"]

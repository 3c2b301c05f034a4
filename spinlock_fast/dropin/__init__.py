"""Quantizers that take the place of those of vector-quantize-pytorch; see docs/drop-in.md."""

from spinlock_fast.dropin.grouped import GroupedResidualVQ
from spinlock_fast.dropin.residual import ResidualVQ
from spinlock_fast.dropin.vector_quantize import VectorQuantize

__all__ = ["GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]

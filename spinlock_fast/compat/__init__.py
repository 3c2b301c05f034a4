"""Ways in from other projects: the original's quantizer and checkpoints, and the quantizers of trained models."""

from spinlock_fast.compat.codecs import FactorizedResidualVQ, SplitResidualVQ
from spinlock_fast.compat.vector_quantizer import VectorQuantizer

__all__ = ["FactorizedResidualVQ", "SplitResidualVQ", "VectorQuantizer"]

"""Ways in for users of the original project: its quantizer's interface and its checkpoints."""

from spinlock_fast.compat.vector_quantizer import VectorQuantizer

__all__ = ["VectorQuantizer"]

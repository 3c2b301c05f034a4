"""Residual quantization: a stack of codebooks, each for what the ones before left over; one stage is plain VQ."""

from spinlock_fast.kernels.residual_vq.op import ResidualAssignment, residual_vq

__all__ = ["ResidualAssignment", "residual_vq"]

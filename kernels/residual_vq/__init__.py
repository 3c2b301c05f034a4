"""Residual vector quantization: each stage quantizes the residual of the stages before; one stage is plain VQ."""

from spinlock_fast.kernels.residual_vq.op import ResidualAssignment, residual_vq

__all__ = ["ResidualAssignment", "residual_vq"]

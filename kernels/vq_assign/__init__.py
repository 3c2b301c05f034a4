"""Nearest code of every row in every codebook of a group, with the sums that training needs."""

from spinlock_fast.kernels.vq_assign.op import Assignment, lookup, quantize, vq_assign

__all__ = ["Assignment", "lookup", "quantize", "vq_assign"]

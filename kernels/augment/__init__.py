"""Rows of a batch, mixed with each other and with noise."""

from spinlock_fast.kernels.augment.op import augmented_rows

__all__ = ["augmented_rows"]

"""Mixup and noise for the rows of a batch."""

from spinlock_fast.kernels.augment.op import augmented_rows

__all__ = ["augmented_rows"]

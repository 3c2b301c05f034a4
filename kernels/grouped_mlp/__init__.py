"""Two-layer networks of many groups at once, with gradients written by hand."""

from spinlock_fast.kernels.grouped_mlp.op import grouped_mlp

__all__ = ["grouped_mlp"]

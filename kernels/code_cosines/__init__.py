"""Mean squared cosine between the codes of each codebook."""

from spinlock_fast.kernels.code_cosines.op import mean_squared_cosine

__all__ = ["mean_squared_cosine"]

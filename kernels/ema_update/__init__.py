"""Moving-average update of all codebooks of a group, usage statistics, dead-code reset."""

from spinlock_fast.kernels.ema_update.op import code_usage, ema_update

__all__ = ["code_usage", "ema_update"]

"""Moving-average update of all codebooks of a group, usage figures, dead-code reset."""

from spinlock_fast.kernels.ema_update.op import (
    code_usage,
    ema_update,
    perplexity,
    reset_dead_codes,
    utilization,
)

__all__ = ["code_usage", "ema_update", "perplexity", "reset_dead_codes", "utilization"]

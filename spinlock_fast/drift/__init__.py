"""Whether rows are still those that the vocabulary of a checkpoint was made for."""

from spinlock_fast.drift.compare import monitor

__all__ = ["monitor"]

"""Named descriptors of the behaviour of simulated fields; see docs/features.md for their definitions."""

from spinlock_fast.descriptors.describe import Families, describe

__all__ = ["Families", "describe"]

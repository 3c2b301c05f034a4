"""Settings of a run: schema, YAML reading, error messages, and random streams of the seed."""

from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]

"""Settings of a run: the schema, reading them from YAML, and the random streams that follow from the seed."""

from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import RunConfig

__all__ = ["RunConfig", "load_config"]

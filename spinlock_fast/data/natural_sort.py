"""Natural order of file names."""

from __future__ import annotations

import re
from typing import Any


def natural_sort_key(text: str) -> list[Any]:
    """Sorts numbers in names by their value: shard_10 after shard_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]

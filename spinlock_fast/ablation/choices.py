"""Suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest_or_all(name: str, allowed: Sequence[str]) -> str:
    """The allowed names, the nearest one first where there is one."""
    close = difflib.get_close_matches(name, allowed, 1)
    listed = f"choose from {', '.join(allowed)}"
    return f"did you mean {close[0]}? ({listed})" if close else listed

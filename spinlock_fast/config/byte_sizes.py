"""Sizes in bytes as text, such as "1.25GB"."""

from __future__ import annotations

import re

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BYTE_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: object) -> int:
    """Number of bytes of an integer or of a text such as "1.25GB" or "512 MiB"; raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        number, unit = float(value), ""
    elif isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?i?b?)\s*", value, re.IGNORECASE)
    ):
        number, unit = float(match[1]), match[2].lower()
    else:
        raise ValueError("expected a size such as 1.25GB, 512MiB or a number of bytes")
    if unit not in _BYTE_UNITS:
        raise ValueError("expected a size such as 1.25GB, 512MiB or a number of bytes")
    size = number * _BYTE_UNITS[unit]
    if not 1 <= size < 2**63:
        raise ValueError("expected a size above zero and below 8 EiB")
    return int(size)

"""The data inside of an explorer page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any

import numpy as np


def unpack(page: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and columns of the text of a page."""
    found = re.search(r'id="data">([^<]*)</script>', page)
    assert found
    data = gzip.decompress(base64.b64decode(found[1]))
    length = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + length])
    columns = {
        name: np.frombuffer(data, f"<{kind}", count, 4 + length + offset)
        for name, (kind, offset, count) in header["columns"].items()
    }
    return header, columns

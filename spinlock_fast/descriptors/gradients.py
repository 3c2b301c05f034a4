"""Descriptors and statistics whose gradient is zero nearly everywhere: counts, and positions of a maximum."""

from __future__ import annotations

import re

# Each is constant while fields change a little, and jumps.
CONSTANT = {
    "spatial_interface_density": "counts pairs of points",
    "spectral_dominant_frequency": "position of the strongest mode",
    "spectral_rolloff": "counts shells of wavenumbers",
    "temporal_settling_time": "counts states",
    "temporal_peak_time": "position of the greatest energy",
    "temporal_dominant_frequency": "position of the strongest frequency",
    "temporal_zero_crossing_rate": "counts crossings",
}
_PATTERN = re.compile(rf"({'|'.join(CONSTANT)})(_[xyz])?(_mean|_std|_cv)?")
_STATISTIC = "dominant_frequency"  # of a time series, see `StatisticsEncoder`


def is_constant(name: str) -> bool:
    """Whether the gradient of a column is zero nearly everywhere.

    Args:
        name: a column of `Families.names`, or a feature made of one: "family::column" or
            "family::column::statistic".
    """
    parts = name.split("::")
    column, statistic = (parts[-2], parts[-1]) if len(parts) == 3 else (parts[-1], "")
    return statistic == _STATISTIC or _PATTERN.fullmatch(column) is not None

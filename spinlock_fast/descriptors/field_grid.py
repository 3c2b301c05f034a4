"""The grid of the fields whose descriptors are in a file of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spinlock_fast.data.input_files import open_file
from spinlock_fast.errors import DataError

GENERATOR = "spinlock-fast extract"  # the attribute `generator` of the files that have these attributes


@dataclass(frozen=True)
class FieldGrid:
    """The arguments of `describe` that gave a file of features.

    Args:
        extents: number of points along each space axis, in the order z, y, x.
        spacing: distance between neighbouring points along each axis.
        periodic: whether each axis is periodic.
        time_step: time between consecutive states.
    """

    extents: tuple[int, ...]
    spacing: tuple[float, ...]
    periodic: tuple[bool, ...]
    time_step: float

    def __post_init__(self) -> None:
        same = len(self.extents) == len(self.spacing) == len(self.periodic)
        positive = all(math.isfinite(step) and step > 0.0 for step in (*self.spacing, self.time_step))
        if not (same and 1 <= len(self.extents) <= 3 and min(self.extents) >= 2 and positive):
            raise DataError(f"not the grid of a field: {self}")

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> FieldGrid | None:
        """The grid that all files of `extract` record; None for other files, and for files of several grids."""
        found = set()
        for path in files:
            with open_file(path) as file:
                attributes = dict(file.attrs)
            if attributes.get("generator") != GENERATOR:
                return None
            try:
                found.add(cls.from_state(attributes))
            except (KeyError, TypeError, ValueError):
                return None
        return found.pop() if len(found) == 1 else None

    def state(self) -> dict[str, Any]:
        """Plain values for `from_state`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FieldGrid:
        """The inverse of `state`; raises DataError, or the error of a wrong entry (see `payload_errors`)."""
        extents, spacing, periodic = (np.asarray(state[name]).ravel() for name in ("extents", "spacing", "periodic"))
        return cls(
            tuple(int(n) for n in extents),
            tuple(float(step) for step in spacing),
            tuple(bool(value) for value in periodic),
            float(state["time_step"]),
        )

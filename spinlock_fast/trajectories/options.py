"""Options that supplement the metadata of trajectory files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spinlock_fast.descriptors.describe import parse_axes
from spinlock_fast.descriptors.geometry import Grid
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.trajectories.samples import space_axes


@dataclass(frozen=True)
class Options:
    """Settings that supplement or override metadata of the files.

    Args:
        dataset: path of the array in an HDF5 file.
        axes: letters of its axes, see `spinlock_fast.descriptors.describe`.
        fields: names of the fields to read, or, of a plain array, names for its channels; None for all.
        spacing: distance of neighbouring points, one value or one per space axis in the order x, y, z.
        time_step: time between states.
        periodic: names of the periodic axes ("xy", "" for none); None: by the files.
        memory_budget: bytes of decoded rows.
        parameters: a CSV or `.npy` file, or a dataset of every file, with the parameters of the simulations.
        initial_fields: also keep the first state of every sample, of its first realization.
    """

    dataset: str | None = None
    axes: str | None = None
    fields: tuple[str, ...] | None = None
    spacing: tuple[float, ...] | None = None
    time_step: float | None = None
    periodic: str | None = None
    memory_budget: int = 1_250_000_000
    initial_fields: bool = False
    parameters: str | None = None

    def letters(self, dimensions: int, name: str) -> list[str]:
        """The letters of `axes`; raises ConfigError where they do not fit an array of so many dimensions."""
        assert self.axes is not None
        if not set(self.axes.lower()) & set("xyz"):
            hint = "a series [N, T, C] without space needs no descriptors: train on it as the dataset of a family"
            raise ConfigError(f"--axes: {self.axes!r} has no space axis; {hint} (docs/trajectories.md)")
        try:
            return parse_axes(self.axes, dimensions, name)
        except ValueError as error:
            raise ConfigError(f"--axes: {error}") from None

    def grid(
        self,
        extents: Sequence[int],
        path: Path,
        spacing: Sequence[float] | None = None,
        periodic: Sequence[bool] | None = None,
    ) -> Grid:
        """The grid of extents in the order z, y, x; the user's spacing and periodic axes replace those of the file."""
        names = space_axes(len(extents))
        if self.spacing is not None:
            if len(self.spacing) not in (1, len(names)):
                raise ConfigError(f"--spacing: {len(self.spacing)} values for {len(names)} space axes of {path}")
            spacing = self.spacing * len(names) if len(self.spacing) == 1 else tuple(reversed(self.spacing))
        if self.periodic is not None:
            if unknown := set(self.periodic) - set(names):
                raise ConfigError(f"--periodic: {path} has no axis {sorted(unknown)[0]!r}, only {', '.join(names)}")
            periodic = [name in self.periodic for name in names]
        try:
            return Grid.of(extents, spacing or 1.0, list(periodic) if periodic is not None else True)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None

    def channel_names(self, count: int, path: Path) -> tuple[str, ...]:
        """Names of the channels of a plain array."""
        if self.fields is None:
            return tuple(f"channel_{i}" for i in range(count))
        if len(self.fields) != count:
            raise ConfigError(f"--fields: {len(self.fields)} names for {count} channels of {path}")
        return self.fields

"""The grid of a field in one, two or three space dimensions, and sums over its Fourier modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

BANDS = 5
_TABLE = 1 << 24  # largest number of modes times sums for which sums are a matrix product
PROBES_PER_AXIS = {1: 64, 2: 8, 3: 4}
AXIS_NAMES = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}


def is_one_value(value: Any) -> bool:
    """Whether a value is a single number, of Python, NumPy or torch."""
    return isinstance(value, (bool, int, float)) or getattr(value, "shape", None) == ()


@dataclass(frozen=True)
class Grid:
    """A uniform grid.

    Args:
        extents: number of points along each axis; one to three axes, each of at least two points.
        spacing: distance between neighbouring points along each axis.
        periodic: whether each axis is periodic. Fields are mirrored at the ends of the other axes.

    Raises:
        ValueError: the three do not have the same length, or a value is out of range.
    """

    extents: tuple[int, ...]
    spacing: tuple[float, ...]
    periodic: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.extents) <= 3:
            raise ValueError(f"fields must have 1, 2 or 3 space dimensions, got {len(self.extents)}")
        for name in ("spacing", "periodic"):
            if len(getattr(self, name)) != len(self.extents):
                raise ValueError(f"{name} must have {len(self.extents)} entries, got {len(getattr(self, name))}")
        if min(self.extents) < 2:
            raise ValueError(f"every space axis must have at least 2 points, got {list(self.extents)}")
        if not all(math.isfinite(step) and step > 0.0 for step in self.spacing):
            raise ValueError(f"spacing must be positive, got {list(self.spacing)}")

    @classmethod
    def of(
        cls,
        extents: Sequence[int],
        spacing: float | Sequence[float] = 1.0,
        periodic: bool | Sequence[bool] = True,
    ) -> Grid:
        """A grid from single values that hold for every axis, or one value per axis."""
        d = len(extents)
        steps = (float(spacing),) * d if is_one_value(spacing) else tuple(map(float, spacing))  # type: ignore[arg-type]
        kinds = (bool(periodic),) * d if is_one_value(periodic) else tuple(map(bool, periodic))  # type: ignore[arg-type]
        return cls(tuple(map(int, extents)), steps, kinds)

    @property
    def dimensions(self) -> int:
        return len(self.extents)

    @property
    def points(self) -> int:
        return math.prod(self.extents)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Names of the axes in the order of `extents`."""
        return AXIS_NAMES[self.dimensions]

    @cached_property
    def sides(self) -> tuple[float, ...]:
        """Length of each side."""
        return tuple(n * step for n, step in zip(self.extents, self.spacing, strict=True))

    @cached_property
    def probes(self) -> tuple[tuple[int, ...], ...]:
        """Indices along each axis at which time series are recorded."""
        count = PROBES_PER_AXIS[self.dimensions]
        return tuple(
            tuple(dict.fromkeys(min(n - 1, int((i + 0.5) * n / count)) for i in range(count))) for n in self.extents
        )


class FourierModes:
    """Wavenumbers and weights of the real transform of fields on a grid.

    A wavenumber is in cycles per longest side. An axis that is not periodic is mirrored: the transform then has twice
    as many points and wavenumbers in steps of half a cycle (the modes of a discrete cosine transform).

    Args:
        grid: the grid of the fields.
        device, dtype: of the fields.
    """

    def __init__(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> None:
        self.grid = grid
        longest = max(grid.sides)
        axes = []
        for i, n in enumerate(grid.extents):
            size = n if grid.periodic[i] else 2 * n
            last = i == grid.dimensions - 1
            f = (torch.fft.rfftfreq if last else torch.fft.fftfreq)(size, 1.0 / size, dtype=torch.float64)
            axes.append(f * longest / grid.sides[i] * (1.0 if grid.periodic[i] else 0.5))
        mesh = torch.meshgrid(*axes, indexing="ij")
        k = torch.stack(mesh).square().sum(0).sqrt()
        size = grid.extents[-1] if grid.periodic[-1] else 2 * grid.extents[-1]
        multiplicity = torch.full_like(k, 2.0)  # a mode and its complex conjugate
        multiplicity[..., 0] = 1.0
        if size % 2 == 0:
            multiplicity[..., -1] = 1.0
        multiplicity.view(-1)[0] = 0.0  # the mean is not a mode
        band = torch.log2(k.clamp(min=1.0)).floor().clamp(max=BANDS - 1).long()
        shell = k.round().long()

        def flat(values: Tensor) -> Tensor:
            return values.reshape(-1).to(device, dtype)

        self.k = [flat(component) for component in mesh]
        self.norm = flat(k)
        self.multiplicity = flat(multiplicity)
        self.band = band.reshape(-1).to(device)
        self.shell = shell.reshape(-1).to(device)
        self.shells = int(shell.max()) + 1
        self.modes = float(multiplicity.sum())
        ones = multiplicity.reshape(-1)
        held = torch.zeros(BANDS, dtype=torch.float64).index_add_(0, band.reshape(-1), ones)
        self.band_modes = held.to(device, dtype)
        self._tables: dict[int, Tensor] = {}  # of the indices of `sum_by`
        self.conjugates = flat(torch.where(_self_conjugate(mesh), 1.0, 2.0))

    def transform(self, fields: Tensor) -> Tensor:
        """Fourier coefficients [B, modes], complex, of fields [B, *space]; their squares add up to the mean square."""
        for i, periodic in enumerate(self.grid.periodic):
            if not periodic:
                fields = torch.cat([fields, fields.flip(1 + i)], 1 + i)
        axes = tuple(range(1, 1 + self.grid.dimensions))
        coefficients: Tensor = torch.fft.rfftn(fields, dim=axes, norm="forward")
        return coefficients.flatten(1)

    def sum_by(self, values: Tensor, index: Tensor, count: int) -> Tensor:
        """[B, count] sums of values [B, modes], each mode with its multiplicity, by the index of each mode."""
        if len(index) * count > _TABLE:
            out = torch.zeros(values.shape[0], count, dtype=values.dtype, device=values.device)
            return out.index_add(1, index, values * self.multiplicity)
        key = id(index)
        if key not in self._tables:
            with torch.inference_mode(False):  # autograd may save it
                members = torch.nn.functional.one_hot(index, count).to(self.multiplicity)
                self._tables[key] = members * self.multiplicity[:, None]
        return values @ self._tables[key]


def _self_conjugate(mesh: Sequence[Tensor]) -> Tensor:
    """Whether a mode of the half spectrum is its own conjugate: every component is 0 or the Nyquist frequency."""
    own = torch.ones(mesh[0].shape, dtype=torch.bool)
    for i, component in enumerate(mesh):
        size = component.shape[i]
        index = torch.arange(size)
        even = index == (size - 1 if i == len(mesh) - 1 else size / 2)
        line = (index == 0) | even
        own &= line.view([-1 if j == i else 1 for j in range(len(mesh))])
    return own

"""Descriptors of a batch of fields at once, for gradients: every operation treats all samples of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spinlock_fast.descriptors.any_grid import Series, StateDescriptors
from spinlock_fast.descriptors.describe import (
    Families,
    aggregate,
    arranged,
    by_axis,
    space_order,
    time_powers,
)
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.descriptors.geometry import FourierModes, Grid
from spinlock_fast.descriptors.names import DescriptorNames, Groups
from spinlock_fast.descriptors.registry import STATISTICS, names
from spinlock_fast.descriptors.trajectory import describe_trajectories
from spinlock_fast.errors import DataError

_AT_ONCE = {"cpu": 1 << 20}  # field values that are described at once
_AT_ONCE_ELSEWHERE = 1 << 26
_ROUNDING = 16.0  # times the resolution of the type
_UNIT_POWERS = {"1": 0.0, "u": 1.0, "u^2": 2.0}
_DEFAULT_AXES = {1: "x", 2: "y x", 3: "z y x"}


@dataclass(frozen=True)
class _Tables:
    """What depends on the grid, the channels, the device and the type alone."""

    names: DescriptorNames
    modes: FourierModes
    state_scale: Tensor  # factors from time steps to time units
    trajectory_scale: Tensor
    state_units: Tensor  # [D] power of the field's unit in the unit of a column; NaN: a unit with lengths


class BatchDescriber:
    """`describe` for training: equal up to rounding, without host synchronisation, differentiable.

    Args:
        recorded: the grid of the features that a tokenizer was trained on; its values are the defaults.
        axes, spacing, periodic, time_step: as in `describe`. By default the axes are n t c and space, or n m t c and
            space, by the number of axes of the fields and of the recorded grid.

    Raises:
        ValueError: `axes`, `spacing`, `periodic` or `time_step` do not fit the fields (when called).
        DataError: the fields do not have the recorded number of points, and `spacing` is not given (when called).
    """

    def __init__(
        self,
        recorded: FieldGrid | None = None,
        axes: str | None = None,
        spacing: float | Sequence[float] | None = None,
        periodic: bool | Sequence[bool] | None = None,
        time_step: float | None = None,
    ) -> None:
        self.recorded, self.axes, self.spacing, self.periodic = recorded, axes, spacing, periodic
        step = time_step if time_step is not None else 1.0 if recorded is None else recorded.time_step
        if not 0.0 < step < float("inf"):
            raise ValueError(f"time_step must be positive, got {step}")
        self.time_step = float(step)
        self._tables: dict[tuple[Grid, int, torch.device, torch.dtype], _Tables] = {}

    def __call__(self, fields: Tensor) -> Families:
        """{"summary": [N, S], "temporal": [N, T, D]} of fields with the axes of `axes`.

        A sample is NaN, and has gradient zero, if one of its values is not finite or one of its descriptors overflows.
        """
        if not fields.is_floating_point():
            raise DataError(f"fields: expected a tensor of floating-point numbers, got {fields.dtype}")
        axes = self.axes or self._default_axes(fields.ndim)
        values = arranged(fields, axes, "fields")  # [N, M, T, C, *space]
        if values.shape[2] < 2:
            raise ValueError(f"axis t has {values.shape[2]} state: at least 2 are needed")
        grid = self._grid(values.shape[4:], space_order(axes))
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        sample = max(1, values[:1].numel())
        rows = max(1, _AT_ONCE.get(values.device.type, _AT_ONCE_ELSEWHERE) // sample)
        tables = self._tables_of(grid, values.shape[3], values.device, dtype)
        found = tables.names
        parts = [self._describe(part, grid, tables) for part in values.to(dtype).split(rows)]
        temporal, summary = (torch.cat(column) for column in zip(*parts, strict=True))
        statistics = STATISTICS if values.shape[1] > 1 else STATISTICS[:1]
        of_trajectory = names(found.trajectory)
        columns = [f"{name}_{statistic}" for statistic in statistics for name in of_trajectory]
        return Families(
            {"summary": summary, "temporal": temporal}, {"summary": columns, "temporal": names(found.state)}
        )

    def _describe(self, values: Tensor, grid: Grid, tables: _Tables) -> tuple[Tensor, Tensor]:
        """temporal [N, T, D], summary [N, S] of values [N, M, T, C, *space]."""
        N, M, T = values.shape[:3]
        kept: list[Tensor] = []  # [N], known after the descriptors
        if values.requires_grad:
            # The gradient of a sample that overflows is 0 times infinity.
            values = values.view_as(values)
            values.register_hook(lambda grad: torch.where(_like(kept[0], grad), grad, 0.0))
        finite = torch.isfinite(values.detach()).flatten(1).all(1)
        states = torch.where(_like(finite, values), values, 0.0).flatten(0, 1).transpose(0, 1).contiguous()
        found, modes = tables.names, tables.modes
        describer = StateDescriptors(grid, found.scales, values.device, values.dtype, modes=modes)
        series = _without_rounding(describer.block(states), tables.state_units)  # N M trajectories
        per_state = series.state.double().view(T, N, M, -1).mean(2).transpose(0, 1)
        temporal = (per_state * tables.state_scale).to(values.dtype)
        each = describe_trajectories(series, found).double() * tables.trajectory_scale
        summary = aggregate(each.to(values.dtype).view(N, M, -1))
        kept.append(finite & torch.isfinite(temporal).flatten(1).all(1) & torch.isfinite(summary).all(1))
        out = [torch.where(_like(kept[0], family), family, torch.nan) for family in (temporal, summary)]
        return out[0], out[1]

    def _default_axes(self, ndim: int) -> str:
        space = len(self.recorded.extents) if self.recorded is not None else ndim - 3
        lead = {3: "n t c", 4: "n m t c"}.get(ndim - space)
        if lead is None or space not in _DEFAULT_AXES:
            raise ValueError(f"fields has {ndim} axes: name them, such as axes='n t c y x'")
        return f"{lead} {_DEFAULT_AXES[space]}"

    def _grid(self, extents: Sequence[int], order: Sequence[str]) -> Grid:
        recorded = self.recorded
        if recorded is not None and self.spacing is None and tuple(extents) != recorded.extents:
            sizes = [" x ".join(map(str, points)) for points in (extents, recorded.extents)]
            raise DataError(f"the fields have {sizes[0]} points, those of the tokenizer {sizes[1]}: give `spacing`")
        spacing = 1.0 if recorded is None else recorded.spacing
        periodic = True if recorded is None else recorded.periodic
        if self.spacing is not None:
            spacing = by_axis(self.spacing, order, "spacing")
        if self.periodic is not None:
            periodic = by_axis(self.periodic, order, "periodic")
        return Grid.of(extents, spacing, periodic)

    def _tables_of(self, grid: Grid, channels: int, device: torch.device, dtype: torch.dtype) -> _Tables:
        key = (grid, channels, device, dtype)
        if key not in self._tables:
            found = DescriptorNames.of(grid, channels)
            with torch.inference_mode(False):  # tensors that autograd may save
                of_state, of_trajectory = (self._scale(g).to(device) for g in (found.state, found.trajectory))
                units = [_UNIT_POWERS.get(f.unit, torch.nan) for group in found.state.values() for f in group]
                powers = torch.tensor(units, dtype=dtype, device=device)
                modes = FourierModes(grid, device, dtype)
                self._tables[key] = _Tables(found, modes, of_state, of_trajectory, powers)
        return self._tables[key]

    def _scale(self, groups: Groups) -> Tensor:
        powers = torch.tensor(time_powers(groups), dtype=torch.float64)
        return torch.pow(self.time_step, powers)


def _without_rounding(series: Series, powers: Tensor) -> Series:
    """The same values; what varies in time by no more than rounding errors has the gradient of its mean alone.

    Statistics such as a trend do not depend on the scale of a series: their gradient at a conserved quantity, or at a
    steady state, is the inverse of rounding errors.

    Args:
        powers: see `_Tables.state_units`.
    """
    rms = series.energy.detach().mean(0).sqrt()  # [B]
    natural = (rms[:, None] ** powers).nan_to_num(nan=0.0)  # [B, D]
    moving = series.activity.detach().amax(0) > _ROUNDING * torch.finfo(rms.dtype).eps * rms
    return Series(
        state=_level_gradient(series.state, natural),
        energy=_level_gradient(series.energy),
        activity=_level_gradient(series.activity, rms),
        velocity=torch.where(moving[:, None], series.velocity, series.velocity.detach()),
        norms=_level_gradient(series.norms),
        probes=_level_gradient(series.probes, rms[:, None, None]),
    )


def _level_gradient(values: Tensor, scale: Tensor | None = None) -> Tensor:
    """values [T, ...] with the gradient of their mean over time where they vary by rounding errors of `scale` [...].

    The scale is at least the largest value.
    """
    level = values.mean(0)
    size = values.detach().abs().amax(0)
    size = size if scale is None else torch.maximum(size, scale)
    varies = (values - level).detach().abs().amax(0) > _ROUNDING * torch.finfo(values.dtype).eps * size
    return torch.where(varies, values, values.detach() + (level - level.detach()))


def _like(rows: Tensor, values: Tensor) -> Tensor:
    """rows [N] as [N, 1, ...] with the axes of values."""
    return rows.view(-1, *[1] * (values.ndim - 1))

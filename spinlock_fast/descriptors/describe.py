"""Fields of simulations -> families of named descriptors, as `Tokenizer.encode` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from spinlock_fast.data.input_arrays import to_real_tensor
from spinlock_fast.descriptors.any_grid import StateDescriptors, concatenated, root
from spinlock_fast.descriptors.geometry import AXIS_NAMES, FourierModes, Grid, is_one_value
from spinlock_fast.descriptors.names import DescriptorNames, Groups
from spinlock_fast.descriptors.per_step import StepFeatures, concatenate_series
from spinlock_fast.descriptors.registry import STATISTICS, names
from spinlock_fast.descriptors.spectral import Wavenumbers
from spinlock_fast.descriptors.trajectory import describe_trajectories, trajectory_features
from spinlock_fast.errors import DataError

_BLOCK_NUMBERS = {"cpu": 1 << 20}  # field values that are described at once: of the size of a cache
_BLOCK_NUMBERS_ELSEWHERE = 1 << 24
_FAST_PATH_STEPS = 16  # states of a block of the path for 3 x G x G, as `generate` takes them
_CV_TINY, _CV_MOST = 1e-8, 100.0


class Families(dict[str, Any]):
    """Family name -> values; `names` has the columns of each family.

    temporal [N, T, D] has the descriptors of each state, averaged over realizations. summary [N, S] has those of the
    trajectories: their mean over realizations and, with more than one, standard deviation and coefficient of variation.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, list[str]]) -> None:
        super().__init__(values)
        self.names = dict(names)


class Describer:
    """Describes samples of one shape.

    Args:
        grid: the grid of the fields.
        channels: number of channels.
        time_step: time between consecutive states.
        device: where the fields are.
        dtype: float32 or float64, of the computation.
        differentiable: keep the graph from fields to descriptors.
    """

    def __init__(
        self,
        grid: Grid,
        channels: int,
        time_step: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        differentiable: bool = False,
    ) -> None:
        if not (isinstance(time_step, (int, float, np.number)) and np.isfinite(time_step) and time_step > 0.0):
            raise ValueError(f"time_step must be positive, got {time_step!r}")
        self.grid, self.channels, self.time_step = grid, channels, float(time_step)
        self.device, self.dtype, self.differentiable = torch.device(device), dtype, differentiable
        self.names = DescriptorNames.of(grid, channels)
        self.state_names = names(self.names.state)
        self.trajectory_names = names(self.names.trajectory)
        self._time_factors = {
            name: torch.tensor(time_powers(groups), dtype=torch.float64, device=self.device)
            for name, groups in (("state", self.names.state), ("trajectory", self.names.trajectory))
        }
        square = grid.dimensions == 2 and channels == 3 and grid == Grid.of((grid.extents[0],) * 2)
        # The generator's own kernel: the same definitions, faster, and bit for bit what `generate` writes.
        self._waves = None
        if square and grid.extents[0] % 8 == 0 and dtype == torch.float32 and not differentiable:
            self._waves = Wavenumbers(grid.extents[0], self.device)

    def summary_names(self, realizations: int) -> list[str]:
        """Columns of the summary of so many realizations."""
        statistics = STATISTICS if realizations > 1 else STATISTICS[:1]
        return [f"{name}_{statistic}" for statistic in statistics for name in self.trajectory_names]

    def __call__(self, fields: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Descriptors of one sample.

        Args:
            fields: [M, T, C, *space], on the device.
            initial: [M, C, *space], the state before the first; None where there is none.

        Returns:
            Of the states, averaged over realizations, [T, D]; of the trajectories [M, S]. All NaN if a value of the
            sample is not finite, or a descriptor overflows.
        """
        states = fields.to(self.dtype).transpose(0, 1).contiguous()  # [T, M, C, *space]
        before = None if initial is None else initial.to(self.dtype)
        with nullcontext() if self.differentiable else torch.inference_mode():
            finite = bool(torch.isfinite(states).all()) and (before is None or bool(torch.isfinite(before).all()))
            if not finite:
                T, M = states.shape[:2]
                empty = states.new_full((T, len(self.state_names)), torch.nan)
                return empty, states.new_full((M, len(self.trajectory_names)), torch.nan)
            if self._waves is not None and before is not None:
                state, trajectories = self._fast(states, before)
            else:
                state, trajectories = self._general(states, before)
            per_state = (state.double().mean(1) * self._scale("state")).to(self.dtype)
            trajectories = (trajectories.double() * self._scale("trajectory")).to(self.dtype)
            if not (bool(torch.isfinite(per_state).all()) and bool(torch.isfinite(trajectories).all())):  # overflow
                return torch.full_like(per_state, torch.nan), torch.full_like(trajectories, torch.nan)
            return per_state, trajectories

    @cached_property
    def _modes(self) -> FourierModes:
        with torch.inference_mode(False):  # tensors that autograd may save
            return FourierModes(self.grid, self.device, self.dtype)

    def _scale(self, kind: str) -> Tensor:
        """Factors from time steps to time units."""
        return self.time_step ** self._time_factors[kind]

    def _general(self, states: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        describer = StateDescriptors(self.grid, self.names.scales, self.device, self.dtype, before, self._modes)
        at_once = _BLOCK_NUMBERS.get(self.device.type, _BLOCK_NUMBERS_ELSEWHERE)
        steps = max(1, at_once // states[0].numel())
        series = concatenated([describer.block(block) for block in states.split(steps)])
        return series.state, describe_trajectories(series, self.names)

    def _fast(self, states: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        assert self._waves is not None
        describer = StepFeatures(before, float("inf"), self._waves)
        series = concatenate_series([describer.block(block.contiguous()) for block in states.split(_FAST_PATH_STEPS)])
        return series.features, trajectory_features(series)


def aggregate(trajectories: Tensor) -> Tensor:
    """Statistics over realizations: [..., M, S] -> [..., 3 S], or [..., S] for M = 1."""
    values = trajectories.double()
    mean = values.mean(-2)
    if values.shape[-2] == 1:
        return mean.to(trajectories.dtype)
    std = root((values - mean.unsqueeze(-2)).square().mean(-2))
    variation = (std / (mean.abs() + _CV_TINY)).clamp(max=_CV_MOST)
    return torch.cat([mean, std, variation], -1).to(trajectories.dtype)


def describe(
    fields: ArrayLike | Tensor,
    axes: str = "n t c y x",
    *,
    spacing: float | Sequence[float] = 1.0,
    periodic: bool | Sequence[bool] = True,
    time_step: float = 1.0,
    initial: ArrayLike | Tensor | None = None,
) -> Families:
    """Named descriptors of the behaviour of simulated fields.

    Args:
        fields: real numbers, with the axes that `axes` names. A torch tensor stays on its device; where it requires a
            gradient the descriptors do too.
        axes: one letter for each axis of `fields`: n samples, m realizations, t time, c channels, and the space axes
            x; y x; or z y x. t and x are required, a missing n, m or c counts as one.
        spacing: distance of neighbouring points, one number or one for each space axis in the order of `axes`.
        periodic: whether space is periodic, one value or one for each space axis. An axis that is not is mirrored at
            its ends.
        time_step: time between states. Rates are per unit of time.
        initial: the state before the first one, with the axes of `fields` without t: changes to the first state are
            then described as well.

    Returns:
        {"summary": [N, S], "temporal": [N, T, D]}, NumPy arrays or torch tensors as `fields`, float64 where that is,
        else float32. All of a sample is NaN if one of its values is not finite, or if a descriptor overflows (values
        of about 1e9 and above in float32). See `Families.names`.

    Raises:
        ValueError: `axes`, `spacing`, `periodic` or `time_step` do not fit the fields.
        DataError: the fields are not real numbers.
    """
    given_tensor = isinstance(fields, Tensor)
    differentiable = isinstance(fields, Tensor) and fields.requires_grad and torch.is_grad_enabled()
    values = arranged(fields, axes, "fields")  # [N, M, T, C, *space]
    first = None if initial is None else arranged(initial, axes, "initial", has_time=False)[:, :, 0]
    if first is not None and first.shape != values[:, :, 0].shape:
        raise ValueError(f"initial must be {list(values[:, :, 0].shape)} [n, m, c, space], got {list(first.shape)}")
    N, M, T, C, *extents = values.shape
    if T < 2:
        raise ValueError(f"axis t has {T} state: at least 2 are needed")
    if 0 in (M, C):
        raise ValueError(f"axis {'c' if M else 'm'} has length 0")
    order = space_order(axes)
    grid = Grid.of(extents, by_axis(spacing, order, "spacing"), by_axis(periodic, order, "periodic"))
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    describer = Describer(grid, C, time_step, values.device, dtype, differentiable)
    states, trajectories = [], []
    for i in range(N):
        state, trajectory = describer(values[i], None if first is None else first[i])
        states.append(state)
        trajectories.append(trajectory)
    empty = (T, len(describer.state_names)), (M, len(describer.trajectory_names))
    temporal, per_trajectory = (
        torch.stack(parts) if parts else values.new_zeros((0, *shape), dtype=dtype)
        for parts, shape in zip((states, trajectories), empty, strict=True)
    )
    found = {"summary": aggregate(per_trajectory), "temporal": temporal}
    columns = {"summary": describer.summary_names(M), "temporal": describer.state_names}
    return Families(found if given_tensor else {k: v.numpy() for k, v in found.items()}, columns)


def parse_axes(axes: str, dimensions: int, name: str = "fields") -> list[str]:
    """The letters of `axes`, checked; raises ValueError."""
    letters = list(axes.replace(",", " ").replace(" ", ""))
    space = [letter for letter in letters if letter in "xyz"]
    problem = None
    if unknown := [letter for letter in letters if letter not in ("n", "m", "t", "c", "x", "y", "z")]:
        problem = f"unknown axis {unknown[0]!r}; axes are n, m, t, c, z, y, x"
    elif len(set(letters)) != len(letters):
        problem = "an axis is named twice"
    elif "t" not in letters:
        problem = "axis t is missing"
    elif set(space) not in ({"x"}, {"x", "y"}, {"x", "y", "z"}):
        problem = "the space axes must be x; y x; or z y x"
    elif len(letters) != dimensions:
        problem = f"{len(letters)} axes are named, but {name} has {dimensions}"
    if problem:
        raise ValueError(f"axes {axes!r}: {problem}")
    return letters


def space_order(axes: str) -> list[str]:
    return [letter for letter in axes if letter in "xyz"]


def by_axis(value: Any, given: Sequence[str], name: str) -> Any:
    """Values by axis in the order of `AXIS_NAMES`, from the order of `given`."""
    if is_one_value(value):
        return value
    if isinstance(value, str):  # bool("n") would be true
        raise ValueError(f"{name} must be one value, or one for each of {' '.join(given)}; got {value!r}")
    values = list(value)
    if len(values) != len(given):
        raise ValueError(f"{name} must be one value or {len(given)}, one for each of {' '.join(given)}")
    return [values[given.index(axis)] for axis in AXIS_NAMES[len(given)]]


def arranged(fields: ArrayLike | Tensor, axes: str, name: str, has_time: bool = True) -> Tensor:
    """Fields as [N, M, T, C, *space]; without time, T is 1 and `axes` is read without its t."""
    if isinstance(fields, Tensor):
        if fields.is_complex():
            raise DataError(f"{name}: expected real numbers, got {fields.dtype}")
        values = fields
    else:
        named = "".join(map(str, getattr(fields, "dims", "")))  # of an xarray.DataArray
        given = "".join(axes.replace(",", " ").split())
        if has_time and sorted(named) == sorted(given) and named != given:
            raise ValueError(f"axes {axes!r}: the dimensions of {name} are {' '.join(named)}")
        values = to_real_tensor(fields, name)
    if not has_time:
        values = values[None]
        axes = f"t {axes.replace('t', '')}"
    letters = parse_axes(axes, values.ndim, name)
    space = AXIS_NAMES[sum(letter in "xyz" for letter in letters)]
    missing = [letter for letter in ("n", "m", "c") if letter not in letters]
    values = values.reshape((1,) * len(missing) + tuple(values.shape))
    letters = [*missing, *letters]
    return values.permute([letters.index(axis) for axis in ("n", "m", "t", "c", *space)])


def time_powers(groups: Groups) -> list[float]:
    """For each column the power of the time step that turns a value per step into one per time: -1, 0 or 1."""
    out = []
    for features in groups.values():
        for feature in features:
            out.append(-1.0 if "/step" in feature.unit else 1.0 if feature.unit == "step" else 0.0)
    return out

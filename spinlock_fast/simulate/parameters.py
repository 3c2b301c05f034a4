"""theta: the twelve parameters of an operator, from a scrambled Sobol sequence (Sobol 1967, Owen 1998)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import qmc

from spinlock_fast.simulate.config import Activation, NoiseSchedule, Normalization, ParameterSpace
from spinlock_fast.simulate.initial_conditions import INITIAL_TYPES

PARAMETER_NAMES = (
    "num_layers",
    "base_channels",
    "kernel_size",
    "activation",
    "dropout_rate",
    "noise_scale",
    "noise_correlation",
    "noise_schedule",
    "normalization",
    "update_policy",
    "step_size",
    "initial_condition",
)
POLICIES: tuple[Literal["residual", "convex"], ...] = ("residual", "convex")


@dataclass(frozen=True)
class Theta:
    """The parameters of one operator in their units."""

    index: int
    num_layers: int
    base_channels: int
    kernel_size: int
    activation: Activation
    dropout_rate: float
    noise_scale: float
    noise_correlation: float
    noise_schedule: NoiseSchedule
    normalization: Normalization
    update_policy: Literal["residual", "convex"]
    step_size: float
    initial_condition: str


class ThetaSequence:
    """theta of operator i, determined by the seed and i.

    Args:
        space: ranges and choices of the parameters.
        seed: seed of the scrambling.
    """

    def __init__(self, space: ParameterSpace, seed: int) -> None:
        self.space = space
        self._seed = seed

    def unit(self, start: int, stop: int) -> NDArray[np.float64]:
        """Points start .. stop - 1 of the sequence: [stop - start, 12] in [0, 1)."""
        sobol = qmc.Sobol(len(PARAMETER_NAMES), scramble=True, seed=np.random.default_rng([self._seed, 0]))
        if start:
            sobol.fast_forward(start)
        # scipy warns unless the first draw is a power of two; points do not depend on the number drawn.
        count = 1 << max(stop - start - 1, 0).bit_length()
        return np.asarray(sobol.random(count), dtype=np.float64)[: stop - start]

    def thetas(self, start: int, stop: int) -> list[Theta]:
        """theta of the operators start .. stop - 1."""
        return [self._theta(start + row, point) for row, point in enumerate(self.unit(start, stop))]

    def values(self, theta: Theta) -> NDArray[np.float32]:
        """[12] in the units of the parameters; a choice is its position in the list of choices."""
        row = [self._number(name, getattr(theta, name)) for name in PARAMETER_NAMES]
        return np.array(row, dtype=np.float32)

    def scaled(self, theta: Theta) -> NDArray[np.float32]:
        """[12] in [0, 1]: linear in each range, logarithmic for noise_scale, evenly spaced choices."""
        row = []
        for name in PARAMETER_NAMES:
            value = getattr(theta, name)
            if name in self._choices:
                choices = self._choices[name][0]
                row.append(choices.index(value) / max(len(choices) - 1, 1))
                continue
            number, (low, high) = float(value), getattr(self.space, name)
            if name == "noise_scale":
                number, low, high = np.log(number), np.log(low), np.log(high)
            row.append((number - low) / (high - low) if high > low else 0.0)
        return np.clip(np.array(row, dtype=np.float32), 0.0, 1.0)

    def noise_regime(self, theta: Theta) -> str:
        """low, medium or high: thirds of the logarithmic range of noise_scale."""
        low, high = self.space.noise_scale
        third = 3.0 * np.log(theta.noise_scale / low) / np.log(high / low) if high > low else 1.0
        return ("low", "medium", "high")[min(int(third), 2)]

    @cached_property
    def _choices(self) -> dict[str, tuple[list[Any], list[float]]]:
        """Allowed values of the discrete parameters and their probabilities."""
        space, residual = self.space, self.space.residual_share
        even = {name: getattr(space, name) for name in ("kernel_size", "activation", "noise_schedule", "normalization")}
        choices = {name: (values, [1.0 / len(values)] * len(values)) for name, values in even.items()}
        choices["update_policy"] = (list(POLICIES), [residual, 1.0 - residual])
        choices["initial_condition"] = (list(INITIAL_TYPES), [share for _, share in INITIAL_TYPES.values()])
        return choices

    def _theta(self, index: int, point: NDArray[np.float64]) -> Theta:
        values: dict[str, Any] = {}
        for name, u in zip(PARAMETER_NAMES, point, strict=True):
            if name in self._choices:
                choices, shares = self._choices[name]
                values[name] = choices[min(int(np.searchsorted(np.cumsum(shares), u, side="right")), len(choices) - 1)]
                continue
            low, high = getattr(self.space, name)
            if name in ("num_layers", "base_channels"):
                values[name] = min(low + int(u * (high - low + 1)), high)
            elif name == "noise_scale":
                values[name] = float(np.exp(np.log(low) + u * (np.log(high) - np.log(low))))
            else:
                values[name] = float(low + u * (high - low))
        return Theta(index=index, **values)

    def _number(self, name: str, value: float | str) -> float:
        return float(self._choices[name][0].index(value)) if isinstance(value, str) else float(value)

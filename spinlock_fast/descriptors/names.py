"""Names, units and formulas of the descriptors of fields with any number of space dimensions and channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from spinlock_fast.descriptors import registry
from spinlock_fast.descriptors.geometry import AXIS_NAMES, Grid
from spinlock_fast.descriptors.registry import Feature

Groups = dict[str, tuple[Feature, ...]]

# Dimensionless descriptors that still depend on the grid or on the time step, as they count points or steps.
_GRID = (
    "neighbor_correlation",
    "interface_density",
    "share",
    "anisotropy",
    "flatness",
    "entropy",
    "slope",
    "coherence",
)
_STEP = ("autocorrelation", "roughness", "lag_asymmetry", "granger", "irreversibility", "burstiness")


def changes_with(feature: Feature) -> tuple[str, ...]:
    """What a descriptor changes with: "units" of the field, "grid" and "time step", in this order."""
    parts = feature.unit.replace("^2", "").split("/")
    found = []
    if "u" in parts:
        found.append("units")
    if {"px", "side"} & set(parts) or (any(key in feature.name for key in _GRID) and feature.name != "dominant_share"):
        found.append("grid")
    if "step" in parts or any(key in feature.name for key in _STEP):
        found.append("time step")
    return tuple(found)


@dataclass(frozen=True)
class DescriptorNames:
    """The descriptors of fields with a number of channels on a grid, in the order of their columns.

    Two dimensions and three channels give the descriptors of `spinlock_fast.descriptors.registry`, without the
    group operator_sensitivity.
    """

    dimensions: int
    channels: int
    scales: tuple[int, ...] = registry.SCALES

    @classmethod
    def of(cls, grid: Grid, channels: int) -> DescriptorNames:
        """Of a grid: block means need at least two blocks along every axis."""
        scales = tuple(scale for scale in registry.SCALES if 2 * scale <= min(grid.extents)) or (1,)
        return cls(grid.dimensions, channels, scales)

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of channels."""
        return tuple(combinations(range(self.channels), 2))

    @cached_property
    def state(self) -> Groups:
        """Descriptors of one state."""
        groups = {"spatial": self._spatial, "spectral": self._spectral}
        return groups | ({"cross_channel": self._cross} if self.pairs else {})

    @cached_property
    def trajectory(self) -> Groups:
        """Descriptors of one trajectory: means of those of its states, and those of its time series."""
        groups = {
            "spatial": self._spatial,
            "spectral": self._spectral,
            "temporal": registry.PER_TRAJECTORY["temporal"],
            "cross_channel": tuple(f for f in self._cross if f.name not in self._left_out),
            "causality": tuple(f for f in registry.PER_TRAJECTORY["causality"] if self.pairs or not _of_pairs(f)),
            "invariant_drift": tuple(
                f for f in registry.PER_TRAJECTORY["invariant_drift"] if int(f.name.rpartition("_")[2]) in self.scales
            ),
        }
        return {name: features for name, features in groups.items() if features}

    @property
    def cross_in_summary(self) -> list[int]:
        """Columns of the cross-channel group of a state whose mean over time describes the trajectory."""
        return [i for i, feature in enumerate(self._cross) if feature.name not in self._left_out]

    _left_out = frozenset(
        {"trace", "correlation_max", "correlation_min", "mutual_information_mean", "gradient_alignment"}
    )

    @cached_property
    def _spatial(self) -> tuple[Feature, ...]:
        skip = {"gradient_anisotropy"} if self.dimensions == 1 else set()
        out = []
        for feature in registry.SPATIAL:
            if feature.name in skip:
                continue
            if feature.name == "gradient_anisotropy" and self.dimensions == 3:
                feature = feature._replace(formula="(greatest - least of <gx^2>, <gy^2>, <gz^2>) / <|g|^2>")
            out.append(feature)
        return tuple(out)

    @cached_property
    def _spectral(self) -> tuple[Feature, ...]:
        axes = tuple(reversed(AXIS_NAMES[self.dimensions]))
        out: list[Feature] = []
        for feature in registry.SPECTRAL:
            if feature.name.endswith("_anisotropy"):
                if self.dimensions == 2:
                    out.append(feature)
            elif feature.name.endswith("_y"):
                continue
            elif feature.name.endswith("_x"):
                stem = feature.name[:-2]
                many = axes if self.dimensions > 1 else ()
                out += [
                    feature._replace(name=f"{stem}_{axis}", formula=feature.formula.replace("|kx|", f"|k{axis}|"))
                    for axis in many
                ]
            else:
                out.append(feature)
        return tuple(out)

    @cached_property
    def _cross(self) -> tuple[Feature, ...]:
        if not self.pairs:
            return ()
        C = self.channels
        separator = "" if C <= 10 else "_"
        out: list[Feature] = []
        for feature in registry.CROSS_CHANNEL:
            if feature.name == "eigenvalue_1":
                formula = f"{{}} eigenvalue of the {C} x {C} covariance of channels, in descending order"
                ordinals = ["greatest", *(f"number {i}" for i in range(2, C)), "least"]
                out += [
                    feature._replace(name=f"eigenvalue_{i + 1}", formula=formula.format(ordinals[i])) for i in range(C)
                ]
            elif feature.name.startswith("eigenvalue_"):
                continue
            elif feature.name == "correlation_01":
                out += [
                    feature._replace(
                        name=f"correlation_{i}{separator}{j}", formula=f"correlation of channels {i} and {j}"
                    )
                    for i, j in self.pairs
                ]
            elif feature.name.startswith("correlation_") and feature.name[-2:].isdigit():
                continue
            elif feature.name == "log_condition":
                out.append(feature._replace(formula=f"ln(eigenvalue_1 / eigenvalue_{C}), at most 23"))
            else:
                out.append(feature)
        return tuple(out)


def _of_pairs(feature: Feature) -> bool:
    return feature.name.startswith(("lag_asymmetry", "granger"))

"""Six equations in two dimensions with random parameters, solved by NumPy, or by py-pde where it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trajectory_files import CHANNELS, SPACING

Array = NDArray[np.float64]

STEP = 0.125  # between states; exact in float32, like SPACING
STATES, EXTENTS, SAMPLES = 6, (8, 12), 3  # extents along y, x


@dataclass(frozen=True)
class Equation:
    """du/dt = rate(u, operators, parameters), u [N, C, Y, X] and parameters [N, 1, 1, 1].

    Args:
        pde: the class of py-pde.
        ranges: of the parameters, which are uniformly distributed.
        given: how py-pde names a parameter, where it is not by that name.
        solver_step: of the explicit Euler method.
        channels: number of fields.
        periodic: axes; no flux through the others.
    """

    pde: str
    rate: Callable[[Array, Operators, Mapping[str, Array]], Array]
    ranges: Mapping[str, tuple[float, float]]
    solver_step: float
    given: Mapping[str, str]
    channels: int = 1
    periodic: Sequence[str] = ("x", "y")


class Operators:
    """Differences of second order of fields [..., Y, X]."""

    def __init__(self, periodic: Sequence[str]) -> None:
        self.modes = ["wrap" if axis in periodic else "edge" for axis in ("y", "x")]

    def laplace(self, u: Array) -> Array:
        """d2u/dy2 + d2u/dx2."""
        parts = [self._neighbours(u, i) for i in range(2)]
        return sum((before + after - 2.0 * u) / SPACING[i] ** 2 for i, (before, after) in enumerate(parts))  # type: ignore[return-value]

    def squared_gradient(self, u: Array) -> Array:
        """(du/dy)^2 + (du/dx)^2."""
        parts = [self._neighbours(u, i) for i in range(2)]
        return sum(((after - before) / (2.0 * SPACING[i])) ** 2 for i, (before, after) in enumerate(parts))  # type: ignore[return-value]

    def _neighbours(self, u: Array, i: int) -> tuple[Array, Array]:
        axis = u.ndim - 2 + i
        ends = [(0, 0)] * u.ndim
        ends[axis] = (1, 1)
        padded = np.pad(u, ends, mode=self.modes[i])  # type: ignore[call-overload]
        n = u.shape[axis]
        return np.take(padded, range(n), axis), np.take(padded, range(2, n + 2), axis)


def _wave(u: Array, o: Operators, p: Mapping[str, Array]) -> Array:
    return np.concatenate([u[:, 1:], p["speed"] ** 2 * o.laplace(u[:, :1])], 1)


def _swift_hohenberg(u: Array, o: Operators, p: Mapping[str, Array]) -> Array:
    once = u + o.laplace(u)
    return p["rate"] * u - once - o.laplace(once) + p["delta"] * u**2 - u**3


EQUATIONS = {
    "diffusion": Equation(
        "DiffusionPDE",
        lambda u, o, p: p["diffusivity"] * o.laplace(u),
        {"diffusivity": (0.2, 1.0)},
        0.005,
        {},
        periodic=("x",),
    ),
    "wave": Equation("WavePDE", _wave, {"speed": (0.2, 1.0)}, 0.005, {}, 2),
    "allen_cahn": Equation(
        "AllenCahnPDE",
        lambda u, o, p: p["width"] * o.laplace(u) - u**3 + u,
        {"width": (0.2, 1.0)},
        0.005,
        {"width": "interface_width"},
        periodic=(),
    ),
    "cahn_hilliard": Equation(
        "CahnHilliardPDE",
        lambda u, o, p: o.laplace(u**3 - u - p["width"] * o.laplace(u)),
        {"width": (0.2, 1.0)},
        0.00025,
        {"width": "interface_width"},
    ),
    "kuramoto_sivashinsky": Equation(
        "KuramotoSivashinskyPDE",
        lambda u, o, p: -o.laplace(u + p["nu"] * o.laplace(u)) - 0.5 * o.squared_gradient(u),
        {"nu": (0.2, 1.0)},
        0.00025,
        {},
    ),
    "swift_hohenberg": Equation(
        "SwiftHohenbergPDE",
        _swift_hohenberg,
        {"rate": (0.1, 0.6), "delta": (0.0, 1.0)},
        0.00025,
        {},
    ),
}


def parameters_of(name: str) -> dict[str, Array]:
    """Parameters [N] of the simulations of an equation; float32 values."""
    rng = np.random.default_rng(sorted(EQUATIONS).index(name))
    return {
        key: rng.uniform(low, high, SAMPLES).astype(np.float32).astype(np.float64)
        for key, (low, high) in EQUATIONS[name].ranges.items()
    }


def _starts(name: str) -> Array:
    return np.random.default_rng(7).uniform(-0.5, 0.5, (SAMPLES, EQUATIONS[name].channels, *EXTENTS))


def solve(name: str) -> NDArray[np.float32]:
    """Fields [N, T, C, Y, X] of an equation."""
    equation = EQUATIONS[name]
    operators = Operators(equation.periodic)
    columns = {key: values[:, None, None, None] for key, values in parameters_of(name).items()}
    u = _starts(name)
    states = [u]
    for _ in range(STATES - 1):
        for _ in range(round(STEP / equation.solver_step)):
            u = u + equation.solver_step * equation.rate(u, operators, columns)
        states.append(u)
    return np.stack(states, 1).astype(np.float32)


def solve_with_py_pde(name: str, directory: Path) -> tuple[NDArray[np.float32], list[str]]:
    """Fields [N, T, C, Y, X] of an equation by py-pde, and its files of them, one for each simulation."""
    import pde

    equation, parameters = EQUATIONS[name], parameters_of(name)
    sides = [[0.0, n * h] for n, h in zip(EXTENTS[::-1], SPACING[::-1], strict=True)]
    grid = pde.CartesianGrid(sides, EXTENTS[::-1], periodic=[axis in equation.periodic for axis in ("x", "y")])
    fields, paths = [], []
    for i, start in enumerate(_starts(name)):
        own = {key: float(values[i]) for key, values in parameters.items()}
        solver = getattr(pde, equation.pde)(**{equation.given.get(key, key): value for key, value in own.items()})
        each = [pde.ScalarField(grid, u.T, label=label) for u, label in zip(start, CHANNELS, strict=False)]
        paths.append(str(directory / f"{name}_{i}.h5"))
        storage: Any = pde.FileStorage(paths[-1], info=own)
        end = STEP * (STATES - 1)
        solver.solve(
            each[0] if len(each) == 1 else pde.FieldCollection(each),
            t_range=end,
            dt=equation.solver_step,
            tracker=[storage.tracker(STEP)],
            backend="numpy",
        )
        states = np.stack([state.data.reshape(len(each), *EXTENTS[::-1]) for state in storage])
        storage.close()
        fields.append(states.swapaxes(-1, -2))
    return np.stack(fields).astype(np.float32), paths

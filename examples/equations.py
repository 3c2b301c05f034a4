"""Six equations of py-pde, told apart by their tokens.

    pip install py-pde
    python examples/equations.py simulate --output data/equations --samples 60
    python -m spinlock_fast.extract "data/equations/*.h5" --output data/equations.h5
    python -m spinlock_fast.train configs/trajectories.yaml --set dataset_path=data/equations.h5 \\
        --output checkpoints/equations
    python -m spinlock_fast.tokenize checkpoints/equations data/equations.h5 --output data/equations_tokens.h5
    python examples/equations.py probe data/equations.h5 data/equations_tokens.h5

`simulate` writes one file per equation in the layout of The Well. `probe` fits linear models from tokens (one-hot) to
the equation and to its parameters, and reports how well they do on samples they were not fitted to.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

SIDE, STATES, INTERVAL = 32, 40, 0.5


def equations(rng: np.random.Generator) -> Iterator[tuple[str, Any, dict[str, float], float]]:
    """(name, equation, its parameters, time step of the solver) with random parameters."""
    import pde

    value = rng.uniform(0.2, 1.0)
    yield "diffusion", pde.DiffusionPDE(value), {"diffusivity": value}, 0.05
    value = rng.uniform(0.5, 1.5)
    yield "allen_cahn", pde.AllenCahnPDE(value), {"interface_width": value}, 0.05
    value = rng.uniform(0.6, 1.5)
    yield "cahn_hilliard", pde.CahnHilliardPDE(value), {"interface_width": value}, 0.01
    value = rng.uniform(0.6, 1.4)
    yield "kuramoto_sivashinsky", pde.KuramotoSivashinskyPDE(value), {"nu": value}, 0.01
    rate, delta = rng.uniform(0.1, 0.6), rng.uniform(0.0, 1.0)
    yield "swift_hohenberg", pde.SwiftHohenbergPDE(rate, 1.0, delta), {"rate": rate, "delta": delta}, 0.01
    nu, strength = rng.uniform(0.2, 1.0), rng.uniform(0.2, 1.0)
    yield "kpz", pde.KPZInterfacePDE(nu, strength), {"nu": nu, "lambda": strength}, 0.02


def simulate(output: Path, samples: int, seed: int) -> None:
    """Writes OUTPUT/<equation>.h5, each with so many trajectories of 40 states on 32 x 32 points."""
    import pde

    rng = np.random.default_rng(seed)
    grid = pde.UnitGrid([SIDE, SIDE], periodic=True)
    found: dict[str, list[tuple[np.ndarray[Any, Any], dict[str, float]]]] = {}
    for i in range(samples):
        for name, equation, parameters, step in equations(rng):
            states = pde.MemoryStorage()
            start = pde.ScalarField(grid, rng.uniform(-0.5, 0.5, (SIDE, SIDE)))
            span = INTERVAL * STATES
            equation.solve(start, t_range=span, dt=step, tracker=[states.tracker(INTERVAL)], backend="numpy")
            fields = np.stack([state.data for state in states][:STATES]).astype(np.float32)
            found.setdefault(name, []).append((fields, parameters))
        print(f"{i + 1} of {samples} rounds", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    for name, trajectories in found.items():
        fields = np.stack([fields for fields, _ in trajectories])
        columns = {key: np.array([parameters[key] for _, parameters in trajectories]) for key in trajectories[0][1]}
        write_well(output / f"{name}.h5", name, fields, columns)


def write_well(path: Path, name: str, fields: np.ndarray[Any, Any], parameters: dict[str, Any]) -> None:
    """Scalar fields [N, T, X, Y] as a file of The Well. Parameters are padded to two: files of a set need the same."""
    padded = list(parameters.values())
    padded += [np.zeros(len(fields))] * (2 - len(padded))
    columns = {f"parameter_{i + 1}": values for i, values in enumerate(padded)}
    with h5py.File(path, "w") as file:
        file.attrs.update({"dataset_name": name, "grid_type": "cartesian", "n_spatial_dims": 2})
        file.attrs.update({"n_trajectories": len(fields), "simulation_parameters": []})
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"]
        for axis, values in (("x", np.arange(SIDE)), ("y", np.arange(SIDE)), ("time", np.arange(STATES) * INTERVAL)):
            dimensions[axis] = values.astype(np.float32)
            dimensions[axis].attrs.update({"sample_varying": False, "time_varying": axis == "time"})
        for axis in ("x", "y"):
            group = file.create_group(f"boundary_conditions/{axis}_periodic")
            group.attrs.update({"associated_dims": [axis], "associated_fields": [], "bc_type": "PERIODIC"})
            group.attrs.update({"sample_varying": False, "time_varying": False})
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = list(columns)
        for key, values in columns.items():
            scalars[key] = values.astype(np.float32)
            scalars[key].attrs.update({"sample_varying": True, "time_varying": False})
        group = file.create_group("t0_fields")
        group.attrs["field_names"] = ["u"]
        group.create_dataset("u", data=fields, chunks=(1, *fields.shape[1:]), compression="gzip")
        group["u"].attrs.update({"dim_varying": [True, True], "sample_varying": True, "time_varying": True})


def probe(features: Path, tokens: Path) -> dict[str, float]:
    """Held-out accuracy for the equation, and R2 for its parameters, of linear models on one-hot tokens (5 folds)."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import StratifiedKFold, cross_val_predict, cross_val_score
    from sklearn.preprocessing import OneHotEncoder

    with h5py.File(features) as file:
        names = np.array([Path(path).stem for path in file["metadata/source_files"].asstr()[()]])
        parameters = file["parameters/params"][()]
    with h5py.File(tokens) as file:
        codes = file["tokens"][()]
    x = OneHotEncoder(sparse_output=False, handle_unknown="ignore").fit_transform(codes)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = {"equation": float(cross_val_score(LogisticRegression(max_iter=2000), x, names, cv=folds).mean())}
    for name in np.unique(names):
        rows = names == name
        for i, values in enumerate(parameters[rows].T):
            if values.std() > 0.0:
                predicted = cross_val_predict(Ridge(1.0), x[rows], values, cv=5)
                found[f"{name}, parameter {i + 1}"] = float(1.0 - ((values - predicted) ** 2).mean() / values.var())
    for name, score in found.items():
        print(f"{name}: {'accuracy' if name == 'equation' else 'R2'} {score:.2f}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("simulate", help="write the data set (needs py-pde)")
    making.add_argument("--output", type=Path, required=True)
    making.add_argument("--samples", type=int, default=60, help="trajectories of each equation (60)")
    making.add_argument("--seed", type=int, default=0)
    probing = verbs.add_parser("probe", help="measure what tokens tell of the equation (needs scikit-learn)")
    probing.add_argument("features", type=Path)
    probing.add_argument("tokens", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.verb == "simulate":
        simulate(chosen.output, chosen.samples, chosen.seed)
    else:
        probe(chosen.features, chosen.tokens)


if __name__ == "__main__":
    main()

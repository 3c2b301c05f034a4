"""Operators simulated and trajectories described per second, by one device.

    python -m benchmarks.data.operator_rates --output operators.json [--operators 128] [--device cuda]

Operators are those of configs/data/quickstart.yaml (64 x 64, T = 256, M = 2). "generated": simulation and descriptors,
as in `generate`, without writing. "described": descriptors of the fields of an operator that are on the device, as in
`extract`, one operator at a time and, as `BehaviourLoss` does, a batch at a time. The answer is checked first: against
a CPU the descriptors of states agree up to rounding. Goals: 100 generated and 300 described a second on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.commands import ROOT
from benchmarks.common.timing import time_calls, write
from spinlock_fast.descriptors.batched import BatchDescriber
from spinlock_fast.descriptors.describe import Describer
from spinlock_fast.descriptors.geometry import Grid
from spinlock_fast.simulate.config import GeneratorConfig, load_generator_config
from spinlock_fast.simulate.parameters import ThetaSequence
from spinlock_fast.simulate.rollout import Rollout
from spinlock_fast.simulate.simulator import Simulator

GOALS = {"generated": 100.0, "described": 300.0, "described in batches": 300.0}
_AT_ONCE = 8  # operators whose fields are kept: 25 MB each
_TOLERANCE = 1e-3  # of descriptors of different devices, relative to the largest of a column


def fields_of(config: GeneratorConfig, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """States [n, M, T, 3, G, G] and initial states [n, M, 3, G, G] of operators."""
    states = []
    with torch.inference_mode():
        for theta in ThetaSequence(config.parameters, config.random_seed).thetas(0, count):
            blocks = list(Rollout([theta], config, torch.device("cpu")).blocks())
            states.append(torch.cat([block.flatten(1, 2) for block in blocks]).transpose(0, 1))
    fields = torch.stack(states).clone().to(device)
    return fields, fields[:, :, 0]


def check(found: Tensor, expected: Tensor) -> None:
    """Raises AssertionError where descriptors differ by more than the tolerance."""
    scale = expected.abs().flatten(0, -2).amax(0)
    difference = ((found.cpu() - expected).abs() / scale.clamp(min=1e-6)).flatten(0, -2)
    worst = float(difference.median(0).values.max())
    assert worst <= _TOLERANCE, f"descriptors differ by {worst:.2g} of the largest value of a column"


def rates(device: torch.device, operators: int, steps: int) -> list[dict[str, Any]]:
    """A row for each way."""
    config = load_generator_config(
        ROOT / "configs" / "data" / "quickstart.yaml", {"workers": 1, "num_timesteps": steps}
    )
    simulator = Simulator(config, device)
    fields, initial = fields_of(config, min(operators, _AT_ONCE), device)
    grid = Grid.of(fields.shape[-2:])
    describer, batched = Describer(grid, 3, device=device), BatchDescriber(axes="n m t c y x")
    expected = torch.stack(
        [Describer(grid, 3)(one.cpu(), start.cpu())[0] for one, start in zip(fields, initial, strict=True)]
    )

    def one_by_one() -> Tensor:
        return torch.stack([describer(one, start)[0] for one, start in zip(fields, initial, strict=True)])

    def in_batches() -> Tensor:
        with torch.inference_mode():
            out: Tensor = batched(fields)["temporal"]
        return out

    check(one_by_one(), expected)
    check(in_batches()[:, 1:], expected[:, 1:])  # without the state before the first, its rates are missing
    rows = []
    for name, run, count in (
        ("generated", lambda: simulator.simulate(0, operators), operators),
        ("described", one_by_one, len(fields)),
        ("described in batches", in_batches, len(fields)),
    ):
        times = time_calls(run, device, repeats=5, budget=20.0)
        rate = count / (times["p50_us"] / 1e6)
        rows.append({"what": name, "operators": count, **times, "per_second": rate, "goal": GOALS[name]})
        sys.stdout.write(f"{name:22} {rate:8.1f} a second (goal on a GPU: {GOALS[name]:.0f})\n")
    return rows


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", required=True)
    options.add_argument("--operators", type=int, default=128)
    options.add_argument("--steps", type=int, default=256, help="states of a trajectory; goals are for 256")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = options.parse_args()
    write(chosen.output, rates(torch.device(chosen.device), chosen.operators, chosen.steps), chosen.device)


if __name__ == "__main__":
    main()

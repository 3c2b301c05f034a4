"""Simulated operators per second, and the time of the simulation's parts.

pytest benchmarks/data/bench_generate.py --benchmark-only
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.common.commands import ROOT
from spinlock_fast.descriptors.per_step import StepFeatures, StepSeries, concatenate_series
from spinlock_fast.descriptors.spectral import Wavenumbers
from spinlock_fast.descriptors.trajectory import trajectory_features
from spinlock_fast.simulate.config import GeneratorConfig, load_generator_config
from spinlock_fast.simulate.noise import NoiseSource
from spinlock_fast.simulate.parameters import Theta, ThetaSequence
from spinlock_fast.simulate.rollout import Rollout
from spinlock_fast.simulate.simulator import Simulator

OPERATORS = 8
CPU = torch.device("cpu")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
QUICKSTART = ROOT / "configs" / "data" / "quickstart.yaml"


@pytest.fixture(scope="module")
def config() -> GeneratorConfig:
    return load_generator_config(QUICKSTART, {"workers": 1})


@pytest.fixture(scope="module")
def thetas(config: GeneratorConfig) -> list[Theta]:
    return ThetaSequence(config.parameters, config.random_seed).thetas(0, OPERATORS)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", DEVICES)
def bench_operators(benchmark: BenchmarkFixture, config: GeneratorConfig, device: str) -> None:
    """Whole operators in one process; `operators_per_second` is their number divided by the median time."""
    count = OPERATORS if device == "cpu" else 128
    simulator = Simulator(config, torch.device(device))
    first = simulator.simulate(0, 1)
    rows = benchmark.pedantic(simulator.simulate, args=(0, count), rounds=3, warmup_rounds=1)
    assert np.array_equal(rows.temporal[0], first.temporal[0])
    assert np.isfinite(rows.temporal).all()
    benchmark.extra_info |= {"operators": count, "operators_per_second": count / benchmark.stats["median"]}


@torch.inference_mode()
def bench_rollout(benchmark: BenchmarkFixture, config: GeneratorConfig, thetas: list[Theta]) -> None:
    """Networks, noise and state updates, without features."""

    def run() -> list[torch.Tensor]:
        return [list(Rollout([theta], config, CPU).blocks())[-1] for theta in thetas]

    last = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(states).all() for states in last)


@torch.inference_mode()
def bench_noise(benchmark: BenchmarkFixture, config: GeneratorConfig, thetas: list[Theta]) -> None:
    """Correlated noise and dropout masks only."""

    def run() -> float:
        total = 0.0
        for theta in thetas:
            shape = (theta.num_layers - 1, theta.base_channels)
            source = NoiseSource(
                [theta], 0, config.num_realizations, config.grid_size, config.num_timesteps, shape, CPU
            )
            total += sum(float(source.block(i)[0].abs().max()) for i in range(config.num_timesteps // 16))
        return total

    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1) > 0.0


@pytest.fixture(scope="module")
def states(config: GeneratorConfig, thetas: list[Theta]) -> list[list[torch.Tensor]]:
    with torch.inference_mode():
        return [[block.flatten(1, 2) for block in Rollout([theta], config, CPU).blocks()] for theta in thetas]


def step_series(config: GeneratorConfig, states: list[list[torch.Tensor]]) -> list[StepSeries]:
    """Features and series of every step, one item per operator."""
    waves = Wavenumbers(config.grid_size, CPU)
    series = []
    for blocks in states:
        steps = StepFeatures(blocks[0][0], config.clip, waves)
        series.append(concatenate_series([steps.block(block) for block in blocks]))
    return series


@torch.inference_mode()
def bench_step_features(benchmark: BenchmarkFixture, config: GeneratorConfig, states: list[list[torch.Tensor]]) -> None:
    """The 63 features of every state, and the per-step series."""
    series = benchmark.pedantic(step_series, (config, states), rounds=3, warmup_rounds=1)
    energy = torch.cat(states[0]).square().mean((2, 3, 4))
    assert torch.allclose(series[0].energy, energy, rtol=1e-4)


@torch.inference_mode()
def bench_trajectory_features(
    benchmark: BenchmarkFixture, config: GeneratorConfig, states: list[list[torch.Tensor]]
) -> None:
    """The 110 features of every trajectory, from the per-step series."""
    series = step_series(config, states)
    features = benchmark.pedantic(lambda: [trajectory_features(s) for s in series], rounds=3, warmup_rounds=1)
    assert all(torch.isfinite(values).all() for values in features)

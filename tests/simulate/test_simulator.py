"""Simulated rows do not depend on batches and workers, depend on each parameter, and are finite on divergence."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch
from helpers import threads
from processes import forkserver

from spinlock_fast.descriptors.registry import temporal_names, trajectory_names
from spinlock_fast.errors import SpinlockFastError
from spinlock_fast.simulate import simulator as simulator_module
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.operators import OperatorTile, draw_weights
from spinlock_fast.simulate.parameters import Theta
from spinlock_fast.simulate.rollout import Rollout
from spinlock_fast.simulate.simulator import Rows, Simulator

CPU = torch.device("cpu")
SMALL = GeneratorConfig(grid_size=32, num_timesteps=64, num_realizations=2, random_seed=3)

BASE = Theta(
    index=5,
    num_layers=3,
    base_channels=6,
    kernel_size=3,
    activation="tanh",
    dropout_rate=0.05,
    noise_scale=0.2,
    noise_correlation=1.0,
    noise_schedule="constant",
    normalization="none",
    update_policy="residual",
    step_size=0.2,
    initial_condition="structured",
)


def assert_same(a: Rows, b: Rows) -> None:
    for name, value in vars(a).items():
        assert np.array_equal(value, getattr(b, name), equal_nan=value.dtype.kind == "f"), name


@pytest.fixture(scope="module")
def sensitivity() -> Rows:
    return Simulator(SMALL.model_copy(update={"workers": 1}), CPU).simulate(0, 10)


def test_shapes_and_values(sensitivity: Rows) -> None:
    assert sensitivity.fields.shape == (10, 3, 32, 32)
    assert sensitivity.temporal.shape == (10, 64, 63)
    assert sensitivity.trajectories.shape == (10, 2, 120)
    assert sensitivity.fields.dtype == sensitivity.temporal.dtype == sensitivity.trajectories.dtype == np.float32
    assert np.isfinite(sensitivity.temporal).all()
    assert np.isfinite(sensitivity.trajectories[:, :, :110]).all()
    assert np.isnan(sensitivity.trajectories[:, :, 110:]).all()


def test_the_data_do_not_depend_on_workers_batches_or_where_one_starts(
    sensitivity: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator_module, "_MIN_TILES_PER_WORKER", 5)
    simulator = Simulator(SMALL.model_copy(update={"workers": 2, "batch_operators": 5}), CPU)
    assert_same(simulator.simulate(0, 10), sensitivity)
    assert_same(simulator.simulate(6, 9), Rows(*(value[6:9] for value in vars(sensitivity).values())))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers start within milliseconds; test_the_data_do_not_depend_on_workers_... spawns them."""
    monkeypatch.setattr(simulator_module, "get_context", lambda method: forkserver())


@pytest.mark.usefixtures("forked_workers")
def test_a_dead_worker_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_module, "_MIN_TILES_PER_WORKER", 5)
    stream = Simulator(SMALL.model_copy(update={"workers": 2}), CPU).stream(0, 200)
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(SpinlockFastError, match="a worker process died"):
        list(stream)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_stream_ends_early(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_module, "_MIN_TILES_PER_WORKER", 5)
    done: list[int] = []
    simulator = Simulator(SMALL.model_copy(update={"workers": workers}), CPU)
    stream = simulator.stream(0, 200, lambda: len(done) >= 3)
    done.extend(map(len, stream))
    assert done == [1, 1, 1]


def test_the_callers_thread_count_neither_changes_the_data_nor_is_changed(sensitivity: Rows) -> None:
    with threads(2):
        assert_same(Simulator(SMALL, CPU).simulate(0, 2), Rows(*(value[:2] for value in vars(sensitivity).values())))
        assert torch.get_num_threads() == 2


def test_a_tile_wider_than_the_range_is_cut_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(simulator_module.TILE, "cpu", 4)
    simulator = Simulator(SMALL, CPU)
    whole = simulator.simulate(0, 8)
    # Tiles hold fixed indices: asking for less, from elsewhere, changes no bit.
    assert_same(simulator.simulate(3, 6), Rows(*(value[3:6] for value in vars(whole).values())))


def test_seed_and_realizations_matter(sensitivity: Rows) -> None:
    other = Simulator(SMALL.model_copy(update={"random_seed": 4}), CPU).simulate(0, 1)
    assert not np.allclose(other.fields[0], sensitivity.fields[0])
    one = Simulator(SMALL.model_copy(update={"num_realizations": 1}), CPU).simulate(0, 2)
    assert one.trajectories[:, 0, :110] == pytest.approx(sensitivity.trajectories[:2, 0, :110], rel=1e-3, abs=1e-3)
    assert not np.allclose(sensitivity.trajectories[:, 0, :110], sensitivity.trajectories[:, 1, :110])


def test_temporal_is_the_mean_over_realizations_and_summary_the_mean_over_time(sensitivity: Rows) -> None:
    shared = [i for i, name in enumerate(trajectory_names()) if name.startswith(("spatial", "spectral"))]
    assert [trajectory_names()[i] for i in shared] == temporal_names()[: len(shared)]
    assert sensitivity.trajectories[:, :, shared].mean(1) == pytest.approx(
        sensitivity.temporal[:, :, : len(shared)].mean(1), rel=1e-3, abs=1e-4
    )


CHANGES = {
    "num_layers": 4,
    "base_channels": 8,
    "kernel_size": 5,
    "activation": "relu",
    "dropout_rate": 0.3,
    "noise_scale": 0.02,
    "noise_correlation": 5.0,
    "noise_schedule": "decaying",
    "normalization": "layer",
    "update_policy": "convex",
    "step_size": 0.4,
    "initial_condition": "localized",
}


@pytest.fixture(scope="module")
def base_features() -> np.ndarray:
    return Simulator(SMALL, CPU).simulate_tile([BASE]).trajectories[0, :, :110]


@pytest.mark.parametrize("name", list(CHANGES))
def test_each_parameter_moves_features(name: str, base_features: np.ndarray) -> None:
    changed = dataclasses.replace(BASE, **{name: CHANGES[name]})
    features = Simulator(SMALL, CPU).simulate_tile([changed]).trajectories[0, :, :110]
    apart = np.abs(features.mean(0) - base_features.mean(0))
    spread = features.std(0) + base_features.std(0) + 0.02 * np.abs(base_features.mean(0)) + 1e-3
    assert (apart > 3 * spread).sum() >= 3


def test_change_of_a_parameter_changes_its_features() -> None:
    simulator = Simulator(SMALL.model_copy(update={"gain": 1e-3}), CPU)  # hardly a network: the noise itself shows

    def features(**changes: object) -> dict[str, float]:
        theta = dataclasses.replace(BASE, update_policy="convex", step_size=0.5, noise_scale=0.3, **changes)  # type: ignore[arg-type]
        values = simulator.simulate_tile([theta]).trajectories[0].mean(0)
        return dict(zip(trajectory_names(), values.tolist(), strict=True))

    short, long = features(noise_correlation=0.0), features(noise_correlation=4.0)
    assert abs(short["spatial_neighbor_correlation"]) < 0.1
    assert long["spatial_neighbor_correlation"] > 0.9
    assert long["spectral_centroid"] < 0.4 * short["spectral_centroid"]
    # u <- u / 2 + noise is an autoregression with r(1) = 1/2
    assert short["temporal_autocorrelation_1"] == pytest.approx(0.5, abs=0.06)
    assert abs(short["temporal_activity_trend"]) < 0.3
    decaying = features(noise_schedule="decaying")
    assert decaying["temporal_activity_trend"] < -0.7  # of exp(-4 t / T)
    # 1 + sin has a mean square of 3/2, and its period of 32 steps is a peak of E
    periodic = features(noise_schedule="periodic")
    assert periodic["temporal_energy_variability"] > 3 * short["temporal_energy_variability"]


def test_padding_in_a_tile_changes_nothing_but_rounding() -> None:
    thetas = Simulator(SMALL, CPU).sequence.thetas(0, 12)
    assert len({(t.num_layers, t.base_channels, t.kernel_size, t.normalization, t.activation) for t in thetas}) > 8
    u = torch.randn(2, 12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = OperatorTile(thetas, 3, 2.0, CPU)
    mask = torch.ones(2, 12, together.hidden_layers, together.channels)
    out = together(u, mask)
    for i, theta in enumerate(thetas):
        alone = OperatorTile([theta], 3, 2.0, CPU)(u[:, i : i + 1], None)
        assert torch.allclose(out[:, i], alone[:, 0], atol=1e-4, rtol=1e-4), theta


def test_network_matches_the_formula() -> None:
    theta = dataclasses.replace(BASE, normalization="layer", activation="gelu", kernel_size=5, base_channels=8)
    u = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 2, 8)
    h = u[:, 0].double()
    layers = draw_weights(theta, 3, 2.0)
    for depth, (weight, bias) in enumerate(layers):
        h = torch.nn.functional.pad(h, (2, 2, 2, 2), mode="circular")
        h = torch.nn.functional.conv2d(h, weight.double(), bias.double())
        if depth < len(layers) - 1:
            h = torch.nn.functional.group_norm(h, 1, eps=1e-3)
            h = torch.nn.functional.gelu(h) * mask[:, 0, depth, :, None, None]
    assert torch.allclose(OperatorTile([theta], 3, 2.0, CPU)(u, mask)[:, 0].double(), h, atol=1e-4)


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "sine"])
@pytest.mark.parametrize("kind", ["none", "instance"])
def test_activations_and_instance_normalization(name: str, kind: str) -> None:
    theta = dataclasses.replace(BASE, num_layers=2, normalization=kind, activation=name)  # type: ignore[arg-type]
    u = torch.randn(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (w1, b1), (w2, b2) = draw_weights(theta, 3, 2.0)
    functions = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "tanh": torch.tanh, "sine": torch.sin}

    def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    h = convolve(u[:, 0], w1, b1)
    h = torch.nn.functional.instance_norm(h, eps=1e-3) if kind == "instance" else h
    expected = convolve(functions[name](h), w2, b2)
    assert torch.allclose(OperatorTile([theta], 3, 2.0, CPU)(u, None)[:, 0], expected, atol=1e-4)


def test_weights_are_those_of_seed_and_index_with_the_gain() -> None:
    first, again, other = (draw_weights(dataclasses.replace(BASE, index=i), 3, 2.0) for i in (5, 5, 6))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    many = torch.cat([draw_weights(dataclasses.replace(BASE, index=i), 3, 2.0)[1][0] for i in range(50)])
    # the squares over a fan-in add up to gain^2
    assert many.square().sum((1, 2, 3)).mean().item() == pytest.approx(4.0, rel=0.1)


def test_one_step_is_the_formula() -> None:
    for policy in ("residual", "convex"):
        theta = dataclasses.replace(BASE, update_policy=policy)  # type: ignore[arg-type]
        rollout = Rollout([theta], SMALL, CPU)
        u = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        f = OperatorTile([theta], SMALL.random_seed, SMALL.gain, CPU)(u, None)
        v = u + 0.2 * f
        expected = v / (1 + 2 * SMALL.confinement * 0.2 * v**2).sqrt() if policy == "residual" else 0.8 * u + 0.2 * f
        assert torch.allclose(rollout.step(u), expected, atol=1e-5)


def test_a_diverging_operator_is_clipped_flagged_and_finite() -> None:
    wild = dataclasses.replace(BASE, activation="relu", update_policy="convex", step_size=0.6)
    config = SMALL.model_copy(update={"gain": 6.0})
    rows = Simulator(config, CPU).simulate_tile([wild])
    assert rows.diverged.tolist() == [True]
    assert np.isfinite(rows.temporal).all()
    assert np.isfinite(rows.trajectories[:, :, :110]).all()
    names = temporal_names()
    assert rows.temporal[0, :, names.index("spatial_max")].max() <= config.clip
    assert rows.temporal[0, :, names.index("spatial_min")].min() >= -config.clip
    assert Simulator(SMALL, CPU).simulate_tile([BASE]).diverged.tolist() == [False]


def test_operator_sensitivity_fills_the_ten_columns(sensitivity: Rows) -> None:
    rows = Simulator(SMALL.model_copy(update={"operator_sensitivity": True}), CPU).simulate(0, 3)
    assert np.isfinite(rows.trajectories).all()
    assert np.array_equal(rows.trajectories[:, :, :110], sensitivity.trajectories[:3, :, :110])
    assert (rows.trajectories[:, :, 110:117] > 0).all()
    assert len(np.unique(rows.trajectories[:, :, 110])) == 6


def test_the_default_space_is_neither_dead_nor_diverged() -> None:
    rows = Simulator(SMALL.model_copy(update={"workers": 1}), CPU).simulate(0, 32)
    std = rows.temporal[:, -1, temporal_names().index("spatial_std")]
    assert rows.diverged.mean() < 0.2
    assert (std > 0.05).mean() > 0.8
    spread = rows.trajectories[:, :, :110].mean(1).std(0)
    assert (spread > 1e-6).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_rows_in_any_range_and_the_same_weights_and_fields(sensitivity: Rows) -> None:
    simulator = Simulator(SMALL, torch.device("cuda"))
    rows = simulator.simulate(0, 10)
    assert_same(simulator.simulate(4, 7), rows.select(slice(4, 7)))
    assert np.array_equal(rows.fields, sensitivity.fields)
    assert np.isfinite(rows.temporal).all()

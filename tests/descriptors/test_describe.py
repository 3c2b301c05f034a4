"""Descriptors of fields of any shape: names, known values, equality with the generator's, gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import raises_one_line

from spinlock_fast.descriptors import describe
from spinlock_fast.descriptors.any_grid import StateDescriptors
from spinlock_fast.descriptors.geometry import FourierModes, Grid
from spinlock_fast.descriptors.names import DescriptorNames, changes_with
from spinlock_fast.descriptors.per_step import StepFeatures
from spinlock_fast.descriptors.registry import CROSS_CHANNEL, SPATIAL, names, temporal_names, trajectory_names
from spinlock_fast.descriptors.spectral import Wavenumbers
from spinlock_fast.errors import DataError
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.parameters import ThetaSequence
from spinlock_fast.simulate.rollout import Rollout
from spinlock_fast.simulate.simulator import Simulator

CPU = torch.device("cpu")


def smooth(*shape: int, space: int, seed: int = 0) -> torch.Tensor:
    """Random smooth periodic fields, float64; the last `space` axes are the grid."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random, dtype=torch.float64)
    dims = tuple(range(-space, 0))
    f = torch.fft.fftn(x, dim=dims)
    k2 = sum((torch.fft.fftfreq(shape[d], 1.0 / shape[d]) ** 2).view(-1, *[1] * (-d - 1)) for d in dims)
    return 3.0 * torch.fft.ifftn(f * torch.exp(-k2 / 20.0), dim=dims).real


def column(families: Any, family: str, name: str) -> Any:
    return families[family][..., families.names[family].index(name)]


def test_names_of_two_dimensions_and_three_channels_are_those_of_the_generator() -> None:
    found = DescriptorNames.of(Grid.of((64, 64)), 3)
    assert names(found.state) == temporal_names()
    assert names(found.trajectory) == trajectory_names()[:110]


def test_fields_of_the_generator_give_the_bits_of_its_file() -> None:
    config = GeneratorConfig(operators=2, grid_size=64, num_timesteps=64, num_realizations=2, workers=1)
    rows = Simulator(config, CPU).simulate(0, 2)
    thetas = ThetaSequence(config.parameters, config.random_seed).thetas(0, 2)
    states, first = [], []
    for theta in thetas:
        rollout = Rollout([theta], config, CPU)
        with torch.inference_mode():
            states.append(torch.cat(list(rollout.blocks()))[:, :, 0])
        first.append(rollout.initial.expand(2, -1, -1, -1))
    fields = torch.stack(states).transpose(1, 2)  # [N, M, T, C, G, G]
    found = describe(fields, "n m t c y x", initial=torch.stack(first))
    assert np.array_equal(found["temporal"].numpy(), rows.temporal)
    from spinlock_fast.simulate.simulator import aggregate

    expected = aggregate(rows.trajectories[:, :, :110])
    assert np.array_equal(found["summary"].numpy(), expected)


def test_descriptors_of_any_grid_have_the_definitions_of_the_generator() -> None:
    states = smooth(7, 2, 3, 32, 32, space=2).cumsum(0)
    states = states + 0.3 * torch.randn(states.shape, generator=torch.Generator().manual_seed(2), dtype=states.dtype)
    initial, states = states[0], states[1:]
    found = DescriptorNames.of(Grid.of((32, 32)), 3)
    general = StateDescriptors(Grid.of((32, 32)), found.scales, CPU, torch.float64, initial).block(states)
    own = StepFeatures(initial.float(), float("inf"), Wavenumbers(32, CPU)).block(states.float().contiguous())
    for name in ("energy", "activity", "norms", "probes"):
        torch.testing.assert_close(getattr(own, name).double(), getattr(general, name), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.velocity.double(), general.velocity.flip(2), rtol=1e-3, atol=1e-4)
    # In float32 the logarithm of rounding errors enters the geometric mean of flatness.
    kept = [i for i, name in enumerate(temporal_names()) if name != "spectral_flatness"]
    torch.testing.assert_close(own.features[..., kept].double(), general.state[..., kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 9, 17), "n t x"),
        ((2, 2, 2), "n t x"),
        ((3, 12, 2, 16, 24), "n t c y x"),
        ((3, 12, 16, 24, 2), "n t y x c"),
        ((2, 3, 6, 1, 5, 7), "n m t c y x"),
        ((2, 5, 4, 6, 8, 10), "n t c z y x"),
        ((7, 9, 11), "t y x"),
        ((4, 9, 11, 11), "c t y x"),
    ],
)
@pytest.mark.parametrize("periodic", [True, False])
def test_any_shape_gives_finite_named_columns(shape: tuple[int, ...], axes: str, periodic: bool) -> None:
    space = sum(letter in "xyz" for letter in axes)
    fields = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = describe(fields, axes, periodic=periodic)
    N = shape[axes.split().index("n")] if "n" in axes else 1
    T = shape[axes.split().index("t")]
    assert found["temporal"].shape == (N, T, len(found.names["temporal"]))
    assert found["summary"].shape == (N, len(found.names["summary"]))
    for family in found:
        assert torch.isfinite(found[family]).all()
        assert len(set(found.names[family])) == len(found.names[family])
    assert any(name.endswith("gradient_anisotropy") for name in found.names["temporal"]) == (space > 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_give_nearly_the_same_descriptors(dtype: torch.dtype) -> None:
    fields = smooth(2, 8, 2, 16, 16, space=2).to(dtype)
    found, exact = describe(fields, "n t c y x"), describe(fields.double(), "n t c y x")
    assert found["temporal"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    kept = [i for i, name in enumerate(found.names["temporal"]) if "flatness" not in name]
    torch.testing.assert_close(
        found["temporal"][..., kept].double(), exact["temporal"][..., kept], rtol=2e-3, atol=1e-4
    )


def test_numpy_gives_numpy() -> None:
    fields = smooth(2, 6, 1, 12, space=1).numpy()
    found = describe(fields, "n t c x")
    assert isinstance(found["summary"], np.ndarray)
    assert np.array_equal(found["temporal"], describe(torch.from_numpy(fields), "n t c x")["temporal"].numpy())


def test_axes_may_come_in_any_order() -> None:
    fields = smooth(2, 3, 6, 2, 8, 12, space=2)  # n m t c y x
    expected = describe(fields, "n m t c y x", spacing=(0.5, 0.25))
    found = describe(fields.permute(5, 2, 1, 0, 3, 4), "x t m n c y", spacing=(0.25, 0.5))
    for family in expected:
        assert torch.equal(found[family], expected[family])


def test_a_plane_wave_has_its_wavenumber_and_velocity() -> None:
    n, T, speed = 64, 16, 0.75
    x = torch.arange(n, dtype=torch.float64)
    for spacing, step in ((1.0, 1.0), (0.5, 0.1)):
        t = torch.arange(T, dtype=torch.float64)[:, None]
        fields = torch.sin(2.0 * math.pi * 5.0 / n * (x - speed * t))[None]
        found = describe(fields, "n t x", spacing=spacing, time_step=step)
        wave = column(found, "temporal", "spectral_dominant_frequency")
        torch.testing.assert_close(wave, torch.full_like(wave, 5.0))
        torch.testing.assert_close(
            column(found, "summary", "causality_flow_speed_mean"),
            torch.tensor([speed * spacing / step], dtype=torch.float64),
            rtol=0.05,
            atol=0.0,
        )
        slope = 2.0 * math.pi * 5.0 / (n * spacing) * 2.0 / math.pi
        torch.testing.assert_close(
            column(found, "temporal", "spatial_gradient_mean"),
            torch.full((1, T), slope, dtype=torch.float64),
            rtol=0.02,
            atol=0.0,
        )


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("extent", [6, 7])
def test_power_over_all_modes_is_the_variance(space: int, periodic: bool, extent: int) -> None:
    fields = torch.randn(3, *[extent + i for i in range(space)], dtype=torch.float64)
    modes = FourierModes(Grid.of(fields.shape[1:], periodic=periodic), CPU, torch.float64)
    coefficients = modes.transform(fields)
    power = (coefficients.real.square() + coefficients.imag.square()) @ modes.multiplicity
    torch.testing.assert_close(power, fields.flatten(1).var(1, correction=0))
    assert modes.modes == math.prod(n if periodic else 2 * n for n in fields.shape[1:]) - 1


def test_a_sample_does_not_depend_on_others_or_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from spinlock_fast.descriptors import describe as module

    fields = smooth(3, 2, 10, 2, 12, 12, space=2)
    whole = describe(fields, "n m t c y x")
    assert torch.equal(describe(fields[1:2], "n m t c y x")["summary"], whole["summary"][1:2])
    monkeypatch.setattr(__import__("sys").modules[module.__module__], "_BLOCK_NUMBERS", {"cpu": 1})
    for family in whole:
        torch.testing.assert_close(describe(fields, "n m t c y x")[family], whole[family], rtol=1e-9, atol=1e-12)


def test_memory_does_not_grow_with_the_blocks_of_time() -> None:
    describer = StateDescriptors(Grid.of((8, 8)), (1, 4), CPU, torch.float64)
    fields = smooth(12, 2, 2, 8, 8, space=2)
    parts = [describer.block(part) for part in fields.split(5)]
    assert [len(part.state) for part in parts] == [5, 5, 2]
    assert [len(part.activity) for part in parts] == [4, 5, 2]  # nothing precedes the first state


def test_a_sample_that_is_not_finite_is_missing_and_no_other() -> None:
    fields = smooth(3, 6, 2, 8, 8, space=2)
    clean = describe(fields, "n t c y x")
    fields[1, 4, 0, 3, 3] = torch.inf
    found = describe(fields, "n t c y x")
    for family in found:
        assert torch.isnan(found[family][1]).all()
        assert torch.equal(found[family][[0, 2]], clean[family][[0, 2]])


def test_a_constant_field_gives_zeros_and_its_mean() -> None:
    found = describe(torch.full((1, 5, 2, 8, 8), 3.0), "n t c y x")
    assert torch.isfinite(found["summary"]).all()
    mean, variance = (column(found, "temporal", f"spatial_{name}") for name in ("mean", "variance"))
    assert mean.tolist() == [[3.0] * 5]
    assert variance.tolist() == [[0.0] * 5]


def test_one_realization_has_means_alone() -> None:
    one = describe(smooth(2, 1, 6, 2, 8, 8, space=2), "n m t c y x")
    assert {name.rpartition("_")[2] for name in one.names["summary"]} == {"mean"}
    two = describe(smooth(2, 2, 6, 2, 8, 8, space=2), "n m t c y x")
    assert len(two.names["summary"]) == 3 * len(one.names["summary"])


@pytest.mark.parametrize(("shape", "axes"), [((1, 6, 2, 6, 8), "n t c y x"), ((1, 6, 9), "n t x")])
@pytest.mark.parametrize("periodic", [True, False])
def test_gradients_are_those_of_differences(shape: tuple[int, ...], axes: str, periodic: bool) -> None:
    fields = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    # Counts and positions are constant nearly everywhere; eigenvalues and extremes have a gradient.
    steps = ("dominant", "rolloff", "interface", "peak_time", "settling", "crossing", "peak_share")

    def smooth_columns(x: torch.Tensor) -> torch.Tensor:
        found = describe(x, axes, periodic=periodic)
        parts = [
            found[family][..., [i for i, name in enumerate(found.names[family]) if not any(s in name for s in steps)]]
            for family in found
        ]
        return torch.cat([part.flatten() for part in parts])

    assert torch.autograd.gradcheck(smooth_columns, (fields,), eps=1e-7, atol=1e-3, rtol=1e-3, fast_mode=True)


def test_gradients_of_a_constant_field_are_finite() -> None:
    fields = torch.full((1, 4, 2, 6, 6), 2.0, dtype=torch.float64, requires_grad=True)
    found = describe(fields, "n t c y x")
    sum(value.sum() for value in found.values()).backward()
    assert fields.grad is not None
    assert torch.isfinite(fields.grad).all()


def test_what_a_descriptor_changes_with() -> None:
    by_name = {feature.name: changes_with(feature) for feature in (*SPATIAL, *CROSS_CHANNEL)}
    assert by_name["mean"] == ("units",)
    assert by_name["gradient_mean"] == ("units", "grid")
    assert by_name["skewness"] == ()
    found = DescriptorNames(2, 3).trajectory["temporal"]
    assert {feature.name: changes_with(feature) for feature in found}["activity"] == ("units", "time step")


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((2, 4, 8), "n t q", "unknown axis 'q'"),
        ((2, 4, 8), "n x y", "axis t is missing"),
        ((2, 4, 8), "n t y", "the space axes must be x; y x; or z y x"),
        ((2, 4, 8), "n t t", "named twice"),
        ((2, 4, 8), "n t c y x", "5 axes are named, but fields has 3"),
        ((2, 1, 8), "n t x", "axis t has 1 state"),
        ((2, 4, 1), "n t x", "at least 2 points"),
    ],
)
def test_axes_that_do_not_fit_are_named(shape: tuple[int, ...], axes: str, message: str) -> None:
    with raises_one_line(ValueError, message):
        describe(torch.zeros(shape), axes)


def test_complex_fields_are_refused() -> None:
    with raises_one_line(DataError, "expected real numbers"):
        describe(np.zeros((2, 4, 8), np.complex64), "n t x")


def test_spacing_for_each_axis() -> None:
    with raises_one_line(ValueError, "spacing must be one value or 2"):
        describe(torch.zeros(1, 3, 8, 8), "n t y x", spacing=(1.0, 2.0, 3.0))
    with raises_one_line(ValueError, "spacing must be positive"):
        describe(torch.zeros(1, 3, 8, 8), "n t y x", spacing=(1.0, 0.0))
    with raises_one_line(ValueError, "time_step must be positive"):
        describe(torch.zeros(1, 3, 8, 8), "n t y x", time_step=0.0)

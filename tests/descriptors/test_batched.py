"""Fields described in batches: equal to single samples, gradients at degenerate fields, the recorded grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import raises_one_line

from spinlock_fast.descriptors import describe
from spinlock_fast.descriptors.batched import BatchDescriber
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.descriptors.gradients import is_constant
from spinlock_fast.errors import DataError
from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((2, 9, 2, 6, 7), "n t c y x"), ((2, 9, 9), "n t x"), ((2, 2, 9, 1, 4, 6), "n m t c y x")],
)
@pytest.mark.parametrize("periodic", [True, False])
def test_batches_are_described_as_single_samples_are(shape: tuple[int, ...], axes: str, periodic: bool) -> None:
    fields = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = BatchDescriber(axes=axes, periodic=periodic, time_step=0.1)(fields)
    expected = describe(fields, axes, periodic=periodic, time_step=0.1)
    assert found.names == expected.names
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    # Columns without a gradient, and no others, do not change with the fields.
    moved = BatchDescriber(axes=axes, periodic=periodic, time_step=0.1)(fields.detach() * (1.0 + 1e-7))
    moved_more = BatchDescriber(axes=axes, periodic=periodic, time_step=0.1)(fields.detach() + 1e-7 * fields[:1].sin())
    for kind, values in found.items():
        for i, name in enumerate(found.names[kind]):
            others = moved[kind][..., i], moved_more[kind][..., i]
            changes = any(not torch.equal(values[..., i], other) for other in others)
            if "band" not in name and "coherence" not in name:  # a band may be empty on this grid
                assert changes != is_constant(name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("periodic", [True, False])
def test_gradients_at_degenerate_fields_are_finite(dtype: torch.dtype, periodic: bool) -> None:
    x = torch.randn(1, 6, 2, 6, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    ones, time = torch.ones_like(x), torch.arange(6, dtype=dtype).view(1, 6, 1, 1, 1)
    steady = x[:, :1] * ones
    single = ones * 0.0
    single[..., 2, 3] = 1.0
    cases = torch.cat(
        [0.0 * ones, 2.0 * ones, steady, time * ones, x[:, :, :1] * ones, x * time, single, x.relu(), 1e-20 * x]
    )
    cases.requires_grad_()
    found = BatchDescriber(axes="n t c y x", periodic=periodic)(cases)
    (grad,) = torch.autograd.grad(sum(values.sum() for values in found.values()), cases)
    assert torch.isfinite(grad).all()
    # A surrogate that predicts no change at all starts with a gradient of the usual size.
    assert grad[2].abs().max() < 1e3 * grad[7].abs().max()


def test_fields_that_overflow_do_not_stop_the_description_of_others() -> None:
    fields = torch.randn(3, 9, 3, 6, 8)  # LAPACK refuses a matrix of infinities from 3 x 3 on
    clean = describe(fields, "n t c y x")
    fields[1] *= 1e25
    found = describe(fields, "n t c y x")
    assert torch.equal(found["summary"][[0, 2]], clean["summary"][[0, 2]])
    assert not torch.isfinite(found["summary"][1]).all()


def test_the_grid_of_extracted_fields_is_recorded(tmp_path: Path) -> None:
    for name, step in (("a", 0.1), ("b", 0.2)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((3, 9, 2, 6, 8), np.float32))
        options = Options(axes="n t c y x", spacing=(0.25, 0.5), periodic="y", time_step=step)
        extract(str(tmp_path / f"{name}.npy"), tmp_path / f"{name}.h5", options=options)
    found = FieldGrid.of_files([tmp_path / "a.h5"])
    assert found == FieldGrid((6, 8), (0.5, 0.25), (True, False), 0.1)
    assert FieldGrid.from_state(found.state()) == found
    assert FieldGrid.of_files([tmp_path / "a.h5", tmp_path / "b.h5"]) is None
    with raises_one_line(DataError, "not the grid of a field"):
        FieldGrid.from_state({**found.state(), "spacing": [0.0, 1.0]})


def test_features_made_of_descriptors_without_gradient() -> None:
    names = ["summary::spectral_rolloff_mean", "temporal::spatial_mean::dominant_frequency", "spectral_rolloff_cv"]
    assert all(map(is_constant, names))
    assert not any(map(is_constant, ["summary::spatial_mean_mean", "temporal::spatial_mean::mean", "temporal::x_1"]))

"""The native operations of `csrc/simulate` give the values of the PyTorch operators that they replace, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from spinlock_fast import _native
from spinlock_fast.descriptors.spectral import Wavenumbers
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.operators import OperatorTile
from spinlock_fast.simulate.parameters import ThetaSequence
from spinlock_fast.simulate.simulator import Rows, Simulator
from spinlock_fast.simulate.single_operator import SingleOperator

CPU = torch.device("cpu")
SMALL = GeneratorConfig(grid_size=32, num_timesteps=64, num_realizations=2, random_seed=3, workers=1)
# The order of sums of PyTorch and oneDNN is known for this instruction set.
pytestmark = pytest.mark.skipif(_native.simd_level() != "avx512", reason="needs AVX-512")


def simulated(config: GeneratorConfig) -> Rows:
    return Simulator(config, CPU).simulate(0, 8)


def test_rows_are_those_of_pytorch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    native = simulated(SMALL)
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "reference")
    for name, value in vars(simulated(SMALL)).items():
        assert np.array_equal(value, getattr(native, name), equal_nan=value.dtype.kind == "f"), name


@pytest.fixture(params=_native.instruction_sets()[1:])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects an instruction set other than the widest."""
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(_native.instruction_sets()[0])


def test_rows_are_those_of_other_instruction_sets(instruction_set: str) -> None:
    theta = ThetaSequence(SMALL.parameters, 3).thetas(5, 6)[0]
    operator, u = SingleOperator(theta, 3, 2.0), torch.randn(2, 1, 3, 64, 64)
    found = operator(u, None)
    rows = simulated(SMALL) if instruction_set == "avx2" else None
    _native.use_instruction_set(_native.instruction_sets()[0])
    expected = operator(u, None)
    if rows is None:  # products and sums are rounded one by one
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    assert torch.equal(found, expected)
    for name, value in vars(simulated(SMALL)).items():
        assert np.array_equal(value, getattr(rows, name), equal_nan=value.dtype.kind == "f"), name


@pytest.mark.parametrize("normalization", ["none", "instance", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "sine"])
def test_single_operators_are_those_of_a_tile(normalization: str, activation: str) -> None:
    base = ThetaSequence(SMALL.parameters, 3).thetas(5, 6)[0]
    u = torch.randn(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for channels, kernel in ((2, 3), (4, 7), (7, 5), (8, 3), (13, 3), (16, 5)):
        theta = dataclasses.replace(
            base,
            base_channels=channels,
            kernel_size=kernel,
            num_layers=3,
            normalization=normalization,  # type: ignore[arg-type]
            activation=activation,  # type: ignore[arg-type]
        )
        mask = torch.rand(2, 1, 2, channels)
        expected = OperatorTile([theta], 3, 2.0, CPU)(u, mask)
        assert torch.equal(SingleOperator(theta, 3, 2.0)(u, mask), expected), (channels, kernel)


def test_spectra_and_errors() -> None:
    fields = torch.randn(3, 32, 32)
    coefficients = torch.fft.rfft2(fields, norm="forward").flatten(1)
    real, imag, power = Wavenumbers(32, CPU).power(fields)
    assert torch.equal(real, coefficients.real)
    assert torch.equal(imag, coefficients.imag)
    assert torch.equal(power, real.square().addcmul_(imag, imag))
    with pytest.raises(ValueError, match="sizes"):
        _native.torus_convolution(0, 0, 0, 0, 1, 3, 3, 33, 3, 0)
    with pytest.raises(ValueError, match="sizes"):
        _native.block_means(0, 1, 30, 4, 0)

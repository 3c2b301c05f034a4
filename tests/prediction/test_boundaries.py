"""Boundaries of initial fields, and the rows by which an epoch is chosen."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import raises_one_line

from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.models.input_check import TEST, TRAIN, VALIDATION, KnownRows
from spinlock_fast.prediction.inputs import Inputs, periodic_axes, split_rows
from spinlock_fast.prediction.network import InputNetwork, InputShape, _ResidualBlock
from spinlock_fast.prediction.settings import PredictorConfig, load_predictor_config
from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options


@pytest.mark.parametrize("periodic", [(True, True), (False, True), (True, False), (False, False)])
def test_values_pass_an_end_of_a_periodic_axis_only(periodic: tuple[bool, bool]) -> None:
    block = _ResidualBlock(periodic, 1, 2)
    # The mean over space reaches every point.
    block.norm1 = block.norm2 = torch.nn.Identity()  # type: ignore[assignment]
    x = torch.randn(1, 1, 16, 16)
    for axis, wraps in enumerate(periodic):
        y = x.clone()
        y.narrow(2 + axis, 15, 1).add_(1.0)  # the last line
        changed = (block(y) - block(x)).abs().amax((0, 1, 3 - axis)) > 0.0
        assert bool(changed[-1])
        assert bool(changed[0]) == wraps


def test_the_network_is_equivariant_along_periodic_axes_only() -> None:
    torch.manual_seed(0)
    network = InputNetwork(InputShape(0, 1, 2, (False, True)), 3, PredictorConfig(stages=2, channels=4)).eval()
    theta, field = torch.empty(4, 0), torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        outputs = [network(theta, field), *(network(theta, field.roll(4, axis)) for axis in (3, 2))]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)
    assert float((outputs[2] - outputs[0]).abs().max()) > 1e-3


def test_boundaries_are_those_of_the_file(tmp_path: Path) -> None:
    fields = np.cumsum(np.random.default_rng(0).standard_normal((6, 4, 1, 8, 8)), 1).astype(np.float32)
    np.save(tmp_path / "a.npy", fields)
    path = extract(
        str(tmp_path / "a.npy"),
        tmp_path / "f.h5",
        options=Options(axes="n t c y x", periodic="x", initial_fields=True),
    )
    found = {}
    for given in (None, "xy", "none"):
        config = PredictorConfig(parameters=None, periodic=given)
        found[given] = Inputs(str(path), config).shape.periodic
    assert found == {None: (False, True), "xy": (True, True), "none": (False, False)}


def write(path: Path, **attributes: object) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
    return path


def test_boundaries_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    walls, wrapped = write(tmp_path / "a.h5", periodic=[False]), write(tmp_path / "b.h5", periodic=[True])
    assert periodic_axes([write(tmp_path / "c.h5")], 1, None) == ()
    with raises_one_line(DataError, "b.h5", "[True], but [False] in", "a.h5"):
        periodic_axes([walls, wrapped], 1, None)
    with raises_one_line(DataError, "a.h5", "expected 2 times true or false"):
        periodic_axes([walls], 2, None)
    with raises_one_line(DataError, "d.h5", "expected 1 times true or false"):
        periodic_axes([write(tmp_path / "d.h5", periodic="x")], 1, None)
    with raises_one_line(ConfigError, "no axis 'y'", "only x"):
        periodic_axes([walls], 1, "xy")
    with raises_one_line(ConfigError, "periodic"):
        load_predictor_config(None, ["periodic=round"])


def test_an_epoch_is_not_chosen_on_the_rows_that_are_reported() -> None:
    keys = np.arange(200)
    config = PredictorConfig(val_fraction=0.25, test_fraction=0.2)
    splits = split_rows(None, keys, config)
    assert np.bincount(splits, minlength=3).tolist() == [120, 40, 40]
    assert np.array_equal(splits, split_rows(None, keys, config))
    known = KnownRows.of(keys, np.arange(0, 10), np.arange(10, 20))  # both kinds held out by the tokenizer's run
    of_run = split_rows(known, keys, config)
    assert np.flatnonzero(of_run == TEST).tolist() == list(range(20))
    assert (of_run == VALIDATION).sum() == 45
    assert (of_run == TRAIN).sum() == 135
    with raises_one_line(ConfigError, "no row to train on"):
        split_rows(None, keys[:20], PredictorConfig(val_fraction=0.99, test_fraction=0.9))

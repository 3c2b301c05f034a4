"""Data sets that keep the last state of each operator."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spinlock_fast.generate import main
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.rollout import Rollout
from spinlock_fast.simulate.simulator import Simulator

SETTINGS = {"grid_size": 32, "num_timesteps": 64, "num_realizations": 2, "random_seed": 3}


def test_the_last_state_is_kept_on_request(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(json.dumps({**SETTINGS, "workers": 1}))
    for name, flags in (("plain", []), ("kept", ["--last-fields"])):
        given = ["--operators", "10", "--config", tmp_path / "data.yaml", "--output", tmp_path / f"{name}.h5", *flags]
        with pytest.raises(SystemExit) as end:
            main([*map(str, given), "--quiet"])
        assert not end.value.code
    config = GeneratorConfig(**SETTINGS, last_fields=True)
    thetas = Simulator(config, torch.device("cpu")).sequence.thetas(0, 10)
    with h5py.File(tmp_path / "plain.h5") as plain, h5py.File(tmp_path / "kept.h5") as kept:
        assert "outputs" not in plain
        assert not any("last_fields" in str(value) for value in plain.attrs.values())
        assert any("last_fields" in str(value) for value in kept.attrs.values())
        assert kept["outputs/fields"].shape == (10, 3, 32, 32)
        for path in ("inputs/fields", "features/temporal/features"):
            np.testing.assert_array_equal(kept[path][:], plain[path][:])
        with torch.inference_mode():
            *_, states = Rollout(thetas[4:5], config, torch.device("cpu")).blocks()
        np.testing.assert_array_equal(kept["outputs/fields"][4], states[-1, 0, 0].numpy())

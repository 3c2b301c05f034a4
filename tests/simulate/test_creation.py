"""A simulation killed during the creation of its file starts again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spinlock_fast.simulate import writer
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.run import generate


def contents(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, part: found.update({name: part[:]}) if isinstance(part, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize("resumed", [False, True])
def test_a_kill_at_every_step_of_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    config = GeneratorConfig(operators=2, grid_size=32, num_timesteps=64, num_realizations=1, workers=1)
    place, kills = tmp_path / "run", tmp_path / "kills"
    place.mkdir()
    kills.mkdir()
    output, states = place / "x.h5", set()

    def killing(step: Callable[..., Any]) -> Callable[..., Any]:
        """Copies the directory before and after a step, as a kill at that point would leave it."""

        def wrapped(*arguments: Any, **named: Any) -> Any:
            for moment in ("before", "after"):
                state = tuple((entry.name, entry.read_bytes()) for entry in sorted(place.iterdir()))
                if state not in states:
                    states.add(state)
                    shutil.copytree(place, kills / str(len(states)))
                if moment == "before":
                    result = step(*arguments, **named)
            return result

        return wrapped

    with monkeypatch.context() as patch:
        if resumed:  # a file whose head alone was written
            patch.setattr(writer.Writer, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generate(config, output)
        for name in ("reserve_disk_space", "create_hdf5_file", "sync_directory"):
            patch.setattr(writer, name, killing(getattr(writer, name)))
        patch.setattr(writer.os, "replace", killing(os.replace))
        patch.setattr(writer.Writer, "_create", killing(writer.Writer._create))
        patch.setattr(writer.Writer, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(config, output, resume=True)
    expected = contents(generate(config, tmp_path / "whole.h5"))
    assert len(states) >= 4
    for killed in sorted(kills.iterdir()):
        found = contents(generate(config, killed / "x.h5", resume=True))
        assert found.keys() == expected.keys()
        for path, values in expected.items():
            np.testing.assert_array_equal(found[path], values, err_msg=path)
        assert os.listdir(killed) == ["x.h5"]

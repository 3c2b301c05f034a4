"""The scripts of examples/ run, with small sizes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_swap_import_gives_the_same_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"steps": 6, "batch": 4, "length": 16, "codes": 32, "quantizers": 3, "dim": 16}
    arguments = [f"--{name}={value}" for name, value in small.items()]
    results = example("swap_import", monkeypatch).main(["--library=both", *arguments])
    (theirs, _), (ours, _) = results["vector_quantize_pytorch"], results["spinlock_fast"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[-1] < ours[0]
    printed = capsys.readouterr().out
    assert printed.count("ms a step") == 2
    assert "times as fast" in printed


def test_image_vqvae_learns_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "digits.png"
    example("image_vqvae", monkeypatch).main(["--epochs", "3", "--codes", "16", "--output", str(picture)])
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line[:5].strip().isdigit()]
    errors = [float(row[1]) for row in rows]
    assert len(rows) == 3
    assert errors[-1] < errors[0]
    assert all(0.0 < float(row[2]) <= 1.0 and 1.0 <= float(row[3]) <= 16.0 for row in rows)
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib is not installed" in printed
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_surrogate_trains_with_the_loss_on_its_behaviour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """From files of waves to the table, in real processes."""
    time, place = np.arange(6)[:, None, None], np.arange(8) * (np.pi / 4)
    speed = np.random.default_rng(0).uniform(0.5, 1.0, 90).astype(np.float32)
    fields = np.sin(place[None, None] + place[:, None] - speed[:, None, None, None] * time).astype(np.float32)
    fields = (1.0 + speed[:, None, None, None]) * fields
    for name, rows in (("train", slice(80)), ("test", slice(80, 90))):
        np.save(tmp_path / f"{name}.npy", fields[rows, :, None].astype(np.float32))
        np.save(tmp_path / f"{name}_nu.npy", speed[rows])
    extraction = ["extract", f"{tmp_path}/train.npy", "--axes", "n t c y x", "--output", f"{tmp_path}/features.h5"]
    settings = [f"dataset_path={tmp_path}/features.h5", "training.num_epochs=2", "logging.tensorboard=false"]
    settings += ["training.joint_search_epochs=2"]
    training = ["train", str(ROOT / "configs" / "trajectories.yaml"), "--output", f"{tmp_path}/checkpoint", "--quiet"]
    for command in (extraction, [*training, *(part for setting in settings for part in ("--set", setting))]):
        subprocess.run([sys.executable, "-m", "spinlock_fast", *command], check=True, capture_output=True)
    module = example("behaviour_loss", monkeypatch)
    results = module.train(tmp_path, tmp_path / "checkpoint", 2, [0.1], 0)
    printed = capsys.readouterr().out
    assert list(results)[1:] == ["single steps", "rollouts, MSE", "rollouts, MSE + 0.1 behaviour"]
    for name, found in results.items():
        assert all(np.isfinite(value) for value in found.values()), name
        assert name in printed

"""The scripts of examples/ run, with small sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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

"""The examples and the snippets of docs/pretrained.md run as they stand, small."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8"), re.DOTALL)


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
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


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_of_the_page_on_pretrained_codebooks(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("transformers", "diffusers"):
        if re.search(rf"^from {name} import", SNIPPETS[number], re.MULTILINE):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip(name, reason=f"needs {name}: pip install 'spinlock-fast[pretrained]'")
    exec(compile(SNIPPETS[number], f"docs/pretrained.md, snippet {number + 1}", "exec"), {})

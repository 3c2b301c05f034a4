"""The tables of docs/ablation.md are those of the committed results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "docs" / "make_ablation.py"


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_ablation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text(encoding="utf-8")
    assert text == script.page(), "run `python docs/make_ablation.py`"
    assert {path.name for path in script.RESULTS.glob("ablation_*.csv")} == set(re.findall(r"ablation_\w+\.csv", text))

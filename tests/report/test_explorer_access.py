"""Accessibility of the explorer, by axe-core in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe import axe_script, violations
from browser import PROGRAM, browser_page
from planted import operators

from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_axe_finds_nothing_serious(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    script = axe_script(pytestconfig.cache.mkdir("axe-core"))
    about = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
    file = tmp_path / "explorer.html"
    file.write_text(build_page(explorer_data(operators(400, seed=3), about), "Tokens"), encoding="utf-8")
    with browser_page() as page:
        for width in (1280, 390):
            for dark in (False, True):
                page.resize(width, dark=dark)
                page.open(file)
                assert violations(page, script) == []
                page.write("#search", "c1=2 vs 3")
                page.write("#search", "c1=9")  # an error message
                page.choose("#condition", "noise regime: low")
                page.click("#examples td button")
                page.choose("#feature", "family::feature_0")
                assert violations(page, script) == []
        page.evaluate("document.getElementById('search').removeAttribute('aria-describedby')")
        page.evaluate("document.querySelector('label[for=search]').remove()")
        page.evaluate("document.getElementById('search').placeholder = ''")
        assert [line.split(" ")[0] for line in violations(page, script)] == ["label"]  # that it finds something

"""Accessibility of the explorer, by axe-core in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from axe import axe_script, violations
from browser import PROGRAM, browser_page
from planted import operators

from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.series import Series, SeriesPlots


def noise_series(rows: np.ndarray, codes: int) -> SeriesPlots:
    rng = np.random.default_rng(0)
    band = np.repeat([[-1.0], [0.0], [1.0]], 6, axis=1).astype(np.float32)
    difference = rng.random(codes, np.float32)
    levels = rng.integers(0, 256, (len(rows), 6), np.uint8)
    series = [
        Series(name, np.arange(6), 6, band, -2.0, 2.0, difference, difference, levels) for name in ("mean", "power")
    ]
    return SeriesPlots(rows, len(rows), series)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_axe_finds_nothing_serious(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    script = axe_script(pytestconfig.cache.mkdir("axe-core"))
    about = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
    file = tmp_path / "explorer.html"
    contents = explorer_data(operators(400, seed=3), about)
    contents.add_series(noise_series(np.arange(400), len(contents.columns["profile/codes"])))
    file.write_text(build_page(contents, "Tokens"), encoding="utf-8")
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
                page.choose("#one-series", "power")
                assert violations(page, script) == []
        page.evaluate("document.getElementById('search').removeAttribute('aria-describedby')")
        page.evaluate("document.querySelector('label[for=search]').remove()")
        page.evaluate("document.getElementById('search').placeholder = ''")
        assert [line.split(" ")[0] for line in violations(page, script)] == ["label"]  # that it finds something

"""The picture and the page of an analysis."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from dashboards import assert_readable, drawn_texts
from planted import operators

from spinlock_fast.analysis import AnalysisConfig
from spinlock_fast.analysis.run import Analysis, analyze_observations
from spinlock_fast.report.analysis_figure import draw_analysis
from spinlock_fast.report.analysis_page import html_page, markdown, page_blocks
from spinlock_fast.report.analysis_write import write_analysis_page

HOSTILE = "<script>alert(1)</script> | [x](y) *b* \x1b[31m"


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyze_observations(operators(400, seed=5), AnalysisConfig())


def test_the_picture_is_readable_and_shows_the_planted_dependence(analysis: Analysis) -> None:
    figure = draw_analysis(analysis)
    assert_readable(figure)
    texts = [text.get_text() for text, _ in drawn_texts(figure)]
    assert {"slow/L0", "fast/L2", "shuffled, 95 %", "step"} <= set(texts)
    assert "Characteristic codes" in texts
    table = analysis.tables["associations"]
    largest = float(table["ami"][table["condition"] == "step"].max())
    assert f"{largest:.2f}".removeprefix("0") in texts


def test_the_page_says_what_was_asked_and_found(analysis: Analysis) -> None:
    text = markdown(page_blocks(analysis, pictured=True))
    assert text.index("## What was asked") < text.index("## What was found") < text.index("## How to read it")
    assert "The tokens tell 1 of 5 conditions, most about step" in text
    assert "No association was found with" in text
    assert "![" in text
    assert "(analysis.png)" in text
    found = [line for line in text.splitlines() if line.startswith("| step |")]
    table = analysis.tables["associations"]
    assert f"{float(table['ami'][table['condition'] == 'step'].max()):.3f}" in found[0]
    for line in found:
        assert line.count("|") == 6


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_of_the_data_are_text() -> None:
    observed = operators(200, seed=5)
    observed.labels[HOSTILE] = observed.labels.pop("noise regime")
    observed.parameters[HOSTILE + "2"] = observed.parameters.pop("step")
    blocks = page_blocks(analyze_observations(replace(observed, notes=[HOSTILE]), AnalysisConfig()), pictured=False)
    page = html_page(blocks, None)
    tags = Tags(page)
    assert not tags.open
    assert "script" not in tags.seen
    assert "<script>alert(1)</script> | [x](y)" in tags.text
    assert "\x1b" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    text = markdown(blocks)
    assert "\x1b" not in text
    assert "<script" not in text.replace("\\<", "")
    assert (
        len(
            {
                line.replace("\\|", "").count("|")
                for line in text.splitlines()
                if line.startswith("| ") and "step" in line
            }
        )
        <= 1
    )


def test_without_conditions_or_matplotlib_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    observed = replace(operators(100, seed=1), parameters={}, labels={})
    analysis = analyze_observations(observed, AnalysisConfig())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "spinlock_fast.plot_style", raising=False)
    files = write_analysis_page(analysis, tmp_path)
    assert [file.name for file in files] == ["analysis.md", "analysis.html"]
    assert "no picture: matplotlib is not installed" in caplog.text
    text = (tmp_path / "analysis.md").read_text(encoding="utf-8")
    assert "The data have no conditions" in text
    assert "![" not in text
    assert np.isfinite(analysis.tables["refinement"]["epsilon_squared"]).all()

"""The explorer with more categories than fit a screen: table of codes, order of associations, counts, long names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Page, browser_page
from planted import operators

from spinlock_fast.analysis.observations import Codebooks
from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page

ROWS, CATEGORIES, CODES = 300, 14, 9
ABOUT = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
RNG = np.random.default_rng(2)
TOKENS = RNG.integers(0, CODES, (ROWS, CATEGORIES))
NAMES = [f"cluster_{c}" for c in range(1, CATEGORIES + 1)]
LONG = "temporal::" + "_".join(["radially", "averaged", "power", "spectrum"] * 3)
PLANTED = operators(ROWS, seed=5, dependent=False)
OBSERVED = replace(
    PLANTED,
    codebooks=Codebooks(
        [f"{name}/L0" for name in NAMES],
        NAMES,
        [0] * CATEGORIES,
        [CODES] * CATEGORIES,
        [RNG.standard_normal((CODES, 3)).astype(np.float32) for _ in NAMES],
    ),
    tokens=TOKENS,
    distance=RNG.random((ROWS, CATEGORIES), dtype=np.float32),
    margin=RNG.random((ROWS, CATEGORIES), dtype=np.float32),
    features=np.concatenate([TOKENS[:, :1] + 0.1, PLANTED.features[:, 1:]], 1).astype(np.float32),
    feature_names=[LONG, *PLANTED.feature_names[1:]],
    groups={name: [c % 7] for c, name in enumerate(NAMES)},
    labels={"solver": np.where(TOKENS[:, 8] < 6, "explicit", "implicit")},
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    file: Path = tmp_path_factory.mktemp("many") / "explorer.html"
    file.write_text(build_page(explorer_data(OBSERVED, ABOUT), "Tokens"), encoding="utf-8")
    with browser_page() as page:
        page.resize(1280)
        page.open(file, "#s=c1=8")
        yield page
        assert not [event for event in page.events if event["method"] == "Runtime.exceptionThrown"]


def test_the_conditions_that_are_told_best_come_first(page: Page) -> None:
    assert page.texts("#associations thead th")[1] == "solver"
    assert explorer_data(OBSERVED, ABOUT).header["associations"]["conditions"][0] != "solver"


def test_the_codebooks_that_tell_most_come_first(page: Page) -> None:
    assert page.texts("#associations tbody th")[0] == "c9 L0"  # the label follows its token
    assert sorted(page.texts("#associations tbody th")) == sorted(f"c{c} L0" for c in range(1, CATEGORIES + 1))
    assert page.texts("#associations tbody tr:first-child td.found")
    heights = page.evaluate(
        "(e => [e.clientHeight, e.scrollHeight])(document.querySelector('#associations-panel .scroll'))"
    )
    assert heights[0] <= 640


def test_codes_are_added_when_the_table_is_scrolled(page: Page) -> None:
    page.press("Escape")
    wait = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 150)))"
    page.evaluate(wait)
    first = len(page.texts("#codes tbody tr"))
    assert 40 <= first < CATEGORIES * CODES
    for _ in range(6):
        page.evaluate("document.getElementById('codes').parentElement.scrollTop = 1e6")
        page.evaluate(wait)
    codes = [f"c{c} L0 = {code}" for c in range(1, CATEGORIES + 1) for code in range(CODES)]
    assert page.texts("#codes tbody td:first-child") == codes
    place = page.evaluate("document.getElementById('codes').parentElement.scrollTop")
    page.evaluate("document.querySelector('#codes tbody tr:last-child').click()")
    page.evaluate(wait)
    assert page.texts("#selected") == ["c14 L0 = 8"]
    assert page.evaluate("document.getElementById('codes').parentElement.scrollTop") == pytest.approx(place, abs=40)
    page.evaluate("document.getElementById('codes').parentElement.scrollTop = 0")


@pytest.mark.parametrize(("search", "terms"), [("c1=3", {0: 3}), ("c1=3 c2=1", {0: 3, 1: 1}), ("solver: explicit", {})])
def test_counts_in_the_filter(page: Page, search: str, terms: dict[int, int]) -> None:
    # Few matching rows are counted themselves, many by those that do not match.
    page.press("Escape")
    page.write("#search", search)
    found = OBSERVED.labels["solver"] == "explicit" if not terms else np.ones(ROWS, bool)
    for g, code in terms.items():
        found &= TOKENS[:, g] == code
    assert page.texts("#matches") == [f"{found.sum()} of 300 rows"]
    shown = dict(
        zip(page.texts("#codes tbody td:first-child"), page.texts("#codes tbody td:nth-child(3)"), strict=True)
    )
    assert len(shown) >= 40
    for name, count in shown.items():
        c, code = (int(part) for part in name.removeprefix("c").split(" L0 = "))
        assert int(count) == (found & (TOKENS[:, c - 1] == code)).sum()


def test_the_compared_code_is_chosen_among_codes_of_its_codebook_first(page: Page) -> None:
    page.press("Escape")
    page.write("#search", "c3=2 vs 4")
    assert page.evaluate("[...document.querySelectorAll('#compare optgroup')].map(e => e.label)")[:3] == [
        "c3 L0",
        "c1 L0",
        "c2 L0",
    ]
    assert page.evaluate(
        "[...document.getElementById('compare').options].filter(e => e.disabled).map(e => e.text)"
    ) == ["c3 L0 = 2"]
    assert page.evaluate("document.getElementById('compare').selectedOptions[0].text") == "c3 L0 = 4"


def test_a_long_name_stays_in_its_panel_on_a_phone(page: Page) -> None:
    page.resize(390)
    page.write("#search", "c1=8")
    assert LONG in page.texts("#summary")[0]
    widths = page.evaluate("(e => [e.scrollWidth, e.clientWidth])(document.getElementById('summary'))")
    assert widths[0] <= widths[1]
    page.resize(1280)

"""Conditions, example rows and neighbours in the explorer, against NumPy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Page, browser_page
from planted import operators

from spinlock_fast.analysis.conditions import make_conditions
from spinlock_fast.analysis.neighbours import nearest_operators
from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.rows import distance_ranks

OBSERVED = operators(300, seed=4)
OBSERVED.labels["state=end "] = np.where(
    OBSERVED.tokens[:, 0] == 1, "a b", np.where(OBSERVED.tokens[:, 0] == 2, "a+b", "c")
)
OBSERVED.labels["c1"] = np.where(np.arange(300) % 3 == 0, "1", "x y")  # as a category
CONDITIONS, _ = make_conditions(OBSERVED, 5)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    about = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": None, "measured_on": ""}
    file = tmp_path_factory.mktemp("explorer") / "explorer.html"
    file.write_text(build_page(explorer_data(OBSERVED, about), "Tokens"), encoding="utf-8")
    with browser_page() as page:
        page.resize(1280)
        page.open(file)
        yield page
        reported = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        assert not [event for event in page.events if event["method"] in reported]


@pytest.fixture
def page(opened: Page) -> Page:
    """The page without a filter."""
    opened.press("Escape")
    return opened


def test_ranks_of_distances() -> None:
    tokens, distance = np.array([0, 1, 0, 0, 0, 1]), np.array([3, 9, 1, 2, 4, 8], np.float32)
    assert distance_ranks(tokens, distance).tolist() == [180, 180, 0, 127, 220, 0]  # floor(255 sqrt(0, 1/4, 1/2, 3/4))


def test_a_condition_filters_and_ranks_the_codes(page: Page) -> None:
    page.choose("#condition", "state=end : a+b (")
    chosen = OBSERVED.labels["state=end "] == "a+b"
    assert page.texts("#matches") == [f"{chosen.sum()} of 300 rows"]
    assert page.texts(".chip") == ["state=end : a+b \N{MULTIPLICATION SIGN}"]
    assert page.evaluate("location.hash").startswith("#f=state_end=a_b~2&s=")
    members = [(g, code) for g, codes in enumerate(OBSERVED.codebooks.num_codes) for code in range(codes)]
    overlap = {
        f"c{g // 3 + 1} L{g % 3} = {code}": (chosen & (OBSERVED.tokens[:, g] == code)).sum()
        / (chosen | (OBSERVED.tokens[:, g] == code)).sum()
        for g, code in members
    }
    names, shown = page.texts("#codes tbody td:first-child"), page.texts("#codes tbody td:last-child")
    np.testing.assert_allclose([float(text[:-2]) / 100 for text in shown], [overlap[name] for name in names], atol=6e-4)
    assert names[0] == "c1 L0 = 2"
    assert shown == sorted(shown, key=lambda text: -float(text[:-2]))
    best = page.texts("#best")[0]
    assert best.startswith("The code that marks these rows best is c1 L0 = 2: 100.0 % of them have it, and 100.0 %"), (
        best
    )
    page.click("#best button.row")
    typical = np.flatnonzero(chosen)[OBSERVED.distance[chosen, 0].argmin()]
    assert page.texts("#row-heading") == [f"Row {OBSERVED.rows[typical]}"]
    assert best.endswith(f"Most typical row: {OBSERVED.rows[typical]}")
    page.write("#search", "c1=*/1")  # another code of the category: no sentence, but a typical row
    assert page.texts("#best button") == page.texts("#best")
    assert page.texts("#best")[0].startswith("Most typical row: ")
    page.click("#row-close")

    page.evaluate("location.hash = '#f=noise_regime=HIGH+c2=1'")
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    both = (OBSERVED.labels["noise regime"] == "high") & (OBSERVED.tokens[:, 3] == 1)
    assert page.texts("#matches") == [f"{both.sum()} of 300 rows"]
    page.choose("#condition", "c1: 1")
    assert "+c1~=1" in page.evaluate("location.hash")
    page.evaluate("location.hash = '#f=c1~=x_y+c1=1'")
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    assert page.texts("#matches") == [f"{((np.arange(300) % 3 != 0) & (OBSERVED.tokens[:, 0] == 1)).sum()} of 300 rows"]
    page.write("#search", "noise_regime=none")
    assert page.texts("#search-error") == ["noise_regime=none: noise_regime is one of high, low"]


def test_a_condition_is_found_by_its_text(page: Page) -> None:
    low, third = OBSERVED.labels["noise regime"] == "low", np.arange(300) % 3 == 0
    token = OBSERVED.tokens[:, 0]
    for text, rows in [
        ("NOISE regime:  low", low),
        ("low", low),
        ("regime=low c1=3", low & (token == 3)),
        ("c1=3, noise regime: low; a+b", low & (token == 3) & (OBSERVED.labels["state=end "] == "a+b")),
        ("c1: 1 c1=2", third & (token == 2)),
        ("state=end : a b", OBSERVED.labels["state=end "] == "a b"),
    ]:
        page.press("Escape")
        page.write("#search", text)
        assert page.texts("#search-error") == [""]
        assert page.texts("#matches") == [f"{rows.sum()} of 300 rows"], text
    page.press("Escape")
    choices = "noise regime is one of high, low; write noise regime: low, or choose it under Condition"
    for text, message in [
        ("noise", f"noise: {choices}"),
        ("c1=3 noise regime: loud", f"noise regime: {choices}"),
        ("regime=loud", f"regime=loud: {choices}"),
        ("0.2", "0.2: write c1=12 or c1=12/4/7; choose conditions under Condition"),
        ("low noise regime: high", "noise regime can have one value here: choose low or high"),
    ]:
        page.evaluate("document.getElementById('search').value = ''")
        page.write("#search", text)
        assert page.texts("#search-error") == [message]
        assert page.texts(".chip") == []


def test_the_profile_says_what_it_describes(page: Page) -> None:
    page.open(Path(page.evaluate("location.pathname")))
    assert page.texts("#profile-note")[0].startswith("Opened first: ")
    page.choose("#condition", "noise regime: low")
    opened = page.evaluate("document.querySelector('#codes tr.current').dataset.code")
    ends = np.cumsum(OBSERVED.codebooks.num_codes)
    g = int(np.searchsorted(ends, int(opened), side="right"))
    rows = (OBSERVED.tokens[:, g] == int(opened) - ends[g] + OBSERVED.codebooks.num_codes[g]).sum()
    assert f"Describes all {rows} rows of the code, whatever the filter" in page.texts("#profile-note")[0]
    page.write("#search", "c1=2 vs 4")
    counts = [int((OBSERVED.tokens[:, 0] == code).sum()) for code in (2, 4)]
    assert page.texts("#profile-note")[0].startswith(f"Describes all {counts[0]} and {counts[1]} rows of the two codes")
    page.press("Escape")
    assert page.texts("#profile-note") == [""]


def test_codes_ranked_by_a_feature(page: Page) -> None:
    page.choose("#feature", "family::feature_0")
    effects = [float(text.replace("\N{MINUS SIGN}", "-")) for text in page.texts("#codes tbody td:last-child")]
    assert effects == sorted(effects, reverse=True)
    assert page.texts("#codes tbody td:first-child")[0] == "c1 L0 = 5"  # the feature follows this token
    page.click("#codes th:last-child button")
    assert page.texts("#codes tbody td:first-child")[0] == "c1 L0 = 0"
    page.choose("#feature", "none")
    assert page.texts("#codes tbody td:first-child")[0] == "c1 L0 = 0"


def test_two_codes_by_one_search(page: Page) -> None:
    for text in ("c1=2 vs 4", "c1=2 VS slow=4"):
        page.write("#search", text)
        assert page.texts("#selected") == ["c1 L0 = 2 compared with c1 L0 = 4"]
        assert page.texts("#matches") == ["300 of 300 rows"]
    (summary,) = page.texts("#summary")
    assert summary.startswith("Rows with c1 L0 = 2 have lower family::feature_")
    assert summary.endswith("than those with c1 L0 = 4.")
    for text in (
        "c1=2 vs 9",
        "c1=2 vs",
        "c1=2 vs c1=2",
        "c1=* vs 1",
        "c1=2 c2=1 vs 4",
        "c1=2 vs c1=4 noise_regime=low",
    ):
        page.write("#search", text)
        assert len(page.texts("#search-error")[0]) > 10
        page.evaluate("document.getElementById('search').value = ''")


def test_a_comparison_names_the_largest_difference_first(page: Page) -> None:
    x = OBSERVED.features
    for g, search, codes, small in ((1, "c1=*/1 vs 2", (1, 2), False), (0, "c1=5 vs 2", (5, 2), True)):
        page.write("#search", search)
        first, second = (x[OBSERVED.tokens[:, g] == code].mean(0) for code in codes)
        difference = (first - second) / x.std(0)
        (summary,) = page.texts("#summary")
        found = re.findall(r"(higher|lower) family::feature_(\d) \(by ([\d.]+) SD\)", summary)
        assert [int(name) for _, name, _ in found] == np.argsort(-np.abs(difference))[: len(found)].tolist()
        for side, name, size in found:
            assert (side == "higher") == (difference[int(name)] > 0)
            np.testing.assert_allclose(float(size), abs(difference[int(name)]), atol=0.006)
        large, _, also = summary.partition(f" than those with c1 L{g} = 2")
        assert large.count("feature_") == 2
        assert also.startswith("; also ") == small


def test_example_rows_of_a_filter_and_their_neighbours(page: Page) -> None:
    page.choose("#condition", "noise regime: low")
    page.write("#search", "c1=3")
    t, low = OBSERVED.tokens, OBSERVED.labels["noise regime"] == "low"
    found = np.flatnonzero(low & (t[:, 0] == 3))
    nearest = found[np.argsort(OBSERVED.distance[found, 0], kind="stable")][:10]
    assert page.texts("#examples td button") == [str(row) for row in OBSERVED.rows[nearest]]
    assert page.texts("#examples th") == ["Row", "Rank"]
    own = OBSERVED.distance[t[:, 0] == 3, 0]
    ranks = [1 + int((own < OBSERVED.distance[row, 0]).sum()) for row in nearest]
    assert page.texts("#examples td:last-child") == [str(rank) for rank in ranks]

    page.click("#examples td button")
    assert page.texts("#row-heading") == [f"Row {OBSERVED.rows[nearest[0]]}"]
    shown = dict(zip(page.texts("#row-conditions dt"), page.texts("#row-conditions dd"), strict=True))
    assert shown == {c.name: c.levels[c.codes[nearest[0]]] for c in CONDITIONS}
    rows, distance = nearest_operators(OBSERVED.codebooks, t, nearest[:1], 5)
    assert page.texts("#neighbours td:first-child") == [str(row) for row in OBSERVED.rows[rows[0]]]
    assert page.texts("#neighbours td:nth-child(2)") == [f"{value:.3f}" for value in distance[0]]
    equal = (t[rows[0]] == t[nearest[0]]).sum(1)
    assert page.texts("#neighbours td:nth-child(3)") == [f"{count} of 6" for count in equal]
    page.click("#neighbours td button")
    assert page.texts("#row-heading") == [f"Row {OBSERVED.rows[rows[0, 0]]}"]
    page.click("#row-close")
    assert page.evaluate("document.getElementById('row-panel').hidden")


def test_a_click_on_a_condition_of_a_code_filters(page: Page, tmp_path: Path) -> None:
    text = page.texts("#lifts .name button")[0]
    page.click("#lifts .name button")
    assert page.texts(".chip") == [text.rsplit(" (", 1)[0] + " \N{MULTIPLICATION SIGN}"]

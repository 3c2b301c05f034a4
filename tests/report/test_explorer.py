"""The explorer: its contents, its policy, and what a browser shows against NumPy."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from browser import PROGRAM, Page, browser_page
from dashboards import explorer_contents, synthetic_checkpoint
from planted import operators, rows_where
from sklearn.metrics import adjusted_mutual_info_score

from spinlock_fast.analysis import AnalysisConfig, analyze_observations
from spinlock_fast.analysis.associations import code_counts, lifts_table
from spinlock_fast.analysis.codes import one_hot
from spinlock_fast.analysis.conditions import make_conditions
from spinlock_fast.analysis.effects import code_effects
from spinlock_fast.analysis.neighbours import code_coordinates
from spinlock_fast.report.__main__ import main
from spinlock_fast.report.explorer import data as contents
from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.rows import token_map

HOSTILE = ["</script><img src=x onerror=alert(1)>", "\"'&lt;$title${script}", "Ω 漢字 \u2028\u202e", "=1+1", ""]
HOSTILE += ["a" * 300, "b"]
ABOUT = {"checkpoint": "<b>x</b>", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
OBSERVED = replace(operators(400, seed=3), feature_names=HOSTILE)
OBSERVED.labels["initial condition"] = np.where(OBSERVED.tokens[:, 0] < 2, HOSTILE[0], "waves")


def make_page() -> str:
    return build_page(explorer_data(OBSERVED, ABOUT), "Tokens of <b>x</b>")


def test_a_page_is_reproducible_and_loads_nothing() -> None:
    page = make_page()
    assert page == make_page()
    header, columns = explorer_contents(page)
    assert header["rows"] == 400
    for g in range(6):
        np.testing.assert_array_equal(columns[f"tokens/{g}"], OBSERVED.tokens[:, g])
    np.testing.assert_array_equal(columns["code/count"], code_counts(OBSERVED))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "innerHTML" not in page
    assert "<img" not in page
    assert "Tokens of &lt;b&gt;x" in page


def test_the_tables_are_those_of_analyze() -> None:
    data = explorer_data(OBSERVED, ABOUT)
    tables = analyze_observations(OBSERVED, AnalysisConfig()).tables
    associations = data.header["associations"]
    for name in ("ami", "null_q95", "q"):
        np.testing.assert_allclose(associations[name], tables["associations"][name], rtol=1e-3)
    samples = tables["samples"]
    offset = OBSERVED.codebooks.offsets[1]
    for kind, name in enumerate(data.header["samples"]):
        code_and_kind = (data.columns["sample/code"] == offset + 2) & (data.columns["sample/kind"] == kind)
        rows = OBSERVED.rows[data.columns["sample/row"][code_and_kind]]
        assert rows[:3].tolist() == samples["row"][rows_where(samples, codebook="slow/L1", code=2, kind=name)].tolist()
    for name, column in (("value", "lift"), ("low", "lift_low"), ("high", "lift_high")):
        np.testing.assert_allclose(data.columns[f"lift/{name}"], tables["lifts"][column], atol=1e-4)


def test_the_map_is_the_principal_component_analysis_of_the_code_vectors() -> None:
    coordinates = code_coordinates(OBSERVED.codebooks, OBSERVED.tokens)
    x = np.concatenate([codes[OBSERVED.tokens[:, g]] for g, codes in enumerate(coordinates)], axis=1).astype(float)
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    expected = x @ axes[:2].T
    expected *= np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(1)])
    np.testing.assert_allclose(token_map(OBSERVED.codebooks, OBSERVED.tokens), expected, atol=1e-5)


def test_large_parts_are_limited_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    full = explorer_data(OBSERVED, ABOUT)
    for name, limit in (("_MAX_PROFILE_CELLS", 26 * 4), ("_MAX_LIFT_CELLS", 26 * 8), ("_MAX_PAIRS", 0)):
        monkeypatch.setattr(contents, name, limit)
    data = explorer_data(OBSERVED, ABOUT)
    kept = [full.header["features"].index(feature) for feature in data.header["features"]]
    assert len(kept) == 4
    assert {0, 1} <= set(kept)  # the planted features
    effects = full.columns["profile/effect"].reshape(26, -1)[:, kept]
    np.testing.assert_array_equal(data.columns["profile/effect"], effects.ravel())
    assert [condition["name"] for condition in data.header["conditions"]] == ["step", "initial condition"]
    assert len(data.columns["lift/value"]) == 26 * (5 + 2)
    notes = " ".join(data.header["notes"])
    assert "profiles show the 4 of 9 features with the largest effects" in notes
    assert "lifts are shown for 2 of 5 conditions" in notes


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command_writes_one_file_or_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = synthetic_checkpoint(tmp_path / "run", [4, 5], rows=60, epochs=1)
    html = ("--type", "html", "--output", tmp_path / "out")
    assert run(capsys, checkpoint, *html, "--rows", 30) == (0, f"{tmp_path / 'out' / 'explorer.html'}\n", "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["explorer.html"]
    header, columns = explorer_contents((tmp_path / "out" / "explorer.html").read_text(encoding="utf-8"))
    assert header["notes"][0] == "30 of 60 operators, evenly spaced, were analysed"
    assert columns["rows"][[0, -1]].tolist() == [0, 59]

    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["features/summary"] = np.zeros((60, 3), np.float32)
    before = (tmp_path / "out" / "explorer.html").read_bytes()
    for arguments, status, text in [
        (["--rows", 5], 2, "--rows: the explorer needs at least 20 rows, got 5"),
        (["--data", tmp_path / "none.h5"], 3, "none.h5"),
        (["--data", other], 3, "other.h5"),
    ]:
        code, out, err = run(capsys, checkpoint, *html, *arguments)
        assert (code, out, len(err.splitlines())) == (status, "", 1), err
        assert text in err
    assert (tmp_path / "out" / "explorer.html").read_bytes() == before
    few = synthetic_checkpoint(tmp_path / "few", [4, 5], rows=19, epochs=1)
    code, _, err = run(capsys, few, *html)
    assert code == 3
    assert "19 rows are too few: the explorer needs at least 20" in err


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    file = tmp_path_factory.mktemp("explorer") / "explorer.html"
    file.write_text(make_page(), encoding="utf-8")
    with browser_page() as page:
        page.resize(1280)
        page.open(file, "#s=c1=*/2")
        yield page
        assert {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"} <= {
            file.as_uri() + fragment for fragment in ("", "#s=c1=*/2")
        }
        reported = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        assert not [event for event in page.events if event["method"] in reported]


def search(page: Page, text: str) -> None:
    page.evaluate(f"document.querySelector('#search').value = {json.dumps(text)}")
    page.evaluate("document.querySelector('#search-form button').click()")


def test_numbers_on_the_page_equal_those_of_numpy(page: Page) -> None:
    t = OBSERVED.tokens
    counts = code_counts(OBSERVED)
    rows = [
        row.split("|")
        for row in page.evaluate(
            "[...document.querySelectorAll('#codes tbody tr')].map(r => [...r.cells].map(c => c.textContent).join('|'))"
        )
    ]
    assert [int(row[1]) for row in rows] == counts.tolist()
    assert rows[7][0] == "c1 L1 = 1"

    search(page, "c1=2 fast=*/*/1")
    found = (t[:, 0] == 2) & (t[:, 5] == 1)
    assert page.texts("#matches") == [f"{found.sum()} of 400 rows"]
    assert page.evaluate("location.hash") == "#f=c1=2+c2=*/*/1&s=c2=*/*/1"
    page.click("tr[data-code='8'] button")
    assert page.evaluate("location.hash") == "#f=c1=2+c2=*/*/1&s=c1=*/2"
    page.click("#codes th:first-child button")  # the order of the codes, not of their overlap
    within = [int(text) for text in page.texts("#codes tbody td:nth-child(3)")]
    expected = [np.bincount(t[found, g], minlength=codes) for g, codes in enumerate(OBSERVED.codebooks.num_codes)]
    assert within == np.concatenate(expected).tolist()
    page.evaluate("{ const make = URL.createObjectURL; URL.createObjectURL = b => make(window.saved = b); }")
    page.evaluate("document.getElementById('rows-csv').click()")
    lines = page.evaluate("window.saved.text()").splitlines()
    assert (
        lines[0]
        == "row,slow/L0,slow/L1,slow/L2,fast/L0,fast/L1,fast/L2,step,width,depth,initial condition,noise regime"
    )
    assert [int(line.split(",")[0]) for line in lines[1:]] == OBSERVED.rows[found].tolist()

    members = one_hot(t, OBSERVED.codebooks.offsets)
    effects = code_effects(OBSERVED, members)
    u = effects.codes.tolist().index(8)
    names, values = page.texts("#profile .name:not(.axis)"), page.texts("#profile .value")
    assert len(names) == 9
    for name, value in zip(names, values, strict=True):
        f = effects.names.index(name.replace("\\u2028", "\u2028").replace("\\u202e", "\u202e"))
        shown = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", value.replace("\N{MINUS SIGN}", "-"))]
        effect, half = effects.effect[u, f], effects.half_width[u, f]
        np.testing.assert_allclose(shown, [effect, effect - half, effect + half], atol=0.0052)

    conditions, _ = make_conditions(OBSERVED, 5)
    lifts = lifts_table(OBSERVED, conditions, counts)
    for name, value in zip(page.texts("#lifts .name:not(.axis)"), page.texts("#lifts .value"), strict=True):
        match = re.fullmatch(r"(.*?): (.*) \((\d+)\)", name)
        assert match
        (i,) = rows_where(lifts, codebook="slow/L1", code=2, condition=match[1], value=match[2])
        assert int(match[3]) == lifts["count"][i]
        shown = [float(number) for number in re.findall(r"\d+\.\d+", value)]
        np.testing.assert_allclose(shown, [lifts[key][i] for key in ("lift", "lift_low", "lift_high")], atol=0.0052)


def test_what_differs_is_said_in_words(page: Page) -> None:
    page.press("Escape")
    assert page.texts("#series-help") == ["No time series: the features have no value per time step."]
    assert page.evaluate("getComputedStyle(document.getElementById('series-controls')).display") == "none"
    t, labels = OBSERVED.tokens, OBSERVED.labels["initial condition"]
    search(page, "c1=0 vs 5")
    (text,) = page.texts("#lifts-summary")
    assert text.startswith("Shares of the rows with c1 L0 = 0 against c1 L0 = 5: ")
    assert f"initial condition: {HOSTILE[0]} (100.0 % against 0.00 %)" in text
    search(page, "c1=1")
    share = 100 * (labels == HOSTILE[0]).mean()
    assert f"initial condition: {HOSTILE[0]} (100.0 % against {share:.1f} %)" in page.texts("#lifts-summary")[0]
    page.choose("#condition", "initial condition: waves")
    assert page.texts("#matches") == ["0 of 400 rows"]
    assert page.texts("#best") == ["No row has all of these; remove one of them."]
    page.press("Escape")
    search(page, "c2=2 vs 3")
    assert page.texts("#lifts-summary") == ["No condition differs clearly between the two codes."]
    ami = {c.name: adjusted_mutual_info_score(t[:, 0], c.codes) for c in make_conditions(OBSERVED, 5)[0]}
    assert (
        f"initial condition by codebook c1 L0 ({ami['initial condition']:.2f}" in page.texts("#associations-summary")[0]
    )
    page.press("Escape")


def test_map_tree_and_heatmap(page: Page) -> None:
    page.press("Escape")
    t = OBSERVED.tokens
    # A click on the map keeps a row, whose tokens are shown.
    page.evaluate(
        "{ const map = document.getElementById('map'), box = map.getBoundingClientRect(); let found = false;"
        " for (let x = 5; x < box.width && !found; x += 5) for (let y = 5; y < box.height && !found; y += 5) {"
        " map.dispatchEvent(new MouseEvent('click', {clientX: box.left + x, clientY: box.top + y}));"
        " found = document.querySelectorAll('#readout button').length > 0; } }"
    )
    (readout,) = page.texts("#readout")
    match = re.fullmatch(r"Row (\d+): c1=([\d/]+)c2=([\d/]+)More about it", readout)
    assert match
    shown = [int(code) for text in match.groups()[1:] for code in text.split("/")]
    assert shown == t[OBSERVED.rows.tolist().index(int(match[1]))].tolist()

    # The boxes of the tree count rows, here those that match the filter of the other category.
    search(page, "c2=3")
    page.choose("#category", "c1")
    boxes = dict(text.split(": ") for text in page.texts("#tree title"))
    for path, own in (("c1=2", t[:, 0] == 2), ("c1=2/1", (t[:, 0] == 2) & (t[:, 1] == 1))):
        assert boxes[path].startswith(f"{(own & (t[:, 3] == 3)).sum()} rows, ")
    page.press("Escape")

    conditions, _ = make_conditions(OBSERVED, 5)
    shown = page.texts("#associations thead th")[1:]
    by_name = {c.name: [adjusted_mutual_info_score(t[:, g], c.codes) for g in range(6)] for c in conditions}
    assert sorted(shown) == sorted(by_name)
    assert shown[0] == max(by_name, key=lambda name: max(by_name[name]))  # the condition that is told best
    ami = [by_name[name][g] for g in range(6) for name in shown]
    cells = page.evaluate("[...document.querySelectorAll('#associations td')].map(c => c.firstChild.textContent)")
    np.testing.assert_allclose([float(text.replace("\N{MINUS SIGN}", "-")) for text in cells], ami, atol=0.0052)


def test_keys_errors_and_links(page: Page) -> None:
    page.press("Escape")
    assert page.texts("#matches") == ["400 of 400 rows"]
    page.evaluate("document.activeElement.blur()")
    page.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    for text, message in [
        ("c9=1", "c9: no such category or condition; categories are c1 to c2"),
        ("c1=6", "c1=6: c1 L0 has codes 0 to 5"),
        ("c1=1/1/1/1", "c1=1/1/1/1: c1 has 3 levels"),
        ("<b>", "<b>: write c1=12 or c1=12/4/7; choose conditions under Condition"),
        ("c1=1 c1=2", "c1 can have one code here: write c1=1 vs 2 to compare"),
        ("c1=1/2 slow/L1=3", "c1 L1 can have one code here: write c1=*/2 vs 3 to compare"),
    ]:
        search(page, text)
        assert page.texts("#search-error") == [message]
    search(page, "slow/L1=3")
    assert page.texts("#search-error") == [""]
    assert page.texts(".chip") == ["c1 L1 = 3 \N{MULTIPLICATION SIGN}"]
    page.evaluate("location.hash = '#f=c1=1/*/2&s=c2=3&v=c2=4'")
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    found = (OBSERVED.tokens[:, 0] == 1) & (OBSERVED.tokens[:, 2] == 2)
    assert page.texts("#matches") == [f"{found.sum()} of 400 rows"]
    assert page.texts("#selected") == ["c2 L0 = 3 compared with c2 L0 = 4"]
    page.evaluate("location.hash = '#f=%&s=c7=1'")
    page.evaluate("new Promise(done => setTimeout(done, 50))")
    assert page.texts("#search-error") == ["c7: no such category or condition; categories are c1 to c2"]
    assert page.texts("#matches") == ["400 of 400 rows"]
    page.press("Escape")


def test_hostile_names_are_text_and_the_page_fits_a_phone(page: Page) -> None:
    assert page.evaluate("document.images.length") == 0
    assert HOSTILE[0] in page.texts("#profile .name")
    for width in (390, 1280):
        for dark in (True, False):
            page.resize(width, dark=dark)
            assert page.evaluate("document.documentElement.scrollWidth") <= width

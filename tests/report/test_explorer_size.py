"""Pages above 20 MB: what is reduced, in which order, and what the page and the log say."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import pytest
from browser import PROGRAM, Page, browser_page
from dashboards import explorer_contents
from planted import operators

from spinlock_fast.errors import DataError
from spinlock_fast.report.explorer import page_size
from spinlock_fast.report.explorer.data import ExplorerData, explorer_data
from spinlock_fast.report.explorer.fields import FieldPictures
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.page_size import check_size, fitting_page
from spinlock_fast.report.explorer.series import Series, SeriesPlots

OBSERVED = operators(400, seed=3)
ABOUT = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
ROWS = np.arange(400)
LEVELS = np.random.default_rng(0).integers(0, 255, (400, 6), np.uint8)
PIXELS = np.random.default_rng(1).random((400, 3, 4))


def full_contents() -> ExplorerData:
    """Contents with series and pictures of all 400 rows."""
    contents = explorer_data(OBSERVED, ABOUT)
    band = np.repeat([[-1.0], [0.0], [1.0]], 6, axis=1).astype(np.float32)
    codes = np.zeros(len(contents.columns["profile/codes"]), np.float32)
    contents.add_series(
        SeriesPlots(ROWS, 400, [Series("mean", np.arange(6), 6, band, -2.0, 2.0, codes, codes, LEVELS)])
    )
    contents.add_pictures(FieldPictures(ROWS, {"initial field": PIXELS}, "channel 0"))
    return contents


def sizes_by_reduction() -> list[int]:
    """Sizes of the page after 0, 1, ... reductions."""
    contents = full_contents()
    sizes = [len(build_page(contents, "t").encode())]
    for _, reduce in page_size._REDUCTIONS:
        assert reduce(contents) is not None
        sizes.append(len(build_page(contents, "t").encode()))
    return sizes


SIZES = sizes_by_reduction()


@pytest.mark.parametrize("steps", range(6))
def test_parts_are_reduced_until_the_page_fits(
    steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Between two sizes; the note adds up to 400 bytes.
    monkeypatch.setattr(page_size, "MAX_BYTES", SIZES[steps] + 400 * (steps > 0))
    contents = full_contents()
    samples = contents.examples()[0]
    with caplog.at_level(logging.WARNING):
        page = fitting_page(contents, "t")
    assert len(page.encode()) <= page_size.MAX_BYTES
    header, columns = explorer_contents(page)
    messages = [record.getMessage() for record in caplog.records]
    texts = {
        0: [],
        1: ["nearest quarter"],
        2: ["nearest quarter", "fields are kept of"],
        3: ["nearest quarter", "fields are kept of", "time series are kept of"],
        4: ["nearest sixteenth", "fields are kept of", "time series are kept of"],
        5: ["nearest sixteenth", "fields are left out", "time series are kept of"],
    }[steps]
    assert len(messages) == (steps > 0)
    for message in messages:
        note = message.removeprefix("explorer.html: ")
        assert note == header["notes"][-1]
        assert note.startswith("the page would have 1")
        assert note.endswith("; fewer rows (--rows) keep more")
        parts = note.split(": ", 1)[1].split("; ")[:-1]
        assert [text in part for text, part in zip(texts, parts, strict=True)] == [True] * len(texts)
    assert [note for note in header["notes"] if note.startswith("fields")] == []

    limit = {0: 255, 1: 127, 2: 127, 3: 127}.get(steps, 63)
    assert header["rank_limit"] == limit
    full = full_contents().columns
    for g in range(6):
        np.testing.assert_array_equal(columns[f"rank/{g}"], np.minimum(full[f"rank/{g}"], limit))
        np.testing.assert_array_equal(columns[f"tokens/{g}"], OBSERVED.tokens[:, g])
    nearest = np.unique(samples)
    for name, first, last in (("series", 3, 5), ("field", 2, 4)):
        if steps > last:
            continue
        kept = nearest if steps >= first else ROWS
        np.testing.assert_array_equal(columns[f"{name}/rows"], kept)
        np.testing.assert_array_equal(
            columns[f"{name}/0"].reshape(len(kept), -1), full[f"{name}/0"].reshape(400, -1)[kept]
        )
    if steps == 5:
        assert header["fields"] is None
        assert not [name for name in columns if name.startswith("field/")]


def test_a_page_that_is_too_large_nevertheless_names_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_size, "MAX_BYTES", SIZES[5] - 1000)
    with pytest.raises(DataError, match=r"^explorer.html would have .*: use --rows \d+$"):
        fitting_page(full_contents(), "t")


def test_the_named_rows_fit() -> None:
    # Half of the page are values of rows, which do not compress: a page of 40 MB fits with a few rows.
    values = np.random.default_rng(0).integers(0, 256, 40_000, np.uint8)
    contents = ExplorerData({"rows": 40_000}, {"tokens/0": values, "profile/auc": values[:10_000]})
    check_size(20_000_000, contents)
    with pytest.raises(DataError, match=r"explorer.html would have 40 MB, at most 20 MB: use --rows 13000$"):
        check_size(40_000_000, contents)  # 32 MB of rows, 8 MB others: 19 - 8 = 11 MB are 13,750 rows
    with pytest.raises(DataError, match="use a smaller model"):
        check_size(400_000_000, contents)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine")
    contents = full_contents()
    page_size._REDUCTIONS[0][1](contents)
    file = tmp_path_factory.mktemp("explorer") / "explorer.html"
    file.write_text(build_page(contents, "t"), encoding="utf-8")
    with browser_page() as page:
        page.resize(1280)
        page.open(file)
        yield page


RANKS = full_contents().columns["rank/0"]


def rows_of_filters() -> Iterator[tuple[str, np.ndarray]]:
    """Filters by a code of c1 and all codes of c2, with their rows, the nearest to the code of c1 first."""
    for row in OBSERVED.tokens[:, [0, 3, 4, 5]].tolist():
        found = np.flatnonzero((OBSERVED.tokens[:, [0, 3, 4, 5]] == row).all(1))
        order = np.lexsort((found, np.minimum(RANKS[found], 127)))
        yield "c2={}/{}/{} c1={}".format(*row[1:], row[0]), found[order][:10]


def expected_rank(row: int) -> str:
    ranks = RANKS[OBSERVED.tokens[:, 0] == OBSERVED.tokens[row, 0]]
    return f"over {(ranks < 127).sum()}" if RANKS[row] >= 127 else str(1 + (ranks < RANKS[row]).sum())


def test_ranks_beyond_the_limit_are_shown_as_such(page: Page) -> None:
    search, rows = next(each for each in rows_of_filters() if 0 < (RANKS[each[1]] >= 127).sum() < len(each[1]))
    page.press("Escape")
    page.write("#search", search)
    assert page.texts("#examples tbody td:nth-child(1)") == [str(row) for row in OBSERVED.rows[rows]]
    assert page.texts("#examples tbody td:nth-child(2)") == [expected_rank(row) for row in rows.tolist()]
    assert page.texts("#best button.row") == [f"Most typical row: {OBSERVED.rows[rows[0]]}"]


def test_a_row_that_is_not_typical_is_not_called_so(page: Page) -> None:
    search, rows = next(each for each in rows_of_filters() if (RANKS[each[1]] >= 127).all())
    page.press("Escape")
    page.write("#search", search)
    expected = f"One of the rows, none of them typical: {OBSERVED.rows[rows[0]]}"
    assert page.texts("#best button.row") == [expected]

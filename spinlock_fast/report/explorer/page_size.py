"""Keeps the page below 20 MB: what is needed least is reduced, and the page and the log say so."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable

import numpy as np

from spinlock_fast.errors import DataError
from spinlock_fast.messages import format_bytes
from spinlock_fast.report.explorer.data import MIN_ROWS, ExplorerData
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.rows import RANK_STEPS

MAX_BYTES = 20_000_000
FILE = "explorer.html"

log = logging.getLogger(__name__)


def fitting_page(contents: ExplorerData, title: str) -> str:
    """The page, without parts of `contents` where it would exceed 20 MB with them.

    Raises:
        DataError: the page exceeds 20 MB nevertheless.
    """
    page = build_page(contents, title)
    for reduce in _REDUCTIONS:
        size = len(page.encode())
        if size <= MAX_BYTES:
            return page
        note = reduce(contents)
        if note is None:
            continue
        sizes = f"{format_bytes(size)}, at most {format_bytes(MAX_BYTES)}"
        text = f"{note}, as the page would have {sizes}; fewer rows (--rows) keep more"
        contents.header["notes"].append(text)
        log.warning("%s: %s", FILE, text)
        page = build_page(contents, title)
    check_size(len(page.encode()), contents)
    return page


def check_size(size: int, contents: ExplorerData) -> None:
    """Raises DataError for a page above 20 MB, with the number of rows that would fit."""
    if size <= MAX_BYTES:
        return
    N = contents.header["rows"]
    packed = {name: len(zlib.compress(column.tobytes())) for name, column in contents.columns.items()}
    of_rows = sum(packed[name] for name, column in contents.columns.items() if len(column) == N)
    fitting = int(N * (1 - (size - 0.95 * MAX_BYTES) / (size * of_rows / sum(packed.values()))))
    advice = f"use --rows {fitting // 1000 * 1000 or fitting}" if fitting >= MIN_ROWS else "use a smaller model"
    raise DataError(f"{FILE} would have {format_bytes(size)}, at most {format_bytes(MAX_BYTES)}: {advice}")


def _limit_ranks(contents: ExplorerData, share: float, text: str) -> str:
    """Ranks of distances above those of the nearest rows of a code become equal."""
    limit = int(RANK_STEPS * share**0.5)  # as in `distance_ranks`
    for name, column in contents.columns.items():
        if name.startswith("rank/"):
            contents.columns[name] = np.minimum(column, np.uint8(limit))
    contents.header["rank_limit"] = limit
    return f"the ranks of rows by their distance are kept of the nearest {text} of the rows of a code"


def _limit_to_nearest(contents: ExplorerData, part: str, names: list[str], text: str) -> str | None:
    """Keeps the blocks of rows that are nearest to a code; None if there are no others."""
    rows = contents.columns.get(f"{part}/rows")
    if rows is None:
        return None
    kept = np.isin(rows, contents.examples()[0])
    if kept.all():
        return None
    contents.columns[f"{part}/rows"] = rows[kept]
    for name in names:
        contents.columns[name] = contents.columns[name].reshape(len(rows), -1)[kept].ravel()
    return f"{text} are kept of {int(kept.sum()):,} rows, the nearest to the codes"


def _limit_fields(contents: ExplorerData) -> str | None:
    kinds = (contents.header["fields"] or {}).get("kinds", [])
    return _limit_to_nearest(contents, "field", [f"field/{i}" for i in range(len(kinds))], "fields")


def _limit_series(contents: ExplorerData) -> str | None:
    series = (contents.header["series"] or {}).get("series", [])
    return _limit_to_nearest(contents, "series", [f"series/{i}" for i in range(len(series))], "time series")


def _remove_fields(contents: ExplorerData) -> str | None:
    if contents.header["fields"] is None:
        return None
    contents.header["fields"] = None
    for name in [name for name in contents.columns if name.startswith("field/")]:
        del contents.columns[name]
    return "fields are left out"


# In this order, until the page is small enough.
_REDUCTIONS: tuple[Callable[[ExplorerData], str | None], ...] = (
    lambda contents: _limit_ranks(contents, 1 / 4, "quarter"),
    _limit_fields,
    _limit_series,
    lambda contents: _limit_ranks(contents, 1 / 16, "sixteenth"),
    _remove_fields,
)

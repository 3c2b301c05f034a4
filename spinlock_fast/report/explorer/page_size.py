"""Keeps the page below 20 MB: what is needed least is reduced, and the page and the log say so."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable

import numpy as np

from spinlock_fast.errors import DataError
from spinlock_fast.messages import format_bytes
from spinlock_fast.report.explorer.data import FIELDS_NOTE, MIN_ROWS, ExplorerData
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
    full = len(page.encode())
    notes: dict[str, str] = {}  # by the part that is reduced
    for part, reduce in _REDUCTIONS:
        if len(page.encode()) <= MAX_BYTES:
            break
        note = reduce(contents)
        if note is None:
            continue
        notes[part] = note
        page = build_page(contents, title)
    if not notes:
        check_size(full, contents)
        return page
    text = f"the page would have {format_bytes(full)}, at most {format_bytes(MAX_BYTES)}: {'; '.join(notes.values())}"
    kept = [note for note in contents.header["notes"] if not ("field" in notes and note.startswith(FIELDS_NOTE))]
    contents.header["notes"] = [*kept, f"{text}; fewer rows (--rows) keep more"]
    page = build_page(contents, title)
    check_size(len(page.encode()), contents)
    log.warning("%s: %s; fewer rows (--rows) keep more", FILE, text)
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
    return f"ranks by distance are kept of the nearest {text} of the rows of each code"


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
_REDUCTIONS: tuple[tuple[str, Callable[[ExplorerData], str | None]], ...] = (
    ("rank", lambda contents: _limit_ranks(contents, 1 / 4, "quarter")),
    ("field", _limit_fields),
    ("series", _limit_series),
    ("rank", lambda contents: _limit_ranks(contents, 1 / 16, "sixteenth")),
    ("field", _remove_fields),
)

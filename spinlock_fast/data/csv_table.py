"""CSV files that users name: a line of column names, then a line for each row of the data."""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path

from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line, printable, shown

_MAX_LISTED = 6


@dataclass(frozen=True)
class CsvTable:
    """The texts of a CSV file, without spaces around them.

    Args:
        path: of the file.
        names: [P] names of the columns.
        rows: [N] lists of P texts.
        lines: [N] number of each row's line in the file, from 1.
    """

    path: Path
    names: list[str]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """The texts [N] of a column; raises DataError if no column or several columns have the name."""
        count = self.names.count(name)
        if count == 0:
            close = difflib.get_close_matches(name, self.names, 1, cutoff=0.4)
            hint = f"nearest is {close[0]}" if close else f"it has {self.listed_names()}"
            raise DataError(f"{self.path}: no column {name}; {hint}")
        if count > 1:
            raise DataError(f"{self.path}: {count} columns are named {name}; give them different names")
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> list[float]:
        """The numbers [N] of a column; raises DataError naming the first line without one."""
        values = []
        for line, text in zip(self.lines, self.column(name), strict=True):
            try:
                values.append(float(text))
            except ValueError:
                found = f"got {shown(text)}" if text else "is empty"
                raise DataError(f"{self.path}: line {line}: {printable(name)}: expected a number, {found}") from None
        return values

    def listed_names(self) -> str:
        """The first names, for messages."""
        more = f" and {len(self.names) - _MAX_LISTED} more" if len(self.names) > _MAX_LISTED else ""
        return ", ".join(self.names[:_MAX_LISTED]) + more


def read_csv(path: Path) -> CsvTable:
    """Reads a CSV file with commas in UTF-8; empty lines are skipped.

    Raises:
        DataError: the file cannot be read, is empty, has another separator, or lines of different lengths.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            found = [(reader.line_num, [text.strip() for text in row]) for row in reader if row]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8: {one_line(error)}") from None
    if not found:
        raise DataError(f"{path}: is empty; expected a line of column names")
    (_, names), *rows = found
    for separator in ";\t":
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{path}: columns are separated by {separator!r}; expected commas")
    for line, row in rows:
        if len(row) != len(names):
            raise DataError(f"{path}: line {line} has {len(row)} values, the first line has {len(names)}")
    return CsvTable(path, names, [row for _, row in rows], [line for line, _ in rows])

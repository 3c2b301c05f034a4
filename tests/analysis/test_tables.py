import csv

import numpy as np

from spinlock_fast.analysis.tables import write_tables


def test_no_cell_is_a_formula_or_an_escape_sequence(tmp_path):
    names = np.array(
        ["=1+1", "+cmd|' /C calc'!A0", "-2+f(3)", "@SUM(A1)", "\x1b[31mred\nline", "-0.5", "plain", "-1.5 0.2"]
    )
    write_tables({"t": {"=name": names, "value": np.arange(8) - 4.0}}, tmp_path, ("csv",))
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["'=name", "value"]
    assert [row[0] for row in rows] == [
        "'=1+1",
        "'+cmd|' /C calc'!A0",
        "'-2+f(3)",
        "'@SUM(A1)",
        "\\x1b[31mred\\nline",
        "-0.5",
        "plain",
        "-1.5 0.2",
    ]
    assert [float(row[1]) for row in rows] == list(np.arange(8) - 4.0)

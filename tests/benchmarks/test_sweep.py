"""The runs of a study: lines, failures, and a killed worker. What is measured are functions of the standard library."""

from __future__ import annotations

import importlib
import json
import operator
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.studies.sweep import append, lines_of, pending, sweep


class Run(NamedTuple):
    name: str
    seed: int
    mode: str = "report"


@pytest.mark.parametrize("jobs", [1, 3])
def test_rows_are_kept_and_failures_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str], jobs: int) -> None:
    output = tmp_path / "new" / "lines.jsonl"
    runs = {"first": '[{"a": 1.5, "b": "x"}, {"a": 2, "b": "y"}]', "wrong": "[", "last": '[{"a": 3, "b": "z"}]'}
    assert sweep(runs, json.loads, partial(append, output), ["a", "b"], jobs=jobs) == 1
    assert sorted(row["b"] for row in lines_of(output)) == ["x", "y", "z"]
    said = capfd.readouterr().out
    assert "first: a=1.5 b=x\n" in said
    assert "wrong: failed: JSONDecodeError: Expecting value" in said
    assert "[3/3, " in said


@pytest.mark.parametrize(
    ("measure", "argument", "text"),
    [
        (importlib.import_module, "no_such_module", "failed: ModuleNotFoundError: No module named 'no_such_module'"),
        (os._exit, 3, "error: run: the worker process ended with exit status 3"),
    ],
)
def test_a_run_that_cannot_work_has_one_line(
    measure: Callable[[Any], Any], argument: object, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = ""
    try:
        assert sweep({"run": argument}, measure, print, []) == 1
    except SystemExit as error:
        ended = str(error)
    said = capfd.readouterr()
    assert text in said.out + ended
    assert said.err == ""


def test_no_run_starts_after_the_deadline(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep({"run": "[{}]"}, json.loads, pytest.fail, [], deadline=time.time() - 1.0) == 0
    assert "time limit: 1 runs are left" in capfd.readouterr().out
    assert sweep({}, json.loads, pytest.fail, []) == 0


def test_runs_that_are_alike_share_what_is_prepared(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    runs = {
        "first": {"y": [{"a": 1}], "x": [{"a": 2}]},
        "second": {"b": [{"a": 3}], "x": [{"a": 4}]},  # "x" was prepared for the first one, not "b"
        "other": {"b": [{"a": 5}]},
    }
    assert sweep(runs, operator.getitem, partial(append, output), ["a"], prepare=min, alike=len) == 0
    assert [row["a"] for row in lines_of(output)] == [2, 4, 5]
    wrong = {"first": "[", "second": "{", "other": "1.5 "}
    assert sweep(wrong, operator.getitem, pytest.fail, [], prepare=json.loads, alike=str.isspace) == 3


def test_runs_with_a_line_are_left_out(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    runs = [Run("a", 0), Run("a", 1), Run("a", 1, "select"), Run("b", 1)]
    assert pending(output, runs) == runs
    append(output, {"seed": 1, "name": "a", "error": 0.5}, {"seed": 1, "name": "b", "mode": "select"})
    assert pending(output, runs) == [runs[0], *runs[2:]]
    append(output, {"seed": 1})
    with pytest.raises(SystemExit, match=r"lines.jsonl: has a line without 'name': choose another --output"):
        pending(output, runs)


def test_an_incomplete_line_is_ignored_and_ended(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    append(output, {"a": 1})
    with output.open("a") as file:
        file.write('{"a": 2')  # killed while it wrote
    assert lines_of(output) == [{"a": 1}]
    append(output, {"a": 3})
    assert lines_of(output) == [{"a": 1}, {"a": 3}]

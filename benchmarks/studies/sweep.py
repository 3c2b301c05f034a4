"""The runs of a study, performed by the worker processes of `ablate`; a line of JSON for each finished one."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from spinlock_fast.ablation.records import Record
from spinlock_fast.ablation.runs import Display, Group, perform_groups
from spinlock_fast.ablation.tables import markdown
from spinlock_fast.ablation.worker import Reply
from spinlock_fast.errors import SpinlockFastError, TrainingError

Row = dict[str, Any]
ArgumentT = TypeVar("ArgumentT")


def study_parser(text: str | None, *, required: bool = True) -> argparse.ArgumentParser:
    """A parser with `--output` and `--jobs`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=required, help="file of results, continued if it exists")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    return parser


def lines_of(output: Path) -> list[Row]:
    """The rows of a JSON lines file; an incomplete last line of a killed process is ignored."""
    rows = []
    for line in output.read_text(encoding="utf-8").splitlines() if output.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(output: Path, *rows: Row) -> None:
    """Appends lines with a single write: those of several processes do not mix, and those of one run are all there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        incomplete = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(("\n" * incomplete + "".join(f"{json.dumps(row)}\n" for row in rows)).encode())


def pending(output: Path, runs: Iterable[Any]) -> list[Any]:
    """The runs without a line in a file; a field that a line does not have is the default of the named tuple."""
    rows = lines_of(output)
    try:
        return [
            run
            for run in runs
            if not any(run == tuple({**run._field_defaults, **row}[name] for name in run._fields) for row in rows)
        ]
    except KeyError as error:
        raise SystemExit(f"{output}: has a line without {error}: choose another --output") from None


def perform(
    chosen: argparse.Namespace,
    runs: Iterable[Any],
    measure: Callable[..., Row | list[Row]],
    shown: Sequence[str],
    *,
    prepare: Callable[..., Any] | None = None,
    **more: Any,
) -> int:
    """Performs the runs that have no line in `--output`, and appends their lines; the exit status.

    Args:
        chosen: options, with those of `study_parser`; the last argument of `measure` and `prepare`.
        runs: named tuples, whose fields are entries of the lines.
        measure: the other entries of the line, or of each line, of a run.
        shown, prepare, more: see `sweep`.
    """
    failed = sweep(
        {"/".join(map(str, run)): run for run in pending(chosen.output, runs)},
        partial(_lines, measure, chosen),
        partial(append, chosen.output),
        shown,
        prepare=prepare and partial(prepare, chosen=chosen),
        jobs=chosen.jobs,
        **more,
    )
    return min(failed, 1)


def _lines(measure: Callable[..., Any], chosen: argparse.Namespace, run: Any, *prepared: Any) -> list[Row]:
    measured = measure(run, *prepared, chosen)
    return [{**run._asdict(), **row} for row in ([measured] if isinstance(measured, dict) else measured)]


def sweep(
    runs: Mapping[str, ArgumentT],
    measure: Callable[..., Sequence[Row]],
    keep: Callable[..., object],
    shown: Sequence[str],
    *,
    prepare: Callable[[ArgumentT], Any] | None = None,
    alike: Callable[[ArgumentT], Hashable] = lambda _: None,
    jobs: int = 1,
    threads: int = 1,
    deadline: float = math.inf,
) -> int:
    """Performs the runs and prints a line for each row; one that fails does not end the others.

    Args:
        runs: argument of `measure` by the name of the run, started in order.
        measure: trains and measures a run in a worker process; pickled. Returns the rows of the run. With `prepare`,
            its second argument is what that returned.
        keep: called with the rows of a finished run.
        shown: printed entries of the rows.
        prepare: called in a worker process with the argument of the first of the runs that are alike; pickled.
        alike: runs with equal values share what is prepared.
        jobs: number of worker processes.
        threads: CPU threads of each.
        deadline: `time.time()` after which no run is started.

    Returns:
        The number of runs that failed.
    """
    if not runs:
        return 0
    members: dict[Hashable, list[_Run[ArgumentT]]] = {}
    for name, argument in runs.items():
        members.setdefault(alike(argument), []).append(_Run(name, argument))

    def task(run: _Run[ArgumentT], prepared: bytes | None) -> _Task:
        return _Task(measure, (run.argument,), prepared)

    call = prepare and partial(_pickled, prepare)
    groups = [Group(own, task, call and _Task(call, (own[0].argument,))) for own in members.values()]
    workers = [""] * min(jobs, len(runs))  # `measure` knows its device
    try:
        failures = perform_groups(groups, workers, threads, _Lines(len(runs), keep, shown), deadline)
    except SpinlockFastError as error:  # a worker process was killed
        raise SystemExit(f"error: {error}") from None
    if left := sum(len(group.pending) for group in groups):
        print(f"time limit: {left} runs are left", flush=True)
    return len(failures)


def tables(rows: Sequence[Row], measures: Sequence[str], base: str, scored: str = "the validation rows") -> str:
    """The tables of `ablate` as Markdown: means of each variant over seeds, and paired differences to the base.

    Args:
        rows: with `variant`, `seed`, the measures, and `device` where it is known.
        measures: names of the entries to compare.
        base: the variant that the others are compared with.
        scored: what the measures are of.
    """
    records = [
        Record(
            variant=row["variant"], position=0, seed=row["seed"], identity="", counts={}, date="",
            measures={name: row[name] for name in measures}, device=row.get("device", ""),
        )
        for row in sorted(rows, key=lambda row: (row["variant"] != base, row["variant"], row["seed"]))
    ]  # fmt: skip
    return markdown(records, dict(zip(measures, measures, strict=True)), base, scored)


@dataclass(frozen=True)
class _Run(Generic[ArgumentT]):
    name: str
    argument: ArgumentT = field(compare=False)


def _pickled(prepare: Callable[[Any], Any], argument: object) -> bytes:
    """What is prepared, as bytes: a connection would send its tensors as memory that all runs share."""
    return pickle.dumps(prepare(argument))


@dataclass(frozen=True)
class _Task:
    """A call in a worker process, with what was prepared as its last argument."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    prepared: bytes | None = None

    def perform(self, device: str, reply: Reply) -> Any:
        prepared = () if self.prepared is None else (pickle.loads(self.prepared),)
        try:
            return self.function(*self.arguments, *prepared)
        except SpinlockFastError:
            raise
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{type(error).__name__}: {error}") from None


class _Lines(Display["_Run[ArgumentT]"]):
    """Prints a line for each row."""

    def __init__(self, runs: int, keep: Callable[..., object], shown: Sequence[str]) -> None:
        self._runs, self._keep, self._shown = runs, keep, shown
        self._done, self._started = 0, time.monotonic()

    def _print(self, run: _Run[ArgumentT], text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"[{self._done}/{self._runs}, {seconds:.0f} s] {run.name}: {text}", flush=True)

    def finished(self, run: _Run[ArgumentT], result: Sequence[Row]) -> None:
        self._done += 1
        self._keep(*result)
        for row in result:
            values = [(name, row[name]) for name in self._shown]
            self._print(run, " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in values))

    def failed(self, run: _Run[ArgumentT], error: SpinlockFastError) -> None:
        self._done += 1
        self._print(run, f"failed: {error}")

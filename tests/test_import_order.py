"""Imports between the folders of the package run one way and without cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import spinlock_fast

PACKAGE = Path(spinlock_fast.__file__).parent

# From the bottom up. A module imports modules of lower floors, and of its own folder.
FLOORS = [
    {"_native", "_version", "messages", "plot_style"},
    {"errors", "interrupts"},
    {"distributed"},
    {"config"},
    {"kernels"},
    {"device"},
    {"output"},
    {"data"},
    {"quantize", "descriptors"},
    {"features"},
    {"models"},
    {"dropin"},
    {"checkpoints"},
    {"estimators"},
    {"tokenizer", "compat"},
    {"training", "simulate", "trajectories", "behaviour_loss"},
    {"analysis", "prediction", "ablation", "drift"},
    {"report"},
    {"commands"},
]
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}
DOORS = {path.stem for path in PACKAGE.glob("*.py")} - FLOOR_OF.keys() - {"__init__"} | {"report.__main__"}


def modules() -> dict[str, Path]:
    """Dotted name inside of the package -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, at the top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("spinlock_fast.") in known else module for name in names]
        else:
            continue
        for name in names:
            if name.startswith("spinlock_fast."):
                yield name.removeprefix("spinlock_fast.")


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports_of(path, known)) - {name} for name, path in known.items() if name}


def room(module: str) -> str:
    """The top-level folder or module of a dotted name; each command module counts separately."""
    return module if module in DOORS else module.split(".")[0]


def test_imports_run_down(graph: dict[str, set[str]]) -> None:
    top = len(FLOORS)
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if room(name) != room(target) and FLOOR_OF.get(room(name), top) <= FLOOR_OF.get(room(target), top)
    ]
    assert not wrong


def test_no_module_is_outside_of_the_rooms(graph: dict[str, set[str]]) -> None:
    assert {room(name) for name in graph} <= FLOOR_OF.keys() | DOORS


def test_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter({name: targets & graph.keys() for name, targets in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))

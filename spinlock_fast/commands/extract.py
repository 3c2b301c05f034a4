"""Implementation of the command `extract`."""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from pathlib import Path

import h5py

from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import ConfigError
from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import TrajectorySet

log = logging.getLogger(__name__)


def run_extract(chosen: argparse.Namespace) -> Path:
    """Runs `extract` with parsed arguments; returns the output path."""
    options = _options(chosen)
    shard = parse_shard(chosen.shard)
    device = resolve_device(chosen.device)
    ranks = current_ranks()
    quiet = chosen.quiet or not ranks.is_main
    with RunDisplay(quiet, LoggingConfig()) as display:

        def opened(trajectories: TrajectorySet) -> None:
            shape = trajectories.shape
            grid = " x ".join(map(str, shape.grid.extents))
            periodic = "".join(
                name for name, is_so in zip(shape.grid.axis_names, shape.grid.periodic, strict=True) if is_so
            )
            display.stage(
                f"{trajectories.layout}: {trajectories.samples:,} trajectories of {shape.steps} states, "
                f"{len(shape.channels)} channels on {grid} points, periodic: {periodic or 'none'}, "
                f"{len(trajectories.parameters)} parameters"
            )
            if not quiet:
                for note in trajectories.notes:
                    sys.stderr.write(f"note: {note}\n")

        output = extract(
            chosen.files,
            Path(chosen.output),
            chosen.layout,
            options,
            shard,
            device,
            chosen.overwrite,
            chosen.resume,
            opened,
            lambda done, total: display.encoded("trajectories", done, total),
            ranks,
        )
        if ranks.is_main:
            _warn_of_diverged(output)
    return output


def _warn_of_diverged(output: Path) -> None:
    with h5py.File(output, "r") as file:
        diverged, count = int(file["metadata/diverged"][:].sum()), len(file["metadata/diverged"])
    if diverged:
        log.warning(
            "%d of %d trajectories diverged: their features are missing values, and metadata/diverged is 1",
            diverged,
            count,
        )


def _options(chosen: argparse.Namespace) -> Options:
    try:
        budget = parse_bytes(chosen.memory_budget)
    except ValueError as error:
        raise ConfigError(f"--memory-budget: {error}, got {chosen.memory_budget!r}") from None
    if chosen.time_step is not None and not (math.isfinite(chosen.time_step) and chosen.time_step > 0.0):
        raise ConfigError(f"--time-step: {chosen.time_step:g}, expected a positive number")
    return Options(
        dataset=chosen.dataset,
        axes=chosen.axes,
        fields=_names(chosen.fields),
        spacing=_spacing(chosen.spacing),
        time_step=chosen.time_step,
        periodic=chosen.periodic,
        memory_budget=budget,
        initial_fields=chosen.initial_fields,
        parameters=chosen.parameters,
    )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _spacing(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not 1 <= len(values) <= 3 or not all(math.isfinite(value) and value > 0.0 for value in values):
        raise ConfigError(f"--spacing: {text!r}, expected one to three positive numbers, such as 0.1 or 0.1,0.2")
    return values


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"; raises ConfigError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])

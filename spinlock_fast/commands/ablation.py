"""The command `ablate`: plans the runs, performs those that are missing, and prints the tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from spinlock_fast.ablation.output_files import write_tables
from spinlock_fast.ablation.plan import RUNS, Run, plan_runs, plan_variants, shard_of
from spinlock_fast.ablation.records import Record, collect, data_identity, finished, in_order
from spinlock_fast.ablation.runs import perform
from spinlock_fast.commands.ablation_display import SweepDisplay, print_tables
from spinlock_fast.commands.dry_run import probe_step
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import LoggingConfig, RunConfig
from spinlock_fast.data.split import split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, Interrupted, SpinlockFastError
from spinlock_fast.features.encode import encode_seconds, make_encoders
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.output.atomic_files import check_writable
from spinlock_fast.training.preparation import open_source

_MAX_LINES = 20  # of failed runs
_WORK = ".work"


def ablate(chosen: argparse.Namespace) -> None:
    """Performs the command with its parsed options; raises the error of the first run that failed."""
    output = _output_directory(chosen)
    if chosen.collect:
        with SweepDisplay([], 1, chosen.quiet, LoggingConfig()):
            _make_tables(output, collect(output))
        return
    base = _base(chosen)
    variants, omitted = plan_variants(base, chosen.drop, chosen.sets, chosen.levels, chosen.grid)
    for label in omitted:
        sys.stderr.write(f"{label}: has the settings of another variant, left out\n")
    variants = [replace(variant, config=resolve_families(variant.config)) for variant in variants]
    datasets = {json.dumps(variant.config.datasets(), sort_keys=True): variant.config for variant in variants}
    for config in datasets.values():
        open_source(config).close()
    runs = plan_runs(variants, chosen.seeds, output, data_identity(base))
    if chosen.shard is not None:
        runs = shard_of(runs, *chosen.shard)
    done = finished(runs)
    missing = [run for run in runs if run not in done]
    devices = _devices(base.device, chosen.jobs)
    if chosen.dry_run:
        _print_plan(runs, missing, base, len(devices), output)
        return
    check_writable(output)
    with SweepDisplay(runs, len(devices), chosen.quiet, base.logging) as display:
        for run, record in done.items():
            display.already_finished(run, record)
        scratch = output / _WORK / "-of-".join(map(str, chosen.shard or (0, 1)))
        threads = max(1, torch.get_num_threads() // len(devices))
        try:
            failures = perform(missing, devices[: len(missing)], threads, scratch, chosen.keep_checkpoints, display)
        except Interrupted as stopped:
            left = len(finished(runs))
            raise Interrupted(
                f"interrupted: {left} of {len(runs)} runs are finished; the same command goes on",
                stopped.exit_status - 128,
            ) from None
        display.end_live()
        _remove_if_empty(output / _WORK)
        records = in_order(finished(runs).values())
        if chosen.shard is not None:
            text = f"shard {'/'.join(map(str, chosen.shard))}: {len(records)} of {len(runs)} runs are finished"
            sys.stdout.write(f"{text}; --collect makes the table\n")
        elif records:
            _make_tables(output, records)
    if failures:
        raise _failure(failures)


def _output_directory(chosen: argparse.Namespace) -> Path:
    return Path(chosen.output or Path("ablations") / Path(chosen.config).stem)


def _base(chosen: argparse.Namespace) -> RunConfig:
    """The base configuration with its families; raises ConfigError, DataError."""
    changes = [*chosen.base, *([f"device={json.dumps(chosen.device)}"] if chosen.device else [])]
    config = load_config(chosen.config, changes)
    if config.training.init_from is not None:
        raise ConfigError("training.init_from: ablate trains every variant from scratch; leave the key out")
    resolve_device(config.device)
    return resolve_families(config)


def _devices(device: str, jobs: int | None) -> list[str]:
    """The device of each worker process; CUDA devices in turn."""
    resolved = resolve_device(device)
    if resolved.type != "cuda":
        return [str(resolved)] * (jobs or 1)
    names = [str(resolved)] if resolved.index is not None else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] for i in range(jobs or len(names))]


def _make_tables(output: Path, records: list[Record]) -> None:
    written = write_tables(output, records)
    print_tables(records)
    sys.stdout.write(f"\nwritten: {', '.join(map(str, written))}\n")


def _failure(failures: dict[Run, SpinlockFastError]) -> SpinlockFastError:
    """One error with a line for each failed run."""
    lines = [f"{run.name}: {line}" for run, error in failures.items() for line in error.lines]
    if len(lines) > _MAX_LINES:
        lines = [*lines[:_MAX_LINES], f"and {len(lines) - _MAX_LINES} more"]
    first = next(iter(failures.values()))
    return type(first)(*lines)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not os.listdir(directory):
        directory.rmdir()


def _print_plan(runs: list[Run], missing: list[Run], base: RunConfig, jobs: int, output: Path) -> None:
    """Prints the runs and an estimate of the time, measured on the base."""
    preparations = len({run.preparation for run in missing})
    encoding, training = _seconds(base)
    variants = list(dict.fromkeys(run.variant for run in runs))
    lines = [f"{len(runs)} runs of {len(variants)} variants, {len(runs) - len(missing)} of them finished:"]
    for variant in variants:
        seeds = [f"{run.seed}{'' if run in missing else ' (finished)'}" for run in runs if run.variant == variant]
        lines.append(f"  {variant}: seeds {', '.join(seeds)}")
    total = (preparations * encoding + len(missing) * training) / jobs
    lines += [
        f"features: encoded {preparations} times, about {encoding:.0f} s each",
        f"time: about {total:.0f} s, {training:.0f} s a run, {jobs} side by side, extrapolated from the base without "
        "early stopping",
        f"output: {output / RUNS}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def _seconds(config: RunConfig) -> tuple[float, float]:
    """Estimated seconds to encode the features of the base, and to train on them."""
    device = resolve_device(config.device)
    training = config.training
    with open_source(config) as source:
        split = split_rows(source.rows, training, config.random_seed)
        encoders = make_encoders(source, config.families, config.random_seed, config.memory_budget, split.train)
        encoding = encode_seconds(source, encoders, config.memory_budget, device)
    batch = min(training.batch_size, split.train.size)
    columns = sum(family.encoder.output_dim for family in encoders)
    steps = training.num_epochs * -(-split.train.size // batch)
    return encoding, steps * probe_step(config, columns, batch, device)

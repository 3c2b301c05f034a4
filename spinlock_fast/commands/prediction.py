"""The work of `predict`: training, measuring and applying a predictor, with progress."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from spinlock_fast.checkpoints.directory import finite_or_null
from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import DataError, OutputError
from spinlock_fast.models.input_check import TEST, TRAIN, UNKNOWN
from spinlock_fast.output.atomic_files import write_json
from spinlock_fast.output.locks import locked_output_file
from spinlock_fast.output.token_files import TokenTable, check_format, token_file
from spinlock_fast.prediction.evaluation import evaluate
from spinlock_fast.prediction.inputs import read_targets
from spinlock_fast.prediction.predictor import Predictor
from spinlock_fast.prediction.settings import load_predictor_config
from spinlock_fast.prediction.training import train_predictor


def train(chosen: argparse.Namespace) -> None:
    """`predict train`."""
    config = load_predictor_config(chosen.config, chosen.overrides)
    device = resolve_device(chosen.device)
    with RunDisplay(chosen.quiet, LoggingConfig()) as display:
        metrics = train_predictor(
            chosen.checkpoint,
            chosen.data,
            config,
            Path(chosen.output),
            device,
            chosen.resume,
            chosen.overwrite,
            lambda what, done, total: (
                display.stage(f"  epoch {done} of {total}") if what == "epochs" else display.encoded(what, done, total)
            ),
        )
    _print(metrics, chosen.quiet)
    sys.stdout.write(f"predictor: {chosen.output}\n")


def measure(chosen: argparse.Namespace) -> None:
    """`predict eval`: on the rows that training did not use, or on all if it used all."""
    predictor = Predictor.load(chosen.predictor, resolve_device(chosen.device))
    with RunDisplay(chosen.quiet, LoggingConfig()) as display:
        targets = read_targets(predictor.tokenizer, chosen.data, display.encoded)
        inputs = predictor.inputs(chosen.data)
        if inputs.rows != len(targets.tokens):
            raise DataError(f"{chosen.data}: {inputs.rows} rows of inputs, but {len(targets.tokens)} of features")
        splits = predictor.known_rows.splits_of(targets.keys)
        held_out = np.isin(splits, (TEST, UNKNOWN))
        metrics = evaluate(predictor, inputs.batches(held_out if held_out.any() else None), targets)
    metrics |= {"rows": "heldout" if held_out.any() else "all", "trained_rows": int((splits == TRAIN).sum())}
    if chosen.json is not None:
        write_json(Path(chosen.json), finite_or_null(metrics))
    _print(metrics, chosen.quiet)


def apply(chosen: argparse.Namespace) -> None:
    """`predict apply`: the most probable tokens of every row."""
    output = Path(chosen.output)
    check_format(output)
    if output.is_dir():
        raise OutputError(f"{output}: is a directory; name a file")
    predictor = Predictor.load(chosen.predictor, resolve_device(chosen.device))
    inputs = predictor.inputs(chosen.data)
    if output.exists() and any(output.samefile(file) for file in inputs.files):
        raise OutputError(f"{output}: is the input file")
    names = predictor.tokenizer.model.codebook_names
    table = TokenTable(inputs.rows, names, predictor.network.num_codes, predictor.sha256)
    done = 0
    display = RunDisplay(chosen.quiet, LoggingConfig())
    with display, locked_output_file(output), token_file(output, table) as write:
        for batch in inputs.batches():
            write(predictor.predict(batch).numpy())
            done += len(batch.index)
            display.encoded("tokens", done, inputs.rows)
    if not chosen.quiet:
        sys.stdout.write(f"predicted tokens: {output} [{done}, {len(names)}]\n")


def _print(metrics: dict[str, Any], quiet: bool) -> None:
    """The figures of `evaluate` as tables on standard output."""
    if quiet:
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    console.print(f"\nMeasured on {metrics['samples']:,} {'held-out ' * (metrics['rows'] == 'heldout')}rows")
    table = Table("", "predicted", "nearest", "majority", box=None, padding=(0, 2, 0, 0))
    for title, name in (("accuracy of a token", "accuracy"), ("log-loss of a token, nats", "log_loss")):
        table.add_row(title, *(f"{metrics[name][method]:.3f}" for method in ("predicted", "nearest", "majority")))
    errors = metrics["features_error"]
    table.add_row("error of decoded features", *(f"{errors[m]:.3f}" for m in ("predicted", "nearest", "majority")))
    console.print(table)
    console.print(
        f"error of features: {errors['true_tokens']:.3f} from the true tokens, {errors['regression']:.3f} by direct "
        f"regression, {errors['mean']:.3f} of the mean\ncalibration error: {metrics['calibration_error']:.3f}\n"
    )

"""Generates a data set: simulates operators, writes them, shows progress and handles signals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, Interrupted
from spinlock_fast.interrupts import handle_signals
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.progress import ProgressDisplay
from spinlock_fast.simulate.simulator import Rows, Simulator, concatenate_rows
from spinlock_fast.simulate.writer import CHUNK_ROWS, Writer


def generate(
    config: GeneratorConfig,
    output: str | Path,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = True,
) -> Path:
    """Simulates `config.operators` operators, or a shard of them, into an HDF5 file.

    Args:
        config: settings, with `operators`.
        output: the file; while unfinished its name ends in `.partial`.
        shard: (i, n): the i-th (from 0) of n consecutive parts of the operators.
        overwrite: replace an existing file.
        resume: keep the finished operators of an unfinished file with the same settings.
        quiet: show no progress.

    Raises:
        ConfigError: the number of operators is missing, the shard is empty, or the file to resume has other settings.
        DataError: the file to resume is damaged.
        OutputError: the file exists or cannot be written.
        Interrupted: SIGINT, SIGTERM or SIGHUP; --resume continues.
    """
    if config.operators is None:
        raise ConfigError("operators: required, not given (--operators N)")
    i, n = shard
    start, stop = config.operators * i // n, config.operators * (i + 1) // n
    if start == stop:
        raise ConfigError(f"--shard {i}/{n}: is empty for {config.operators} operators")
    simulator = Simulator(config, resolve_device(config.device))
    provenance = _provenance(config, simulator.device.type, (start, stop))
    with Writer(Path(output), config, simulator.sequence, (start, stop), provenance, overwrite, resume) as writer:
        with _stop_on_signal() as stopped, ProgressDisplay(writer.rows, writer.finished, quiet) as display:
            batch: list[Rows] = []
            done = writer.finished
            for rows in simulator.stream(start + done, stop, stopped.is_set):
                batch.append(rows)
                done += len(rows)
                if done == writer.rows:
                    writer.write(concatenate_rows(batch))
                elif done - writer.finished >= max(config.batch_operators, CHUNK_ROWS):
                    batch = [_write_chunks(writer, concatenate_rows(batch))]
                display.advance(done)
            if stopped.is_set() and done < writer.rows:
                if sum(map(len, batch)) >= CHUNK_ROWS:
                    _write_chunks(writer, concatenate_rows(batch))
                progress = f"{writer.finished} of {writer.rows} operators are kept, --resume continues"
                raise Interrupted(f"stopped; {progress}", stopped.signal_number)
        writer.finish()
    return Path(output)


def _provenance(config: GeneratorConfig, device: str, operator_range: tuple[int, int]) -> dict[str, Any]:
    return {
        "generator": "spinlock-fast",
        "generator_version": version("spinlock-fast"),
        "seed": config.random_seed,
        "config": json.dumps(config.provenance()),
        "operators": int(config.operators or 0),
        "first_operator": operator_range[0],
        "device": device,
    }


def _write_chunks(writer: Writer, rows: Rows) -> Rows:
    """Writes as many rows as fill whole chunks, so that no chunk is compressed twice; returns the rest."""
    num_rows = len(rows) // CHUNK_ROWS * CHUNK_ROWS
    writer.write(rows.select(slice(num_rows)))
    return rows.select(slice(num_rows, None))


class _StopEvent(threading.Event):
    """An event set by a signal, with the signal's number."""

    signal_number = 0


@contextmanager
def _stop_on_signal() -> Iterator[_StopEvent]:
    """An event that SIGINT, SIGTERM or SIGHUP sets within the block; without effect outside of the main thread."""
    stop = _StopEvent()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal_number = stop.signal_number or number
        stop.set()

    with handle_signals(handle):
        yield stop

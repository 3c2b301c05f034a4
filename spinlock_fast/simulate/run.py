"""A data set from its settings: simulate, write, show, and stop when told."""

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
from spinlock_fast.simulate.simulator import Rows, Simulator, concatenated
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
        output: the file; until it is complete its name ends in `.partial`.
        shard: (i, n): the i-th (from 0) of n consecutive parts of the operators.
        overwrite: replace what is there.
        resume: keep the finished operators of an earlier run of the same settings.
        quiet: show no progress.

    Raises:
        ConfigError: no number of operators, an empty shard, or a resumed file of other settings.
        DataError: the file to resume is damaged.
        OutputError: the file exists or cannot be written.
        Interrupted: SIGINT, SIGTERM or SIGHUP; --resume goes on.
    """
    if config.operators is None:
        raise ConfigError("operators: required, not given (--operators N)")
    i, n = shard
    start, stop = config.operators * i // n, config.operators * (i + 1) // n
    if start == stop:
        raise ConfigError(f"--shard {i}/{n}: leaves no operator of {config.operators}")
    simulator = Simulator(config, resolve_device(config.device))
    provenance = _provenance(config, simulator.device.type, (start, stop))
    with Writer(Path(output), config, simulator.sequence, (start, stop), provenance, overwrite, resume) as writer:
        with _stopping() as stopped, ProgressDisplay(writer.rows, writer.finished, quiet) as display:
            batch: list[Rows] = []
            done = writer.finished
            for rows in simulator.stream(start + done, stop, stopped.is_set):
                batch.append(rows)
                done += len(rows)
                if done == writer.rows:
                    writer.write(concatenated(batch))
                elif done - writer.finished >= max(config.batch_operators, CHUNK_ROWS):
                    batch = [_write_chunks(writer, concatenated(batch))]
                display.advance(done)
            if stopped.is_set() and done < writer.rows:
                if sum(map(len, batch)) >= CHUNK_ROWS:
                    _write_chunks(writer, concatenated(batch))
                kept = f"{writer.finished} of {writer.rows} operators are kept, --resume goes on"
                raise Interrupted(f"stopped; {kept}", stopped.signal_number)
        writer.finish()
    return Path(output)


def _provenance(config: GeneratorConfig, device: str, span: tuple[int, int]) -> dict[str, Any]:
    return {
        "generator": "spinlock-fast",
        "generator_version": version("spinlock-fast"),
        "seed": config.random_seed,
        "config": json.dumps(config.provenance()),
        "operators": int(config.operators or 0),
        "first_operator": span[0],
        "device": device,
    }


def _write_chunks(writer: Writer, rows: Rows) -> Rows:
    """Writes as many rows as fill chunks, so that none is compressed twice; gives the rest back."""
    whole = len(rows) // CHUNK_ROWS * CHUNK_ROWS
    writer.write(rows.part(slice(whole)))
    return rows.part(slice(whole, None))


class _Stop(threading.Event):
    """Set by a signal, whose number it keeps."""

    signal_number = 0


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Turns SIGINT, SIGTERM and SIGHUP into an event; only the main thread can."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal_number = stop.signal_number or number
        stop.set()

    with handle_signals(handle):
        yield stop

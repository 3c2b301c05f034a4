"""Generates a data set: simulates operators, writes them, shows progress and handles signals."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, Interrupted
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.progress import ProgressDisplay
from spinlock_fast.simulate.rank_run import simulate_on_ranks
from spinlock_fast.simulate.simulator import Rows, Simulator, concatenate_rows
from spinlock_fast.simulate.stop_event import StopEvent, stop_on_signal
from spinlock_fast.simulate.writer import CHUNK_ROWS, Writer


def generate(
    config: GeneratorConfig,
    output: str | Path,
    shard: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = True,
    ranks: Ranks = SINGLE,
) -> Path:
    """Simulates `config.operators` operators, or a shard of them, into an HDF5 file.

    Args:
        config: settings, with `operators`.
        output: the file; while unfinished its name ends in `.partial`.
        shard: (i, n): the i-th (from 0) of n consecutive parts of the operators.
        overwrite: replace an existing file.
        resume: keep the finished operators of an unfinished file with the same settings.
        quiet: show no progress.
        ranks: if there are several, they share the operators, and rank 0 writes the file; its values are the same.

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
    simulator = Simulator(config, resolve_device(config.device), ranks.local_size)
    provenance = _provenance(config, simulator.device.type, (start, stop))
    operator_range = start, stop
    with ExitStack() as stack:
        stopped = stack.enter_context(stop_on_signal())
        writer = None
        if ranks.is_main:
            writer = stack.enter_context(
                Writer(Path(output), config, simulator.sequence, operator_range, provenance, overwrite, resume)
            )
        if ranks.size > 1:
            simulate_on_ranks(simulator, operator_range, writer, ranks, stopped, quiet)
        elif writer is not None:
            _simulate(simulator, operator_range, writer, stopped, quiet)
        if writer is not None:
            writer.finish()
    ranks.barrier()  # the file is complete
    return Path(output)


def _simulate(
    simulator: Simulator, operator_range: tuple[int, int], writer: Writer, stopped: StopEvent, quiet: bool
) -> None:
    """Simulates the operators that the file lacks; raises Interrupted after a signal."""
    start, stop = operator_range
    with ProgressDisplay(writer.rows, writer.finished, quiet) as display:
        batch: list[Rows] = []
        done = writer.finished
        for rows in simulator.stream(start + done, stop, stopped.is_set):
            batch.append(rows)
            done += len(rows)
            if done == writer.rows:
                writer.write(concatenate_rows(batch))
            elif done - writer.finished >= max(simulator.config.batch_operators, CHUNK_ROWS):
                batch = [_write_chunks(writer, concatenate_rows(batch))]
            display.advance(done)
        if stopped.is_set() and done < writer.rows:
            if sum(map(len, batch)) >= CHUNK_ROWS:
                _write_chunks(writer, concatenate_rows(batch))
            progress = f"{writer.finished} of {writer.rows} operators are kept, --resume continues"
            raise Interrupted(f"stopped; {progress}", stopped.signal_number)


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

"""Simulates the operators of one file by several ranks.

In each round, every rank simulates the next batch of operators, and rank 0 appends the batches to the file in order. So
the unfinished file always holds leading operators, as with one process: any number of ranks can resume it.
"""

from __future__ import annotations

from collections.abc import Iterator

from spinlock_fast.distributed import Ranks
from spinlock_fast.errors import Interrupted
from spinlock_fast.simulate.packed_rows import PackedRows, pack_rows
from spinlock_fast.simulate.progress import ProgressDisplay
from spinlock_fast.simulate.rollout import TILE
from spinlock_fast.simulate.simulator import Rows, Simulator, concatenate_rows
from spinlock_fast.simulate.stop_event import StopEvent
from spinlock_fast.simulate.writer import CHUNK_ROWS, Writer, row_datasets, row_values


def simulate_on_ranks(
    simulator: Simulator,
    operator_range: tuple[int, int],
    writer: Writer | None,
    ranks: Ranks,
    stopped: StopEvent,
    quiet: bool,
) -> None:
    """Simulates the operators that the file lacks; all ranks call this.

    Args:
        simulator: of this rank.
        operator_range: first operator of the file and the one after the last.
        writer: of the file; on rank 0 only.
        stopped: set by a signal.
        quiet: show no progress.

    Raises:
        Interrupted: a rank got a signal; finished operators are in the file.
    """
    start, stop = operator_range
    count = stop - start
    done: int = ranks.broadcast_object(writer.finished if writer else 0)
    batches = _batches(done, count, _batch_rows(simulator, count - done, ranks))
    mine = batches[ranks.rank :: ranks.size]
    rows = simulator.stream_ranges([(start + first, start + last) for first, last in mine], stopped.is_set)
    with ProgressDisplay(count, done, quiet or not ranks.is_main) as display:
        for number in range(0, len(batches), ranks.size):
            of_round = batches[number : number + ranks.size]
            first, last = of_round[ranks.rank] if ranks.rank < len(of_round) else (0, 0)
            batch: list[Rows] = []
            for part in _take(rows, last - first):
                batch.append(part)
                display.advance(min(done + ranks.size * sum(map(len, batch)), count - 1))  # about
            complete = sum(map(len, batch)) == last - first
            parts = ranks.gather_on_main((_packed(batch, simulator, complete, count), stopped.signal_number))
            if writer is not None:
                _write_leading(writer, [part for part, _ in parts], of_round)
            kept = writer.finished if writer else 0, max((number for _, number in parts), default=0)
            done, signal_number = ranks.broadcast_object(kept)
            display.advance(done)
            if signal_number and done < count:
                raise Interrupted(f"stopped; {done} of {count} operators are kept, --resume continues", signal_number)


def _batch_rows(simulator: Simulator, remaining: int, ranks: Ranks) -> int:
    """Operators of a batch: whole chunks and tiles, and fewer if some ranks would have none."""
    unit = max(CHUNK_ROWS, TILE[simulator.device.type])
    rows = min(simulator.config.batch_operators, -(-remaining // ranks.size))
    return -(-max(rows, 1) // unit) * unit


def _batches(done: int, count: int, size: int) -> list[tuple[int, int]]:
    """Rows [first, last) of the batches that remain."""
    if done == count:
        return []
    return [(max(first, done), min(first + size, count)) for first in range(done // size * size, count, size)]


def _take(rows: Iterator[Rows], missing: int) -> Iterator[Rows]:
    """The next rows, tile by tile; fewer after a signal."""
    while missing and (part := next(rows, None)) is not None:
        missing -= len(part)
        yield part


def _packed(batch: list[Rows], simulator: Simulator, complete: bool, count: int) -> PackedRows:
    """The rows of a batch as chunks of the file with `count` rows; whole ones only if the batch is incomplete."""
    kept = sum(map(len, batch))
    if not complete:
        kept -= kept % CHUNK_ROWS
    if not kept:
        return PackedRows(0, {})
    options = {path: settings for path, (_, settings) in row_datasets(simulator.config).items()}
    values = row_values(concatenate_rows(batch).select(slice(kept)))
    return pack_rows(values, kept, min(CHUNK_ROWS, count), options)


def _write_leading(writer: Writer, parts: list[PackedRows], batches: list[tuple[int, int]]) -> None:
    """Appends the batches of a round up to the first incomplete one."""
    for packed, (_, last) in zip(parts, batches, strict=False):
        if packed.rows:
            writer.write_packed(packed)
        if writer.finished < last:
            return

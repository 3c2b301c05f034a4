"""Results of runs: the measures of each, in its directory and in results.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from spinlock_fast.ablation.plan import RUNS, Run
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.input_files import find_files, identify
from spinlock_fast.data.remote_files import RemoteCache, remote_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import csv_text, one_line
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.output.atomic_files import write_json, write_text

RECORD = "run.json"  # written last: a run that has it is complete
_EDGE_BYTES = 65536  # of the start and the end of a file, which identify it

# Names of measures in the CSV file -> headings.
MEASURES = {
    "reconstruction_error": "error",
    "quality": "quality",
    "utilization": "utilization",
    "perplexity_over_k": "perplexity / K",
    "topo_pre": "topo_pre",
    "topo_post": "topo_post",
    "seconds": "seconds",
}
COUNTS = {"features": "features", "total_codes": "codes", "epochs": "epochs", "best_epoch": "best epoch"}


class Record(BaseModel):
    """The measures of a finished run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    position: int
    seed: int
    identity: str
    measures: dict[str, float]
    counts: dict[str, int]
    device: str
    date: str

    @classmethod
    def of(cls, run: Run, metrics: Metrics, date: str) -> Record:
        """The record of a run, whose seconds are those of training."""
        measures = {name: float(metrics[name]) for name in MEASURES if name != "seconds"}
        return cls(
            variant=run.variant,
            position=run.position,
            seed=run.seed,
            identity=run.identity,
            measures={**measures, "seconds": float(metrics["seconds"]["train"])},
            counts={name: int(metrics[name]) for name in COUNTS},
            device=metrics["device"],
            date=date,
        )


def write_record(directory: Path, record: Record) -> None:
    """Writes run.json atomically; raises OutputError."""
    write_json(directory / RECORD, record.model_dump())


def read_record(file: Path) -> Record | None:
    """The record in a file, None if there is none; raises DataError for one that cannot be read."""
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not a record of a run"
        raise DataError(f"{file}: {reason}; delete it to repeat the run") from None


def finished(runs: Iterable[Run]) -> dict[Run, Record]:
    """The records of the runs that are finished.

    Raises:
        ConfigError: a finished run has other settings, or was trained on other data.
        DataError: a record cannot be read.
    """
    found = {}
    for run in runs:
        record = read_record(run.directory / RECORD)
        if record is None:
            continue
        if (record.identity, record.variant, record.seed) != (run.identity, run.variant, run.seed):
            raise ConfigError(
                f"{run.directory}: holds a run with other settings or on other data; choose another --output"
            )
        found[run] = record.model_copy(update={"position": run.position})
    return found


def collect(output: Path) -> list[Record]:
    """The records of all finished runs below a directory, in order of variant and seed; raises DataError."""
    files = sorted((output / RUNS).glob(f"*/*/{RECORD}"))
    records = [record for file in files if (record := read_record(file)) is not None]
    if not records:
        raise DataError(f"{output}: holds no finished run of an ablation")
    return in_order(records)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Sorted as in the table."""
    return sorted(records, key=lambda record: (record.position, record.variant, record.seed))


def data_identity(config: RunConfig) -> str:
    """Hash of the sizes of the data files and of their first and last bytes; raises DataError."""
    remote = config.data.remote_cache_dir
    assert config.dataset_path is not None
    digest = hashlib.sha256()
    for path in find_files(config.dataset_path, None if remote is None else RemoteCache(Path(remote))):
        identity = identify(path)
        digest.update(f"{identity.size} ".encode())
        if remote_file(path) is not None:
            digest.update(f"{identity.mtime_ns} ".encode())
            continue
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, identity.size - _EDGE_BYTES), os.SEEK_SET)
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:32]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Writes one line per run; raises OutputError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", *MEASURES, *COUNTS, "device", "date"])
    for record in records:
        measures = [repr(record.measures[name]) for name in MEASURES]
        counts = [record.counts[name] for name in COUNTS]
        writer.writerow([csv_text(record.variant), record.seed, *measures, *counts, record.device, record.date])
    write_text(path, text.getvalue())


def read_csv(path: Path) -> list[Record]:
    """The runs of a file of `write_csv`, whose first variant is the base; raises DataError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        positions = {name: i for i, name in enumerate(dict.fromkeys(line["variant"] for line in lines))}
        return [
            Record(
                variant=line["variant"],
                position=positions[line["variant"]],
                seed=int(line["seed"]),
                identity="",
                measures={name: float(line[name]) for name in MEASURES},
                counts={name: int(line[name]) for name in COUNTS},
                device=line["device"],
                date=line["date"],
            )
            for line in lines
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as results of an ablation: {one_line(error)}") from None

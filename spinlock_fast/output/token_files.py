"""Files of tokens, written block by block: HDF5, NumPy, CSV or Parquet, as the ending of the name says."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import csv_text
from spinlock_fast.output.atomic_files import replacing
from spinlock_fast.output.hdf5_files import replacing_hdf5

_CHUNK_ROWS = 8192  # rows of an HDF5 chunk
SCORES = ("distance", "margin")
_GROUP_ROWS = 65_536  # rows of a Parquet row group

WriteBlock = Callable[[NDArray[Any]], None]  # appends rows [B, G]


@dataclass(frozen=True)
class TokenTable:
    """Description of a table of tokens [rows, G].

    Args:
        rows: number of rows.
        codebook_names: [G] column names.
        codebook_sizes: [G] codes of each codebook.
        checkpoint_sha256: hash of the model file that made the tokens.
        search: how the tokens were searched, by setting; the attributes of the same names in HDF5 and Parquet.
        scores: whether a table has the distances and margins of its tokens. Its blocks are then [B, 3 G] float64:
            tokens, distances, margins.
    """

    rows: int
    codebook_names: Sequence[str]
    codebook_sizes: Sequence[int]
    checkpoint_sha256: str
    scores: bool = False
    search: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned integer that holds every code."""
        largest = max(self.codebook_sizes) - 1
        return np.dtype(next(kind for kind in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(kind).max))

    @property
    def block_dtype(self) -> np.dtype[Any]:
        """The type of blocks: float64 holds tokens and float32 scores exactly."""
        return np.dtype(np.float64) if self.scores else self.dtype

    @property
    def columns(self) -> dict[str, np.dtype[Any]]:
        """Names and types of all columns, those of scores last."""
        columns = dict.fromkeys(self.codebook_names, self.dtype)
        for score in SCORES if self.scores else ():
            columns |= {f"{name}/{score}": np.dtype(np.float32) for name in self.codebook_names}
        return columns

    def split(self, block: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The tokens [B, G] of a block, and its scores, each in its type."""
        G = len(self.codebook_names)
        parts = {"tokens": block[:, :G].astype(self.dtype)}
        for i, score in enumerate(SCORES if self.scores else (), start=1):
            parts[score] = block[:, i * G : (i + 1) * G].astype(np.float32)
        return parts


def token_file(path: Path, table: TokenTable) -> AbstractContextManager[WriteBlock]:
    """A function that appends blocks of tokens to a new file, which replaces `path` when the block ends without error.

    `.csv`: a header of codebook names, one line per row. `.npy`: the array. `.parquet`: one column per codebook.
    Any other ending: HDF5, dataset `tokens` with attributes codebook_names, codebook_sizes, checkpoint_sha256 and those
    of `TokenTable.search`. Scores
    are columns "<codebook>/distance" and "<codebook>/margin", or the HDF5 datasets `distance` and `margin`.

    Raises:
        ConfigError: `.parquet` without pyarrow, or `.npy` with scores.
        OutputError: the file cannot be written; `path` stays as it was.
    """
    writers = {".csv": _csv, ".npy": _npy, ".parquet": _parquet}
    check_format(path, table.scores)
    return writers.get(path.suffix.lower(), _hdf5)(path, table)


def check_format(path: Path, scores: bool = False) -> None:
    """Raises ConfigError if the file format needs a package that is not installed, or cannot hold scores."""
    if scores and path.suffix.lower() == ".npy":
        raise ConfigError(f"{path}: a .npy file holds one array, no scores: write HDF5, .parquet or .csv")
    if path.suffix.lower() == ".parquet" and not parquet_available():
        raise ConfigError(f"{path}: Parquet files need pyarrow: pip install 'spinlock-fast[analysis]'")


def parquet_available() -> bool:
    """Whether pyarrow is installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _hdf5(path: Path, table: TokenTable) -> Iterator[WriteBlock]:
    G, start = len(table.codebook_names), 0
    with replacing_hdf5(path) as writer:
        options = {"chunks": (min(table.rows, _CHUNK_ROWS), G), "compression": "gzip"}
        out = writer.file.create_dataset("tokens", (table.rows, G), table.dtype, **options)
        scores = SCORES if table.scores else ()
        datasets = {name: writer.file.create_dataset(name, (table.rows, G), np.float32, **options) for name in scores}
        out.attrs["codebook_names"] = list(table.codebook_names)
        out.attrs["codebook_sizes"] = np.array(table.codebook_sizes)
        out.attrs["checkpoint_sha256"] = table.checkpoint_sha256
        out.attrs.update(table.search)

        def write(block: NDArray[Any]) -> None:
            nonlocal start
            for name, values in table.split(block).items():
                writer.write(datasets.get(name, out), start, values)
            start += len(block)

        yield write


@contextmanager
def _npy(path: Path, table: TokenTable) -> Iterator[WriteBlock]:
    shape = (table.rows, len(table.codebook_names))
    header = {"descr": np.lib.format.dtype_to_descr(table.dtype), "fortran_order": False, "shape": shape}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)

        def write(tokens: NDArray[Any]) -> None:
            # Not a memory map: on a full disk that would end the process with SIGBUS.
            file.write(tokens.astype(table.dtype).tobytes())

        yield write


@contextmanager
def _csv(path: Path, table: TokenTable) -> Iterator[WriteBlock]:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(csv_text, table.columns))

        def write(block: NDArray[Any]) -> None:
            tokens, *scores = table.split(block).values()
            texts = [[f"{value:.9g}" for value in row] for row in np.hstack(scores)] if scores else [[]] * len(tokens)
            writer.writerows(row + text for row, text in zip(tokens.tolist(), texts, strict=True))

        yield write


@contextmanager
def _parquet(path: Path, table: TokenTable) -> Iterator[WriteBlock]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = ",".join(map(str, table.codebook_sizes))
    searched = {name: str(value) for name, value in table.search.items()}
    schema = pa.schema(
        [(name, pa.from_numpy_dtype(dtype)) for name, dtype in table.columns.items()],
        {"codebook_sizes": sizes, "checkpoint_sha256": table.checkpoint_sha256, **searched},
    )
    pending: list[NDArray[Any]] = []

    def flush() -> None:
        parts = table.split(np.concatenate(pending)).values()
        pending.clear()
        writer.write_table(pa.table([np.ascontiguousarray(c) for part in parts for c in part.T], schema=schema))

    def write(tokens: NDArray[Any]) -> None:
        pending.append(tokens)
        if sum(map(len, pending)) >= _GROUP_ROWS:
            flush()

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield write
        if pending:
            flush()

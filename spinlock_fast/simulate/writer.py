"""The HDF5 file of a data set: written incrementally, readable after a kill, renamed when complete.

The file is created as `.partial.new` with all parameters and, when resumed, the finished rows of the earlier run, and
then renamed to `.partial`. From then on it is written in HDF5's single-writer mode (SWMR), whose order of writes keeps
it readable at any moment; `metadata/finished` marks complete rows. To resume, complete chunks are copied without
decompression into a new file, so that no partially written chunk is reused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.descriptors.registry import aggregated_names, registry, temporal_names, trajectory_names
from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.messages import one_line
from spinlock_fast.output.atomic_files import (
    check_no_link,
    check_regular,
    check_writable,
    reserve_disk_space,
    sync_directory,
)
from spinlock_fast.output.hdf5_files import create_hdf5_file
from spinlock_fast.output.locks import locked
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.packed_rows import PackedRows, write_packed
from spinlock_fast.simulate.parameters import PARAMETER_NAMES, ThetaSequence
from spinlock_fast.simulate.simulator import Rows, aggregate

CHUNK_ROWS = 8
LAST_FIELDS = "outputs/fields"
_FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lzf": {"compression": "lzf", "shuffle": True},
    "gzip": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}
_PARAMETER_BYTES = 512  # upper bound per operator of what is written before simulation
_LIMITS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the file's size is reached",
}
_FORMAT = ("v110", "v110")  # the oldest format with SWMR
_TRAJECTORIES = "features/summary/per_trajectory/features"
_FINISHED = "metadata/finished"
_METADATA_BYTES = 2**18  # upper bound of chunk indices per batch


class Writer:
    """Writes the file of a range of operators; a context manager.

    Args:
        output: name of the complete file; while unfinished, `.partial` is appended.
        config: settings of the data set.
        sequence: source of theta.
        span: first operator and the one after the last.
        provenance: attributes of the root group; a file is resumed only where they agree.
        overwrite: replace an existing file.
        resume: continue an existing file.

    Attributes:
        finished: number of leading rows that are complete.

    Raises:
        OutputError: the file exists, or cannot be written.
        ConfigError: the file to resume was made with other settings.
        DataError: the file to resume is damaged.
    """

    def __init__(
        self,
        output: Path,
        config: GeneratorConfig,
        sequence: ThetaSequence,
        operator_range: tuple[int, int],
        provenance: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.output = _regular_target(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self._new_partial = self.output.with_name(self.output.name + ".partial.new")  # before it can be resumed
        self._legacy_partial = self.output.with_name(self.output.name + ".partial.old")  # of earlier versions
        self._config, self._sequence, self._operator_range, self._provenance = (
            config,
            sequence,
            operator_range,
            dict(provenance),
        )
        self.finished = 0
        self._file: h5py.File | None = None
        self._lock = contextlib.ExitStack()
        if not overwrite and not resume:
            self._refuse_existing()
        check_writable(self.output.parent)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(locked(self.output))
        try:
            self._start(overwrite, resume)
        except BaseException:
            self._new_partial.unlink(missing_ok=True)
            self._close()
            raise

    def _start(self, overwrite: bool, resume: bool) -> None:
        output = self.output
        if not overwrite and not resume:
            self._refuse_existing()  # checked again under the lock
        self._new_partial.unlink(missing_ok=True)  # left by a run that was killed before its file could be resumed
        for path in (self.partial, self._legacy_partial):
            if overwrite and path.is_symlink():
                path.unlink()
            check_no_link(path)
        if resume and not overwrite and os.path.exists(output):
            self.finished = self._check_resumable(output)
            if self.finished < self.rows:
                raise DataError(f"{output}: holds {self.finished} of {self.rows} operators; --overwrite replaces it")
            return
        with self._writing():
            self._open(resume and not overwrite)

    @property
    def rows(self) -> int:
        """Number of rows of the complete file."""
        return self._operator_range[1] - self._operator_range[0]

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, rows: Rows) -> None:
        """Appends operators and flushes them to the file."""
        assert self._file is not None
        place = slice(self.finished, self.finished + len(rows.fields))
        values = row_values(rows)
        with self._writing():
            self._reserve(sum(value.nbytes for value in values.values()))
            for path, value in values.items():
                self._write_rows(path, place, value)
            # Last: a row is marked once all of its values are in the file.
            self._write_rows(_FINISHED, place, 1)
            self._file.flush()
        self.finished = place.stop

    def write_packed(self, packed: PackedRows) -> None:
        """Appends compressed operators, which begin at a chunk, and flushes them to the file."""
        assert self._file is not None
        place = slice(self.finished, self.finished + packed.rows)
        with self._writing():
            self._reserve(packed.nbytes)
            for path, chunks in packed.chunks.items():
                dataset = self._file[path]
                write_packed(dataset, place.start, chunks)
                dataset.flush()
            self._write_rows(_FINISHED, place, 1)  # last, as in `write`
            self._file.flush()
        self.finished = place.stop

    def _write_rows(self, path: str, place: slice, value: Any) -> None:
        assert self._file is not None
        dataset = self._file[path]  # a local reference: errors during garbage collection would be ignored
        dataset[place] = value
        dataset.flush()

    def _reserve(self, size: int) -> None:
        """Allocates disk space at the end of the file before HDF5 needs it."""
        assert self._file is not None
        reserve_disk_space(self.partial, self._file.id.get_filesize(), size + _METADATA_BYTES)

    def finish(self) -> None:
        """Renames the complete file; raises DataError where rows are missing."""
        if self._file is None:
            return
        if self.finished < self.rows:
            raise DataError(f"{self.partial}: holds {self.finished} of {self.rows} operators, not all")
        with self._writing():
            self._file.flush()
            size = self._file.id.get_filesize()
            self._file.close()
            self._file = None
            with open(self.partial, "r+b") as file:
                file.truncate(size)  # frees the unused reserved space
                os.fsync(file.fileno())
            os.replace(self.partial, self.output)
            sync_directory(self.output.parent)

    def _refuse_existing(self) -> None:
        if os.path.exists(self.output):
            raise OutputError(f"{self.output}: exists; --overwrite replaces it")
        if os.path.lexists(self.partial) or os.path.lexists(self._legacy_partial):
            raise OutputError(
                f"{self.partial}: exists, from an unfinished run; --resume continues it, --overwrite replaces it"
            )

    def _open(self, resume: bool) -> None:
        partial = self.partial
        if resume and os.path.exists(self._legacy_partial):  # earlier versions moved the file there during the copy
            os.replace(self._legacy_partial, partial)
        self._legacy_partial.unlink(missing_ok=True)
        resumed = resume and os.path.exists(partial)
        num_copied = self.finished = self._check_resumable(partial) if resumed else 0
        size = self.rows * _PARAMETER_BYTES + (partial.stat().st_size if num_copied else 0)
        self._file = create_hdf5_file(self._new_partial, size + _METADATA_BYTES, _FORMAT)
        self._create(self._file)
        if num_copied:
            with _reading(partial) as source:
                for path in row_datasets(self._config):
                    _copy_compressed_chunks(source[path], self._file[path], num_copied)
            self._file[_FINISHED][:num_copied] = 1
        self._file.swmr_mode = True
        self._file.flush()
        os.replace(self._new_partial, partial)
        sync_directory(partial.parent)

    def _create(self, file: h5py.File) -> None:
        """Creates every dataset at its full size and writes parameters, metadata and attributes."""
        N = self.rows
        chunk = min(CHUNK_ROWS, N)
        for path, (shape, options) in row_datasets(self._config).items():
            file.create_dataset(path, (N, *shape), chunks=(chunk, *shape), **options)
        file.create_dataset(_FINISHED, (N,), "u1", chunks=(chunk,))
        self._create_parameters(file)
        for name, value in self._provenance.items():
            file.attrs[name] = value
        for path, names in (
            ("features/temporal", temporal_names()),
            ("features/summary/per_trajectory", trajectory_names()),
            ("features/summary/aggregated", aggregated_names()),
            ("features/architecture/aggregated", PARAMETER_NAMES),
            ("parameters", PARAMETER_NAMES),
        ):
            file[path].attrs["feature_names"] = list(names)
        for family, groups in registry().items():
            file["features"][family].attrs["feature_registry"] = json.dumps(groups)

    def _create_parameters(self, file: h5py.File) -> None:
        N, filters, sequence = self.rows, _FILTERS[self._config.compression], self._sequence
        thetas = sequence.thetas(*self._operator_range)
        texts = {
            "ic_types": [theta.initial_condition for theta in thetas],
            "evolution_policies": [theta.update_policy for theta in thetas],
            "noise_regimes": [sequence.noise_regime(theta) for theta in thetas],
        }
        chunk = min(CHUNK_ROWS, N)
        for name, values in texts.items():
            file.create_dataset(f"metadata/{name}", data=values, dtype=h5py.string_dtype(), chunks=(chunk,))
        sizes = np.full(N, self._config.grid_size, dtype=np.int32)
        file.create_dataset("metadata/grid_sizes", data=sizes, chunks=(chunk,))
        for path, rows in (
            ("parameters/params", [sequence.values(theta) for theta in thetas]),
            (DEFAULT_DATASETS["architecture"], [sequence.scaled(theta) for theta in thetas]),
        ):
            file.create_dataset(path, data=np.stack(rows), chunks=(chunk, len(PARAMETER_NAMES)), **filters)

    def _check_resumable(self, path: Path) -> int:
        """Number of leading complete rows of an existing file; raises ConfigError where its settings differ."""
        with _reading(path) as file:
            for name, value in self._provenance.items():
                if (existing := file.attrs.get(name)) != value:
                    raise ConfigError(
                        f"{path}: has other settings: {_difference(name, existing, value)}; --overwrite replaces it"
                    )
            finished = file[_FINISHED][:]
        num_complete = len(finished) if finished.all() else int(np.argmin(finished))
        return num_complete if num_complete == len(finished) else num_complete // CHUNK_ROWS * CHUNK_ROWS

    def _close(self) -> None:
        if self._file is not None:
            # On a full disk closing fails as well; the write error has been reported.
            with contextlib.suppress(OSError, RuntimeError):
                self._file.close()
            self._file = None
        self._lock.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._close()
            raise OutputError(self._reason(error)) from None

    def _reason(self, error: BaseException) -> str:
        text = one_line(error)
        # HDF5 reports the system's error number in its message only.
        numbers = [n for n in _LIMITS if getattr(error, "errno", None) == n or f"errno = {n}" in str(error)]
        reason = _LIMITS[numbers[0]] if numbers else getattr(error, "strerror", None) or text
        hint = f"; {self.finished} of {self.rows} operators are kept, --resume continues" if self.finished else ""
        return f"{self.partial}: cannot be written: {reason}{hint}"


def row_datasets(config: GeneratorConfig) -> dict[str, tuple[tuple[int, ...], dict[str, Any]]]:
    """Path of each simulated dataset: row shape, and type, filters and fill value."""
    options = {"dtype": "f4", "fillvalue": np.nan, **_FILTERS[config.compression]}
    fields = (3, config.grid_size, config.grid_size), options
    return {
        "inputs/fields": fields,
        **({LAST_FIELDS: fields} if config.last_fields else {}),
        DEFAULT_DATASETS["temporal"]: ((config.num_timesteps, len(temporal_names())), options),
        _TRAJECTORIES: ((config.num_realizations, len(trajectory_names())), options),
        DEFAULT_DATASETS["summary"]: ((len(aggregated_names()),), options),
        "metadata/diverged": ((), {"dtype": "u1"}),
    }


def row_values(rows: Rows) -> dict[str, NDArray[Any]]:
    """The values of operators by dataset path."""
    return {
        "inputs/fields": rows.fields,
        **({LAST_FIELDS: rows.last_fields} if rows.last_fields.shape[1] else {}),
        DEFAULT_DATASETS["temporal"]: rows.temporal,
        _TRAJECTORIES: rows.trajectories,
        DEFAULT_DATASETS["summary"]: aggregate(rows.trajectories),
        "metadata/diverged": rows.diverged,
    }


def _regular_target(output: Path) -> Path:
    """The path with links resolved; raises OutputError for a directory or a device."""
    check_regular(output)
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def _copy_compressed_chunks(source: h5py.Dataset, target: h5py.Dataset, rows: int) -> None:
    offset = (0,) * (source.ndim - 1)
    for row in range(0, rows, source.chunks[0]):
        mask, data = source.id.read_direct_chunk((row, *offset))
        target.id.write_direct_chunk((row, *offset), data, mask)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r", libver="latest", swmr=True) as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        text = one_line(error)
        raise DataError(f"{path}: cannot be resumed, the file is damaged ({text}); --overwrite replaces it") from None


def _difference(name: str, existing: object, value: object) -> str:
    """Text of the difference of an attribute; names the differing setting where both values are JSON objects."""
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        old, new = (_flatten(json.loads(str(text))) for text in (existing, value))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return f"{key} was {old.get(key)}, is {new.get(key)}"
    return f"{name} was {existing}, is {value}"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out

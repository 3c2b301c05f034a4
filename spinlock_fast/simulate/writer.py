"""The HDF5 file: written row by row under another name, readable after a kill, renamed when complete.

The unfinished file gets its name when it can be resumed: with all that is known before a step is simulated, and the
rows of the run that it goes on with. From then on it is written in HDF5's single-writer mode, whose order of writes
leaves it readable at any moment; `metadata/finished` says which rows are whole. To resume, those are copied, still
compressed, into a fresh file, so that nothing half-written is ever built upon.
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

from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.descriptors.registry import aggregated_names, registry, temporal_names, trajectory_names
from spinlock_fast.errors import ConfigError, DataError, OutputError
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
from spinlock_fast.simulate.parameters import PARAMETER_NAMES, ThetaSequence
from spinlock_fast.simulate.simulator import Rows, aggregate

CHUNK_ROWS = 8
_FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "lzf": {"compression": "lzf", "shuffle": True},
    "gzip": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}
_KNOWN_BYTES = 512  # of an operator's row, before it is simulated
_LIMITS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit on the file's size is reached",
}
_FORMAT = ("v110", "v110")  # the oldest with the single-writer mode
_TRAJECTORIES = "features/summary/per_trajectory/features"
_FINISHED = "metadata/finished"
_METADATA_BYTES = 2**18  # what indices of chunks may take besides the values of a batch


class Writer:
    """The file of the operators start..stop-1; a context manager.

    Args:
        output: the file's name once it is complete; until then it is `output` with `.partial`.
        config: settings of the data set.
        sequence: where theta comes from.
        span: first operator and the one after the last.
        provenance: attributes of the root; a file is resumed only where they agree.
        overwrite: replace what is there.
        resume: go on with what is there.

    Attributes:
        finished: rows that are in the file already, from the first on.

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
        span: tuple[int, int],
        provenance: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.output = _regular_target(output)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self._head = self.output.with_name(self.output.name + ".partial.new")  # until it can be resumed
        self._older = self.output.with_name(self.output.name + ".partial.old")  # of earlier versions
        self._config, self._sequence, self._span, self._provenance = config, sequence, span, dict(provenance)
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
            self._head.unlink(missing_ok=True)
            self._close()
            raise

    def _start(self, overwrite: bool, resume: bool) -> None:
        output = self.output
        if not overwrite and not resume:
            self._refuse_existing()  # again, now that no other process can make them
        self._head.unlink(missing_ok=True)  # of a run that was killed before its file could be resumed
        for path in (self.partial, self._older):
            if overwrite and path.is_symlink():
                path.unlink()
            check_no_link(path)
        if resume and not overwrite and output.exists():
            self.finished = self._check_resumable(output)
            if self.finished < self.rows:
                raise DataError(f"{output}: holds {self.finished} of {self.rows} operators; --overwrite starts again")
            return
        with self._writing():
            self._open(resume and not overwrite)

    @property
    def rows(self) -> int:
        """Rows of the complete file."""
        return self._span[1] - self._span[0]

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, rows: Rows) -> None:
        """Appends operators; they are kept whatever happens after."""
        assert self._file is not None
        place = slice(self.finished, self.finished + len(rows.fields))
        values = {
            "inputs/fields": rows.fields,
            DEFAULT_DATASETS["temporal"]: rows.temporal,
            _TRAJECTORIES: rows.trajectories,
            DEFAULT_DATASETS["summary"]: aggregate(rows.trajectories),
            "metadata/diverged": rows.diverged,
        }
        with self._writing():
            self._reserve(sum(value.nbytes for value in values.values()))
            for path, value in values.items():
                self._put(path, place, value)
            # Last: a row counts only once all of it is in the file.
            self._put(_FINISHED, place, 1)
            self._file.flush()
        self.finished = place.stop

    def _put(self, path: str, place: slice, value: Any) -> None:
        assert self._file is not None
        dataset = self._file[path]  # held to the end: what fails while h5py collects it goes unseen
        dataset[place] = value
        dataset.flush()

    def _reserve(self, size: int) -> None:
        """Takes disk space behind the file's content before HDF5 needs it."""
        assert self._file is not None
        reserve_disk_space(self.partial, self._file.id.get_filesize(), size + _METADATA_BYTES)

    def finish(self) -> None:
        """Gives the complete file its name; raises DataError where rows are missing."""
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
                file.truncate(size)  # what was reserved and not needed
                os.fsync(file.fileno())
            os.replace(self.partial, self.output)
            sync_directory(self.output.parent)

    def _refuse_existing(self) -> None:
        if self.output.exists():
            raise OutputError(f"{self.output}: exists; --overwrite replaces it")
        if os.path.lexists(self.partial) or os.path.lexists(self._older):
            raise OutputError(
                f"{self.partial}: an unfinished run is there; --resume goes on with it, --overwrite starts again"
            )

    def _open(self, resume: bool) -> None:
        partial = self.partial
        if resume and self._older.exists():  # earlier versions moved the file there while they copied it
            os.replace(self._older, partial)
        self._older.unlink(missing_ok=True)
        resumed = resume and partial.exists()
        kept = self.finished = self._check_resumable(partial) if resumed else 0
        size = self.rows * _KNOWN_BYTES + (partial.stat().st_size if kept else 0)
        self._file = create_hdf5_file(self._head, size + _METADATA_BYTES, _FORMAT)
        self._create(self._file)
        if kept:
            with _reading(partial) as source:
                for path in self._row_datasets():
                    _copy_chunks(source[path], self._file[path], kept)
            self._file[_FINISHED][:kept] = 1
        self._file.swmr_mode = True
        self._file.flush()
        os.replace(self._head, partial)
        sync_directory(partial.parent)

    def _create(self, file: h5py.File) -> None:
        """Every dataset at its full size, and all that is known before a step is simulated."""
        filters, N = _FILTERS[self._config.compression], self.rows
        chunk = min(CHUNK_ROWS, N)
        for path, shape in self._row_datasets().items():
            kind = {"dtype": "f4", "fillvalue": np.nan, **filters} if shape else {"dtype": "u1"}
            file.create_dataset(path, (N, *shape), chunks=(chunk, *shape), **kind)
        file.create_dataset(_FINISHED, (N,), "u1", chunks=(chunk,))
        self._create_known(file)
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

    def _row_datasets(self) -> dict[str, tuple[int, ...]]:
        """What is simulated: path -> shape of a row."""
        config = self._config
        return {
            "inputs/fields": (3, config.grid_size, config.grid_size),
            DEFAULT_DATASETS["temporal"]: (config.num_timesteps, len(temporal_names())),
            _TRAJECTORIES: (config.num_realizations, len(trajectory_names())),
            DEFAULT_DATASETS["summary"]: (len(aggregated_names()),),
            "metadata/diverged": (),
        }

    def _create_known(self, file: h5py.File) -> None:
        N, filters, sequence = self.rows, _FILTERS[self._config.compression], self._sequence
        thetas = sequence.thetas(*self._span)
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
        """Whole rows of an earlier run's file, from the first on."""
        with _reading(path) as file:
            for name, value in self._provenance.items():
                if (found := file.attrs.get(name)) != value:
                    raise ConfigError(
                        f"{path}: made with other settings: {_difference(name, found, value)}; --overwrite starts again"
                    )
            finished = file[_FINISHED][:]
        whole = len(finished) if finished.all() else int(np.argmin(finished))
        return whole if whole == len(finished) else whole // CHUNK_ROWS * CHUNK_ROWS

    def _close(self) -> None:
        if self._file is not None:
            # Where the disk is full closing fails as writing did, and that has been reported.
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
        text = " ".join(str(error).split())
        # HDF5 has the system's error number in its text only.
        numbers = [n for n in _LIMITS if getattr(error, "errno", None) == n or f"errno = {n}" in text]
        why = _LIMITS[numbers[0]] if numbers else getattr(error, "strerror", None) or text
        kept = f"; {self.finished} of {self.rows} operators are kept, --resume goes on" if self.finished else ""
        return f"{self.partial}: cannot be written: {why}{kept}"


def _regular_target(output: Path) -> Path:
    """The file that a name stands for, through links; raises OutputError where it is a directory or a device."""
    check_regular(output)
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def _copy_chunks(source: h5py.Dataset, target: h5py.Dataset, rows: int) -> None:
    rest = (0,) * (source.ndim - 1)
    for row in range(0, rows, source.chunks[0]):
        mask, data = source.id.read_direct_chunk((row, *rest))
        target.id.write_direct_chunk((row, *rest), data, mask)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r", libver="latest", swmr=True) as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be resumed, the file is damaged ({text}); --overwrite starts again") from None


def _difference(name: str, found: object, value: object) -> str:
    """Names the setting that differs where both are JSON objects."""
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        old, new = (_flat(json.loads(str(text))) for text in (found, value))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return f"{key} was {old.get(key)}, is {new.get(key)}"
    return f"{name} was {found}, is {value}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out

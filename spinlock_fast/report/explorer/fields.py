"""Small pictures of fields on the explorer: of fields in the data, or of the states of trajectory files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, find_dataset
from spinlock_fast.data.input_files import open_file, reporting_damage
from spinlock_fast.data.loader_pass import LoaderPass
from spinlock_fast.data.row_order import SingleBatch
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.data.window_sizes import available_cpus
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable
from spinlock_fast.report.explorer.rows import Columns, quantised
from spinlock_fast.trajectories.samples import TrajectorySet

DATASETS = {"inputs/fields": "initial field", "outputs/fields": "last field"}
SIZE = 24  # largest height and width
MAX_BYTES = 4_000_000  # of all pictures

_ROWS_AT_ONCE = 64
_QUANTILES = (0.005, 0.995)  # the range of the colours, over all pictures of a kind

Pictures = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class FieldPictures:
    """Pictures of n rows.

    Args:
        rows: [n] indices of the rows on the page, ascending.
        pictures: [n, height, width] by name, such as "first state".
        channel: name of the channel.
    """

    rows: NDArray[np.int64]
    pictures: Pictures
    channel: str

    def header(self) -> dict[str, Any]:
        """Name, height, width and range of values of each kind."""
        kinds = []
        for name, values in self.pictures.items():
            low, high = colour_range(values)
            height, width = values.shape[1:]
            kinds.append({"name": name, "height": height, "width": width, "low": low, "high": high})
        return {"channel": printable(self.channel), "kinds": kinds}

    def columns(self) -> Columns:
        """Rows, and the pixels of each kind from 0 to 254; 255 where a value is not finite."""
        columns: Columns = {"field/rows": self.rows.astype(np.uint32)}
        for kind, values in enumerate(self.pictures.values()):
            columns[f"field/{kind}"] = quantised(values, *colour_range(values)).ravel()
        return columns


def colour_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 0.5 % and 99.5 % quantiles of the finite values; (0, 0) without any."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, _QUANTILES).tolist() if finite.size else (0.0, 0.0)
    return low, high


def chosen_rows(rows: int, examples: Sequence[NDArray[Any]], row_bytes: int, most_bytes: int) -> NDArray[np.int64]:
    """All rows of the page if they fit, else those of examples, the first kind of them first."""
    most = max(1, most_bytes // row_bytes)
    if rows <= most:
        return np.arange(rows)
    wanted = np.concatenate([np.asarray(part, np.int64) for part in examples])
    unique = np.unique(wanted, return_index=True)[1]
    return np.sort(wanted[np.sort(unique)[:most]])


def pictures_of_datasets(
    source: FeatureSource, page_rows: NDArray[np.int64], examples: Sequence[NDArray[Any]]
) -> FieldPictures | None:
    """Pictures of the initial and last fields [N, C, *space] that the data contain; None without any.

    Args:
        source: the data.
        page_rows: row in the data of each row of the page.
        examples: indices of example rows of the page by kind, for pages of many rows.

    Raises:
        DataError: a dataset is damaged, or has another shape or number of rows.
    """
    file, policy = source.files[0], ExternalFilePolicy(source.allow_external)
    with open_file(file) as handle, reporting_damage(file, ", ".join(DATASETS)):
        kept = [path for path in DATASETS if find_dataset(file, handle, path, policy) is not None]
    if not kept:
        return None
    stored = ShardedDatasets.open(source.files, kept, "fields", policy)
    shapes = [dataset.row_shape for dataset in stored.datasets]
    for path, shape in zip(kept, shapes, strict=True):
        if stored.rows != source.rows or not 2 <= len(shape) <= 4:
            found, expected = [stored.rows, *shape], f"[N, C, *space] with N = {source.rows}"
            raise DataError(f"{file}: {path} is {found}, expected {expected}")
    rows = chosen_rows(len(page_rows), examples, sum(_bytes(shape[1:], 1) for shape in shapes), MAX_BYTES)
    parts: dict[str, list[NDArray[np.float64]]] = {path: [] for path in kept}
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        wanted = page_rows[rows[start : start + _ROWS_AT_ONCE]]
        batches = LoaderPass(stored, SingleBatch(wanted), windows_ahead=1, threads=available_cpus())
        with closing(batches):
            values = stored.unpack(next(iter(batches)))
        for path in kept:
            parts[path] += [picture(field[0]) for field in values[path].numpy()]
    return FieldPictures(rows, {DATASETS[path]: np.stack(parts[path]) for path in kept}, "channel 0")


def pictures_of_trajectories(
    trajectories: TrajectorySet, data_rows: int, page_rows: NDArray[np.int64], examples: Sequence[NDArray[Any]]
) -> FieldPictures:
    """Pictures of the first channel of trajectories: the first and the last state, or all states of one dimension.

    Args:
        trajectories: a sample for each row of the data, in their order.
        data_rows: number of rows of the data.
        page_rows, examples: as for `pictures_of_datasets`.

    Raises:
        DataError: there are more or fewer samples than rows, or a file is damaged.
    """
    if trajectories.samples != data_rows:
        first = trajectories.files[0].path
        raise DataError(f"{first}: {trajectories.samples} trajectories, but the features have {data_rows} rows")
    extents = trajectories.shape.grid.extents
    one_dimension = len(extents) == 1
    names = ("all states, time downwards",) if one_dimension else ("first state", "last state")
    size = _bytes((trajectories.shape.steps, *extents) if one_dimension else extents, len(names))
    rows = chosen_rows(len(page_rows), examples, size, MAX_BYTES)
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for states in _samples(trajectories, page_rows[rows]):
        parts = (states,) if one_dimension else (states[0], states[-1])
        for name, part in zip(names, parts, strict=True):
            found[name].append(shrunk(part) if one_dimension else picture(part))
    pictures = {name: np.stack(values) for name, values in found.items()}
    return FieldPictures(rows, pictures, trajectories.shape.channels[0])


def _samples(trajectories: TrajectorySet, wanted: NDArray[np.int64]) -> Iterator[NDArray[np.floating]]:
    """[T, *space] of ascending samples; consecutive ones are read together."""
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    for first, last in pairwise([0, *breaks.tolist(), len(wanted)]):
        for sample in trajectories.read(int(wanted[first]), int(wanted[last - 1]) + 1):
            yield sample[0, :, 0]  # of the first realization and channel


def picture(field: NDArray[np.floating]) -> NDArray[np.float64]:
    """[height, width] of a field [*space]: the middle layer of three dimensions, one line of one dimension."""
    if field.ndim == 3:
        field = field[field.shape[0] // 2]
    return shrunk(field[None] if field.ndim == 1 else field)


def shrunk(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Means over blocks of [height, width], such that neither is above 24."""
    out = values.astype(np.float64)
    for axis, length in enumerate(values.shape):
        if length > SIZE:
            starts = np.arange(SIZE) * length // SIZE
            counts = np.diff([*starts, length])
            with np.errstate(invalid="ignore", over="ignore"):
                out = np.add.reduceat(out, starts, axis) / np.expand_dims(counts, 1 - axis)
    return out


def _bytes(extents: Sequence[int], kinds: int) -> int:
    """Bytes of the pictures of a row, whose last two extents are the picture's."""
    return kinds * int(np.prod([min(length, SIZE) for length in extents[-2:]]))

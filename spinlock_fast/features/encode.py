"""Encodes raw families block by block into one matrix of columns."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import ENCODER_PARAMS, FamilyConfig
from spinlock_fast.data.feature_matrix import FeatureMatrix
from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource, as_float32
from spinlock_fast.data.payload_checks import checked_strings, shape_difference, tensor_shapes
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.encoders import Encoder, build_encoder, seeded_encoder
from spinlock_fast.features.missing import column_medians, missing_report, raw_statistics
from spinlock_fast.features.row_keys import row_keys
from spinlock_fast.features.statistics_encoder import StatisticsEncoder
from spinlock_fast.messages import shown

log = logging.getLogger(__name__)

_BLOCK_ROWS = 512
STANDARDIZE_CLIP = 10.0
_SMALL_BUDGET = 1 << 26  # bytes for the medians of a family without missing values

ANY_LENGTH = -1  # in a row shape: the encoder accepts any length

Progress = Callable[[str, int, int], None]


@dataclass
class FamilyEncoder:
    """The encoder of one family of raw features."""

    name: str
    encoder_name: str
    params: Any
    dataset: str
    row_shape: tuple[int, ...]
    encoder: Encoder
    center: Tensor | None = None  # [D] or [T, D] broadcast, when standardised
    scale: Tensor | None = None
    column_names: list[str] | None = None
    fill: Tensor | None = None  # [*row_shape] values that replace missing ones; NaN: the column is always 0

    @classmethod
    def seeded(cls, name: str, config: FamilyConfig, info: DatasetInfo, seed: int) -> FamilyEncoder:
        """A family with seeded random weights; raises DataError where the encoder does not accept the rows."""
        try:
            encoder = seeded_encoder(info.row_shape, config.encoder_params, name, seed)
        except ValueError as error:
            raise DataError(f"families.{name}: {info.path}: {error}") from None
        return cls(name, config.encoder, config.encoder_params, info.path, info.row_shape, encoder)

    @property
    def names(self) -> list[str]:
        """Name "family::column" of every output column."""
        columns = self.column_names or [f"{self.name}_{i}" for i in range(self.encoder.output_dim)]
        return [f"{self.name}::{column}" for column in columns]

    def accepts(self, row_shape: Sequence[int]) -> bool:
        """Whether the encoder accepts rows of a shape."""
        return len(row_shape) == len(self.row_shape) and all(
            expected in (ANY_LENGTH, size) for expected, size in zip(self.row_shape, row_shape, strict=True)
        )

    def to(self, device: torch.device) -> None:
        """Moves network and statistics to a device."""
        self.encoder.to(device)
        if self.center is not None and self.scale is not None:
            self.center, self.scale = self.center.to(device), self.scale.to(device)
        if self.fill is not None:
            self.fill = self.fill.to(device)

    @property
    def dropped_columns(self) -> Tensor:
        """[D] columns of the last axis without a value in the training rows: they are 0, also in new data."""
        if self.fill is None:
            return torch.zeros(self.row_shape[-1], dtype=torch.bool)
        return self.fill.reshape(-1, self.row_shape[-1]).isnan().any(0)

    def __call__(self, raw: Tensor, place: Callable[[int], str] | None = None) -> Tensor:
        """Raw values [B, *row_shape] -> columns [B, output_dim] on the encoder's device.

        Missing values (NaN) are replaced by `fill`, or by 0 without it.

        Args:
            place: description of row i of `raw` for messages.

        Raises:
            DataError: an infinite value, named by row and position, or an overflow in the encoder.
        """
        if not self.accepts(raw.shape[1:]):
            raise DataError(
                f"family {self.name!r}: expected rows of shape {self.row_shape}, got {tuple(raw.shape[1:])}"
            )
        values = self._fill_missing(as_float32(raw, lambda row: self._describe_row(place, row)), place)
        with torch.no_grad():
            if self.center is not None and self.scale is not None:
                clip = STANDARDIZE_CLIP
                values = ((values - self.center) / self.scale).clamp(-clip, clip)
            columns: Tensor = self.encoder(values)
        if not bool(torch.isfinite(columns).all()):
            row = int((~torch.isfinite(columns)).nonzero()[0, 0])
            raise DataError(
                f"{self._describe_row(place, row)} overflows in {self.encoder_name}; "
                f"families.{self.name}.standardize: true may help"
            )
        return columns

    def _fill_missing(self, raw: Tensor, place: Callable[[int], str] | None) -> Tensor:
        """The values with missing ones replaced; raises DataError for an infinite value."""
        dropped = bool(self.dropped_columns.any())  # new data may have values in such a column
        rows = torch.arange(len(raw), device=raw.device) if dropped else _rows_with_nonfinite(raw)
        if not len(rows):
            return raw
        values = raw[rows]
        infinite = torch.isinf(values)
        if bool(infinite.any()):
            row, *position = (int(i) for i in infinite.nonzero()[0])
            where = ", ".join(str(i) for i in position)
            raise DataError(f"{self._describe_row(place, int(rows[row]))}, position [{where}] is infinite")
        if self.fill is None:
            values = torch.nan_to_num(values, nan=0.0)
        else:
            missing = torch.isnan(values)
            if dropped:
                missing |= self.fill.isnan()
            values = torch.where(missing, torch.nan_to_num(self.fill, nan=0.0), values)
        return values if len(rows) == len(raw) else raw.index_copy(0, rows, values)

    def _describe_row(self, place: Callable[[int], str] | None, row: int) -> str:
        return place(row) if place is not None else f"family {self.name!r}: row {row}"

    def state(self) -> dict[str, Any]:
        """State for `from_state`: tensors and plain values."""
        return {
            "encoder_name": self.encoder_name,
            "encoder_params": self.params.model_dump(),
            "dataset": self.dataset,
            "row_shape": list(self.row_shape),
            "state_dict": dict(self.encoder.state_dict()),
            "center": self.center,
            "scale": self.scale,
            "column_names": self.column_names,
            "fill": self.fill,
        }

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, Any]) -> FamilyEncoder:
        """The encoder with a saved state; raises DataError, or the error of a wrong entry (see `payload_errors`)."""
        params = ENCODER_PARAMS[state["encoder_name"]].model_validate(state["encoder_params"])
        shape = tuple(int(size) for size in state["row_shape"])
        if not isinstance(state["dataset"], str) or not isinstance(name, str):
            raise DataError(f"{shown(name)}: names of families and datasets must be text")
        actual = tensor_shapes(state["state_dict"])
        with torch.device("meta"):  # allocates nothing for a network larger than its weights
            expected = tensor_shapes(build_encoder(shape, params).state_dict())
        if problem := shape_difference(actual, expected):
            raise DataError(f"{name}: {problem}")
        encoder = build_encoder(shape, params)
        encoder.load_state_dict(state["state_dict"])
        columns = state["column_names"]
        for entry in ("center", "scale", "fill"):
            value = state.get(entry)  # earlier checkpoints have no fill: missing values are 0
            if value is not None and not _broadcasts(tuple(value.shape), shape):
                raise DataError(f"{name}: {entry} is {list(value.shape)}, expected {list(shape)}")
        return cls(
            name,
            state["encoder_name"],
            params,
            state["dataset"],
            shape,
            encoder,
            state["center"],
            state["scale"],
            checked_strings(columns, "column_names", encoder.output_dim) if columns is not None else None,
            state.get("fill"),
        )


def _broadcasts(shape: tuple[int, ...], row_shape: tuple[int, ...]) -> bool:
    """Whether an array can be broadcast to rows of a shape; ANY_LENGTH matches any length."""
    if len(shape) > len(row_shape):
        return False
    last = row_shape[len(row_shape) - len(shape) :]
    return all(actual in (1, size) or size == ANY_LENGTH for actual, size in zip(shape, last, strict=True))


def make_encoders(
    source: FeatureSource,
    families: Mapping[str, FamilyConfig],
    seed: int,
    memory_budget: int,
    training_rows: NDArray[np.int64] | None = None,
) -> list[FamilyEncoder]:
    """Seeded encoders of all families, with standardisation statistics where `standardize` is set.

    Args:
        training_rows: rows whose non-missing values are used; None: all rows, with missing values as 0.
    """
    encoders = []
    for name, config in families.items():
        family = FamilyEncoder.seeded(name, config, source.datasets[name], seed)
        if config.encoder == "IdentityEncoder":
            family.column_names = source.feature_names(name)
        elif isinstance(family.encoder, StatisticsEncoder):
            columns = source.series_names(name) or [f"{name}_{i}" for i in range(family.row_shape[-1])]
            family.column_names = family.encoder.column_names(columns)
        if config.standardize:
            family.center, family.scale = raw_statistics(source, name, training_rows, memory_budget)
        encoders.append(family)
    return encoders


@dataclass(frozen=True)
class Encoded:
    """The encoded rows of a data set."""

    columns: NDArray[np.float32]  # [N, sum of output_dim]
    keys: NDArray[np.int64]  # [N], see `row_keys`
    missing: dict[str, int]  # missing values by family


def encode(
    source: FeatureSource,
    encoders: list[FamilyEncoder],
    memory_budget: int,
    device: torch.device,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Columns [N, sum of output_dim] of all rows, see `encode_rows`."""
    return encode_rows(source, encoders, memory_budget, device, progress).columns


def encode_rows(
    source: FeatureSource,
    encoders: list[FamilyEncoder],
    memory_budget: int,
    device: torch.device,
    progress: Progress | None = None,
    training_rows: NDArray[np.int64] | None = None,
    matrix: FeatureMatrix | None = None,
    ranks: Ranks = SINGLE,
) -> Encoded:
    """Columns of all rows, in the order of `encoders`.

    Holds at most `memory_budget` bytes of raw values, and an eighth of it for medians.

    Args:
        training_rows: the `fill` of every family is set to the medians of these rows; None: it is not changed.
        matrix: receives the columns; by default a new one in memory.
        ranks: each encodes a part of the blocks of every family; needs a matrix that the ranks share.

    Raises:
        DataError: an infinite value, a damaged file, or a budget below one row.
    """
    if matrix is None:
        matrix = FeatureMatrix(source.rows, sum(family.encoder.output_dim for family in encoders))
    keys = np.zeros(source.rows, dtype=np.int64)
    missing = {}
    column = 0
    for family in encoders:
        family.to(device)
        columns = slice(column, column + family.encoder.output_dim)
        counts = np.zeros(family.row_shape[-1], dtype=np.int64)
        done = 0
        for block in encode_blocks(source, family, memory_budget, device, training_rows, ranks):
            matrix.write(block.start, block.columns, columns)
            keys[block.start : block.start + len(block.keys)] += block.keys
            counts += block.missing
            done += len(block.columns)
            if progress is not None:
                progress(family.name, min(done * ranks.size, source.rows), source.rows)
        matrix.synchronize()
        ranks.sum_(torch.from_numpy(counts))
        if training_rows is not None and family.fill is None:  # nothing is missing here, but new data may have gaps
            budget = memory_budget if counts.any() else min(memory_budget, _SMALL_BUDGET)
            family.fill = column_medians(source, family.name, training_rows, budget)
        family.to(torch.device("cpu"))
        missing[family.name] = int(counts.sum())
        if counts.any():
            filling = "0" if family.fill is None else "the median of the training rows"
            names = source.feature_names(family.name)
            log.info("%s", missing_report(family.name, counts, family.dropped_columns.numpy(), names, filling))
        column = columns.stop
    ranks.sum_(torch.from_numpy(keys))
    return Encoded(matrix.x, keys, missing)


class EncodedBlock(NamedTuple):
    """Consecutive rows of one family."""

    start: int  # the first row
    columns: NDArray[np.float32]  # [B, output_dim]
    keys: NDArray[np.int64]  # [B], see `row_keys`
    missing: NDArray[np.int64]  # [D] missing values of each column of the last axis


def encode_blocks(
    source: FeatureSource,
    family: FamilyEncoder,
    memory_budget: int,
    device: torch.device,
    training_rows: NDArray[np.int64] | None = None,
    ranks: Ranks = SINGLE,
) -> Iterator[EncodedBlock]:
    """Encodes this rank's part of one family block by block; see `encode_rows`."""
    info = source.datasets[family.name]
    rows = block_rows(info, memory_budget)
    read_budget = memory_budget - rows * info.row_bytes  # without the copy that has no NaN
    # Ranks on different hosts write no common page of 4,096 bytes, whatever the width of the matrix.
    unit = 1 if ranks.local_size == ranks.size else 1024 // math.gcd(rows, 1024)
    blocks = -(-info.rows // rows)
    share = ranks.share(-(-blocks // unit))
    part = slice(share.start * unit, min(share.stop * unit, blocks))
    for start, raw in source.batches([family.name], rows, read_budget, device, part):
        values = raw[family.name]
        counts = _missing_by_column(values)
        if counts.any() and training_rows is not None and family.fill is None:
            family.fill = column_medians(source, family.name, training_rows, memory_budget).to(device)
        columns = family(values, source.row_locator(family.name, start)).cpu().numpy()
        yield EncodedBlock(start, columns, row_keys(values, family.name).cpu().numpy(), counts)


def _rows_with_nonfinite(values: Tensor) -> Tensor:
    """[m] rows of values [B, ...] that may contain NaN or Inf: those with a non-finite sum."""
    rows: Tensor = (~torch.isfinite(values.flatten(1).sum(1))).nonzero()[:, 0]
    return rows


def _missing_by_column(values: Tensor) -> NDArray[np.int64]:
    """[D] number of missing values of each column of the last axis."""
    D = values.shape[-1]
    missing = torch.isnan(values[_rows_with_nonfinite(values)])
    counts: NDArray[np.int64] = missing.reshape(-1, D).sum(0).cpu().numpy()
    return counts


def encode_seconds(
    source: FeatureSource, encoders: Sequence[FamilyEncoder], memory_budget: int, device: torch.device
) -> float:
    """Estimated seconds of `encode`, from one block of every family."""
    seconds = 0.0
    for family in encoders:
        info = source.datasets[family.name]
        rows = min(block_rows(info, memory_budget), info.rows)
        family.to(device)
        started = time.perf_counter()
        raw = torch.from_numpy(source.read(family.name, 0, rows)).to(device)
        family(raw, source.row_locator(family.name, 0)).cpu()
        seconds += (time.perf_counter() - started) * info.rows / rows
    return seconds


def block_rows(info: DatasetInfo, memory_budget: int) -> int:
    """Rows per encoded block: whole chunks where they fit, at most 512 rows or one chunk."""
    # Four blocks exist at once: being read, being encoded, just released, and the copy without NaN. Each row has an
    # index of 8 bytes as well.
    needed = 4 * (info.row_bytes + 8)
    fit = memory_budget // needed
    if fit < 1:
        raise ConfigError(
            f"memory_budget {memory_budget} is below one row of {info.path}, which needs at least {needed} bytes"
        )
    rows = min(fit, max(_BLOCK_ROWS, info.chunk_rows))
    return rows - rows % info.chunk_rows if rows >= info.chunk_rows else rows

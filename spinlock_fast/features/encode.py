"""Raw families, block by block, to one matrix of columns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import ENCODER_PARAMS, FamilyConfig
from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource, as_float32
from spinlock_fast.data.payload_checks import checked_strings, shape_difference, tensor_shapes
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.encoders import Encoder, build_encoder, seeded_encoder
from spinlock_fast.features.missing import column_medians, missing_report, raw_statistics
from spinlock_fast.features.row_keys import row_keys
from spinlock_fast.messages import shown

log = logging.getLogger(__name__)

_BLOCK_ROWS = 512
_STANDARDIZE_CLIP = 10.0
_LITTLE_BUDGET = 1 << 26  # for medians that no row of this data set needs

ANY_LENGTH = -1  # in a row shape: a length that the encoder does not depend on

Progress = Callable[[str, int, int], None]


@dataclass
class FamilyEncoder:
    """One family: where its raw values lie and how they become columns."""

    name: str
    encoder_name: str
    params: Any
    dataset: str
    row_shape: tuple[int, ...]
    encoder: Encoder
    center: Tensor | None = None  # [D] or [T, D] broadcast, when standardised
    scale: Tensor | None = None
    column_names: list[str] | None = None
    fill: Tensor | None = None  # [*row_shape], replaces missing values; NaN: the column counts as 0 throughout

    @classmethod
    def seeded(cls, name: str, config: FamilyConfig, info: DatasetInfo, seed: int) -> FamilyEncoder:
        """A family with freshly drawn weights; raises DataError where the encoder does not fit the rows."""
        try:
            encoder = seeded_encoder(info.row_shape, config.encoder_params, name, seed)
        except ValueError as error:
            raise DataError(f"families.{name}: {info.path}: {error}") from None
        return cls(name, config.encoder, config.encoder_params, info.path, info.row_shape, encoder)

    @property
    def names(self) -> list[str]:
        """ "family::column" of every column it gives."""
        columns = self.column_names or [f"{self.name}_{i}" for i in range(self.encoder.output_dim)]
        return [f"{self.name}::{column}" for column in columns]

    def fits(self, row_shape: Sequence[int]) -> bool:
        """Whether rows have the shape that the encoder takes."""
        return len(row_shape) == len(self.row_shape) and all(
            expected in (ANY_LENGTH, given) for expected, given in zip(self.row_shape, row_shape, strict=True)
        )

    def to(self, device: torch.device) -> None:
        """Moves the network to a device."""
        self.encoder.to(device)
        if self.center is not None and self.scale is not None:
            self.center, self.scale = self.center.to(device), self.scale.to(device)
        if self.fill is not None:
            self.fill = self.fill.to(device)

    @property
    def dropped(self) -> Tensor:
        """[D] columns of the last axis that had no value in the training rows: they count as 0, in new data as well."""
        if self.fill is None:
            return torch.zeros(self.row_shape[-1], dtype=torch.bool)
        return self.fill.reshape(-1, self.row_shape[-1]).isnan().any(0)

    def __call__(self, raw: Tensor, place: Callable[[int], str] | None = None) -> Tensor:
        """Raw values [B, *row_shape] -> columns [B, output_dim] on the encoder's device.

        A missing value (NaN) takes the place of `fill`, or 0 where there is none. Raises DataError naming row and
        position of an infinite value.

        Args:
            place: describes row i of `raw` in messages.
        """
        if not self.fits(raw.shape[1:]):
            raise DataError(
                f"family {self.name!r}: expected rows of shape {self.row_shape}, got {tuple(raw.shape[1:])}"
            )
        values = self._known(as_float32(raw, lambda row: self._place(place, row)), place)
        with torch.no_grad():
            if self.center is not None and self.scale is not None:
                clip = _STANDARDIZE_CLIP
                values = ((values - self.center) / self.scale).clamp(-clip, clip)
            columns: Tensor = self.encoder(values)
        if not bool(torch.isfinite(columns).all()):
            row = int((~torch.isfinite(columns)).nonzero()[0, 0])
            raise DataError(
                f"{self._place(place, row)} overflows in {self.encoder_name}; "
                f"families.{self.name}.standardize: true may help"
            )
        return columns

    def _known(self, raw: Tensor, place: Callable[[int], str] | None) -> Tensor:
        """The values with missing ones replaced."""
        dropped = bool(self.dropped.any())  # such a column may hold values in new data
        rows = torch.arange(len(raw), device=raw.device) if dropped else _rows_to_look_at(raw)
        if not len(rows):
            return raw
        values = raw[rows]
        infinite = torch.isinf(values)
        if bool(infinite.any()):
            row, *position = (int(i) for i in infinite.nonzero()[0])
            where = ", ".join(str(i) for i in position)
            raise DataError(f"{self._place(place, int(rows[row]))}, position [{where}] is infinite")
        if self.fill is None:
            values = torch.nan_to_num(values, nan=0.0)
        else:
            missing = torch.isnan(values)
            if dropped:
                missing |= self.fill.isnan()
            values = torch.where(missing, torch.nan_to_num(self.fill, nan=0.0), values)
        return values if len(rows) == len(raw) else raw.index_copy(0, rows, values)

    def _place(self, place: Callable[[int], str] | None, row: int) -> str:
        return place(row) if place is not None else f"family {self.name!r}: row {row}"

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state` takes."""
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
        """The encoder of what `state` gave; raises DataError, or what a wrong entry raises (see `payload.reading`)."""
        params = ENCODER_PARAMS[state["encoder_name"]].model_validate(state["encoder_params"])
        shape = tuple(int(size) for size in state["row_shape"])
        if not isinstance(state["dataset"], str) or not isinstance(name, str):
            raise DataError(f"{shown(name)}: names of families and datasets must be texts")
        found = tensor_shapes(state["state_dict"])
        with torch.device("meta"):  # a network that is larger than its weights would take memory for nothing
            expected = tensor_shapes(build_encoder(shape, params).state_dict())
        if problem := shape_difference(found, expected):
            raise DataError(f"{name}: {problem}")
        encoder = build_encoder(shape, params)
        encoder.load_state_dict(state["state_dict"])
        columns = state["column_names"]
        for entry in ("center", "scale", "fill"):
            value = state.get(entry)  # checkpoints before `nan_fill` have no fill: missing values count as 0
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
    """Whether an array can be broadcast to rows of a shape, in which any length is ANY_LENGTH."""
    if len(shape) > len(row_shape):
        return False
    last = row_shape[len(row_shape) - len(shape) :]
    return all(found in (1, size) or size == ANY_LENGTH for found, size in zip(shape, last, strict=True))


def make_encoders(
    source: FeatureSource,
    families: Mapping[str, FamilyConfig],
    seed: int,
    memory_budget: int,
    training_rows: NDArray[np.int64] | None = None,
) -> list[FamilyEncoder]:
    """Seeded encoders of all families, standardised where the family asks for it.

    Args:
        training_rows: standardise by the known values of these rows; None: by all rows, a missing value counts as 0.
    """
    encoders = []
    for name, config in families.items():
        family = FamilyEncoder.seeded(name, config, source.datasets[name], seed)
        if config.encoder == "IdentityEncoder":
            family.column_names = source.feature_names(name)
        if config.standardize:
            family.center, family.scale = raw_statistics(source, name, training_rows, memory_budget)
        encoders.append(family)
    return encoders


@dataclass(frozen=True)
class Encoded:
    """All rows of a data set as columns."""

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
) -> Encoded:
    """Columns of all rows, in the order of `encoders`.

    Holds at most `memory_budget` bytes of raw values at once, and an eighth of it for medians.

    Args:
        training_rows: sets the `fill` of every family to the medians of these rows; None leaves it as it is.

    Raises:
        DataError: an infinite value, a damaged file, or a budget below one row.
    """
    width = sum(family.encoder.output_dim for family in encoders)
    out = np.empty((source.rows, width), dtype=np.float32)
    keys = np.zeros(source.rows, dtype=np.int64)
    missing = {}
    column = 0
    for family in encoders:
        family.to(device)
        columns = slice(column, column + family.encoder.output_dim)
        counts = np.zeros(family.row_shape[-1], dtype=np.int64)
        for block in encode_blocks(source, family, memory_budget, device, progress, training_rows):
            rows = slice(block.start, block.start + len(block.columns))
            out[rows, columns] = block.columns
            keys[rows] += block.keys
            counts += block.missing
        family.to(torch.device("cpu"))
        missing[family.name] = int(counts.sum())
        if counts.any():
            filling = "0" if family.fill is None else "the median of the training rows"
            names = source.feature_names(family.name)
            log.info("%s", missing_report(family.name, counts, family.dropped.numpy(), names, filling))
        column = columns.stop
    return Encoded(out, keys, missing)


class EncodedBlock(NamedTuple):
    """Some rows of one family."""

    start: int  # the first row
    columns: NDArray[np.float32]  # [B, output_dim]
    keys: NDArray[np.int64]  # [B], see `row_keys`
    missing: NDArray[np.int64]  # [D] missing values of each column of the last axis


def encode_blocks(
    source: FeatureSource,
    family: FamilyEncoder,
    memory_budget: int,
    device: torch.device,
    progress: Progress | None = None,
    training_rows: NDArray[np.int64] | None = None,
) -> Iterator[EncodedBlock]:
    """One family, block by block; see `encode_rows`."""
    info = source.datasets[family.name]
    rows = block_rows(info, memory_budget)
    left = memory_budget - rows * info.row_bytes  # beside the copy without NaN
    for start, raw in source.batches([family.name], rows, left, device):
        values = raw[family.name]
        counts = _missing_by_column(values)
        if counts.any() and training_rows is not None and family.fill is None:
            family.fill = column_medians(source, family.name, training_rows, memory_budget).to(device)
        columns = family(values, source.row_locator(family.name, start)).cpu().numpy()
        yield EncodedBlock(start, columns, row_keys(values, family.name).cpu().numpy(), counts)
        if progress is not None:
            progress(family.name, start + len(columns), info.rows)
    if training_rows is not None and family.fill is None:  # nothing is missing here, but may be in new data
        fill = column_medians(source, family.name, training_rows, min(memory_budget, _LITTLE_BUDGET))
        family.fill = fill.to(device)


def _rows_to_look_at(values: Tensor) -> Tensor:
    """[m] rows of values [B, ...] that may hold NaN or Inf, in one quick pass: a finite sum has finite parts."""
    rows: Tensor = (~torch.isfinite(values.flatten(1).sum(1))).nonzero()[:, 0]
    return rows


def _missing_by_column(values: Tensor) -> NDArray[np.int64]:
    """[D] missing values of each column of the last axis."""
    D = values.shape[-1]
    missing = torch.isnan(values[_rows_to_look_at(values)])
    counts: NDArray[np.int64] = missing.reshape(-1, D).sum(0).cpu().numpy()
    return counts


def encode_seconds(
    source: FeatureSource, encoders: Sequence[FamilyEncoder], memory_budget: int, device: torch.device
) -> float:
    """Seconds that `encode` may take, from one block of every family."""
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
    """Rows that are encoded at once: whole chunks while they fit, at most 512 or one chunk."""
    # One block is read while another is encoded and a third was just given away; and the copy without NaN. Every
    # row has a number of 8 bytes besides.
    needed = 4 * (info.row_bytes + 8)
    fit = memory_budget // needed
    if fit < 1:
        raise ConfigError(
            f"memory_budget {memory_budget} is below one row of {info.path}: at least {needed} bytes are needed"
        )
    rows = min(fit, max(_BLOCK_ROWS, info.chunk_rows))
    return rows - rows % info.chunk_rows if rows >= info.chunk_rows else rows

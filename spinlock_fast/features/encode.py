"""Raw families, block by block, to one matrix of columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config import ENCODER_PARAMS, FamilyConfig
from spinlock_fast.data.source import DatasetInfo, Source, as_float32
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.encoders import Encoder, build_encoder, seeded_encoder
from spinlock_fast.features.statistics import robust_scale

_BLOCK_ROWS = 512
_STANDARDIZE_CLIP = 10.0

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

    def __call__(self, raw: Tensor, place: Callable[[int], str] | None = None) -> Tensor:
        """Raw values [B, *row_shape] -> columns [B, output_dim] on the encoder's device.

        NaN counts as 0. Raises DataError naming row and position of an infinite value.

        Args:
            place: describes row i of `raw` in messages.
        """
        if not self.fits(raw.shape[1:]):
            raise DataError(
                f"family {self.name!r}: expected rows of shape {self.row_shape}, got {tuple(raw.shape[1:])}"
            )
        raw = as_float32(raw, lambda row: self._place(place, row))
        infinite = torch.isinf(raw)
        if bool(infinite.any()):
            row, *position = (int(i) for i in infinite.nonzero()[0])
            where = ", ".join(str(i) for i in position)
            raise DataError(f"{self._place(place, row)}, position [{where}] is infinite")
        values = torch.nan_to_num(raw, nan=0.0)
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
        }

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, Any]) -> FamilyEncoder:
        params = ENCODER_PARAMS[state["encoder_name"]].model_validate(state["encoder_params"])
        shape = tuple(state["row_shape"])
        encoder = build_encoder(shape, params)
        encoder.load_state_dict(state["state_dict"])
        return cls(
            name,
            state["encoder_name"],
            params,
            state["dataset"],
            shape,
            encoder,
            state["center"],
            state["scale"],
            state["column_names"],
        )


def make_encoders(
    source: Source, families: Mapping[str, FamilyConfig], seed: int, memory_budget: int
) -> list[FamilyEncoder]:
    """Seeded encoders of all families, standardised where the family asks for it."""
    encoders = []
    for name, config in families.items():
        family = FamilyEncoder.seeded(name, config, source.datasets[name], seed)
        if config.encoder == "IdentityEncoder":
            family.column_names = source.feature_names(name)
        if config.standardize:
            family.center, family.scale = _raw_statistics(source, name, memory_budget)
        encoders.append(family)
    return encoders


def _raw_statistics(source: Source, family: str, memory_budget: int) -> tuple[Tensor, Tensor]:
    """Median and robust scale per last-axis column, from rows spread evenly over the data set."""
    info = source.datasets[family]
    # The sample, its copy without NaN and its deviations from the median exist together.
    rows = max(1, min(info.rows, 8192, memory_budget // (4 * info.row_bytes)))
    chunk = rows if rows == info.rows else max(1, min(info.chunk_rows, rows))
    starts = np.linspace(0, info.rows - chunk, max(1, rows // chunk)).astype(int)
    chosen = (starts[:, None] + np.arange(chunk)).ravel()
    values = np.nan_to_num(source.read_rows(family, chosen), nan=0.0).reshape(-1, info.row_shape[-1])
    center, scale = robust_scale(values)
    scale = np.where(scale > 0, scale, 1.0)
    return torch.from_numpy(center).float(), torch.from_numpy(scale).float()


def encode(
    source: Source,
    encoders: list[FamilyEncoder],
    memory_budget: int,
    device: torch.device,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Columns [N, sum of output_dim] of all rows, in the order of `encoders`.

    Holds at most `memory_budget` bytes of raw values at once.

    Raises:
        DataError: an infinite value, a damaged file, or a budget below one row.
    """
    width = sum(family.encoder.output_dim for family in encoders)
    out = np.empty((source.rows, width), dtype=np.float32)
    column = 0
    for family in encoders:
        family.to(device)
        columns = slice(column, column + family.encoder.output_dim)
        for start, block in encode_blocks(source, family, memory_budget, device, progress):
            out[start : start + len(block), columns] = block
        family.to(torch.device("cpu"))
        column = columns.stop
    return out


def encode_blocks(
    source: Source,
    family: FamilyEncoder,
    memory_budget: int,
    device: torch.device,
    progress: Progress | None = None,
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first row, columns [B, output_dim]) of one family, block by block."""
    info = source.datasets[family.name]
    rows = block_rows(info, memory_budget)
    left = memory_budget - rows * info.row_bytes  # beside the copy without NaN
    for start, raw in source.batches([family.name], rows, left, device):
        block = family(raw[family.name], source.placing(family.name, start)).cpu().numpy()
        yield start, block
        if progress is not None:
            progress(family.name, start + len(block), info.rows)


def encode_seconds(
    source: Source, encoders: Sequence[FamilyEncoder], memory_budget: int, device: torch.device
) -> float:
    """Seconds that `encode` may take, from one block of every family."""
    seconds = 0.0
    for family in encoders:
        info = source.datasets[family.name]
        rows = min(block_rows(info, memory_budget), info.rows)
        family.to(device)
        started = time.perf_counter()
        raw = torch.from_numpy(source.read(family.name, 0, rows)).to(device)
        family(raw, source.placing(family.name, 0)).cpu()
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

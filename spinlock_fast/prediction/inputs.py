"""Rows of predictor inputs, read in blocks, and their targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import column_names
from spinlock_fast.data.hdf5_links import get_dataset
from spinlock_fast.data.input_files import find_files, open_file
from spinlock_fast.data.loader import HDF5Loader
from spinlock_fast.descriptors.geometry import AXIS_NAMES
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.models.input_check import TEST, TRAIN, VALIDATION, InputCheck, KnownRows
from spinlock_fast.prediction.network import InputShape
from spinlock_fast.prediction.settings import PredictorConfig
from spinlock_fast.tokenizer import Tokenizer

_POOLED = 8  # points per axis of a field in `signature`


@dataclass(frozen=True)
class Batch:
    """Rows of inputs: theta [B, P] (no columns where it is not an input), u0 [B, C, *space] or None."""

    index: Tensor  # [B] row numbers
    theta: Tensor
    field: Tensor | None

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.index[rows], self.theta[rows], None if self.field is None else self.field[rows])


@dataclass(frozen=True)
class Targets:
    """Tokens [N, G], normalised features [N, F], and keys [N] of rows, see `Tokenizer.row_keys`."""

    tokens: Tensor
    features: Tensor
    keys: NDArray[np.int64]


class Inputs:
    """The input datasets of a file.

    Args:
        paths: HDF5 file, glob or list of files.
        config: names the datasets.
        budget: bytes of decoded rows.

    Raises:
        DataError: a dataset is missing or has another number of dimensions.
    """

    def __init__(self, paths: str | list[str], config: PredictorConfig, budget: int = 1_250_000_000) -> None:
        self.config = config
        given = {"parameters": config.parameters, "fields": config.fields}
        datasets = [path for path in given.values() if path is not None]
        files = find_files(paths)
        file = files[0]
        with open_file(file) as handle:
            for key, path in given.items():
                try:
                    if path is not None:
                        get_dataset(file, handle, path)
                except DataError as error:
                    made = ", `extract --initial-fields` writes it" if path == "inputs/fields" else ""
                    raise DataError(f"{error}; `--set {key}=null` leaves this input out{made}") from None
        self._loader = HDF5Loader(
            paths, datasets, config.batch_size, shuffle=False, memory_budget=budget, window_rows=1024
        )
        first = next(iter(self.batches()))
        parameters, field = first.theta.shape[1], first.field
        self.names: list[str] | None = None  # of the parameters; None where the file has none
        if config.parameters is not None:
            self.names = column_names(files, config.parameters, (parameters,), groups=1)
        if field is None:
            self.shape = InputShape(parameters, 0, 0)
        else:
            dimensions = field.ndim - 2
            self.shape = InputShape(
                parameters, field.shape[1], dimensions, periodic_axes(files, dimensions, config.periodic)
            )

    @property
    def rows(self) -> int:
        """N."""
        return self._loader.rows

    @property
    def files(self) -> list[Path]:
        """The files."""
        return find_files(self._loader.paths)

    def batches(self, chosen: NDArray[np.bool_] | None = None) -> Iterator[Batch]:
        """All rows, or the chosen [N] ones, in order."""
        for batch in map(self._batch, self._loader):
            if chosen is None:
                yield batch
            elif (rows := chosen[batch.index.numpy()]).any():
                yield batch[torch.from_numpy(rows)]

    def _batch(self, batch: dict[str, Tensor]) -> Batch:
        theta_path, field_path = self.config.parameters, self.config.fields
        theta = torch.empty(len(batch["index"]), 0) if theta_path is None else batch[theta_path].float()
        field = None if field_path is None else batch[field_path].float()
        for path, values, allowed, shape in (
            (theta_path, theta, (2,), "[N, P]"),
            (field_path, field, (3, 4, 5), "[N, C, X], [N, C, Y, X] or [N, C, Z, Y, X]"),
        ):
            if path is not None and values is not None and values.ndim not in allowed:
                raise DataError(f"{path}: expected {shape}, got rows of shape {list(values.shape[1:])}")
        for path, values in ((theta_path, theta), (field_path, field)):
            if values is not None and not bool(torch.isfinite(values).all()):
                row = int(batch["index"][~torch.isfinite(values.flatten(1)).all(1)][0])
                raise DataError(f"{path}: row {row} has a value that is not finite")
        return Batch(batch["index"], theta, field)


@dataclass(frozen=True)
class Standardizer:
    """Mean and standard deviation of theta [P] and of the channels of u0 [C]."""

    theta_mean: Tensor
    theta_std: Tensor
    field_mean: Tensor
    field_std: Tensor

    @classmethod
    def fit(cls, shape: InputShape, batches: Iterable[Batch]) -> Standardizer:
        """Of the training rows."""
        sums = [torch.zeros(3, size, dtype=torch.float64) for size in shape[:2]]
        for batch in batches:
            field = torch.empty(0, 0) if batch.field is None else batch.field.movedim(1, -1).flatten(0, -2)
            for total, values in zip(sums, (batch.theta, field), strict=True):
                values = values.double()
                total += torch.stack(
                    [torch.full((values.shape[1],), float(len(values))), values.sum(0), (values**2).sum(0)]
                )
        parts = []
        for count, total, square in sums:
            mean = total / count
            std = (square / count - mean**2).clamp(min=0.0).sqrt()
            parts += [mean.float(), torch.where(std > 1e-12, std, 1.0).float()]
        return cls(*parts)

    def __call__(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Standardised theta and u0 on a device."""
        theta = (batch.theta - self.theta_mean) / self.theta_std
        if batch.field is None:
            return theta.to(device), None
        size = (-1, *[1] * (batch.field.ndim - 2))
        field = (batch.field - self.field_mean.view(size)) / self.field_std.view(size)
        return theta.to(device), field.to(device)


def signature(theta: Tensor, field: Tensor | None) -> Tensor:
    """[B, S] in which neighbours are searched: theta, and u0 averaged to 8 points per axis, with equal weights."""
    parts = [theta / max(theta.shape[1], 1) ** 0.5]
    if field is not None:
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[field.ndim - 3]
        pooled = pool(field, _POOLED).flatten(1)
        parts.append(pooled / pooled.shape[1] ** 0.5)
    return torch.cat(parts, 1).cpu()


def read_targets(tokenizer: Tokenizer, paths: str | list[str], progress: Any = None) -> Targets:
    """Encodes all rows of a file; logs how many have no value in a family, and whether they are out of distribution."""
    tokens, features, keys = [], [], []
    with tokenizer.source(paths) as source:
        check = InputCheck(tokenizer.training_range, source.rows)
        for start, raw, x in tokenizer.raw_and_features(source, check=check):
            keys.append(tokenizer.row_keys(raw))
            features.append(torch.from_numpy(x))
            tokens.append(tokenizer.model.get_tokens(features[-1].to(tokenizer.device)).cpu())
            if progress is not None:
                progress("tokens", start + len(x), source.rows)
    check.log_warnings()
    found = torch.cat(tokens)
    if bool((found < 0).any()):
        raise DataError(f"row {int((found < 0).any(1).nonzero()[0])}: overflow in the encoder of the tokenizer")
    return Targets(found, torch.cat(features), np.concatenate(keys))


def periodic_axes(files: Sequence[Path], dimensions: int, given: str | None) -> tuple[bool, ...]:
    """Whether each space axis is periodic, in the order of the dataset; empty where neither the files nor `given` say.

    Args:
        given: names of the periodic axes, or "none"; None: by the attribute `periodic` of the files, which `extract`
            writes.

    Raises:
        ConfigError: `given` names an axis that the fields do not have.
        DataError: the attribute does not fit the fields, or differs between files.
    """
    names = AXIS_NAMES[dimensions]
    if given is not None:
        given = "" if given == "none" else given
        if unknown := set(given) - set(names):
            raise ConfigError(f"periodic: the fields have no axis {min(unknown)!r}, only {', '.join(names)}")
        return tuple(name in given for name in names)
    found: list[tuple[bool, ...]] = []
    for path in files:
        with open_file(path) as file:
            values = np.atleast_1d(np.asarray(file.attrs.get("periodic", ())))
        if values.size not in (0, dimensions) or (values.size and values.dtype.kind not in "biu"):
            raise DataError(f"{path}: attribute periodic: expected {dimensions} times true or false")
        found.append(tuple(bool(value) for value in values))
        if found[-1] != found[0]:
            raise DataError(f"{path}: attribute periodic: {list(found[-1])}, but {list(found[0])} in {files[0]}")
    return found[0]


def split_rows(known: KnownRows | None, keys: NDArray[np.int64], config: PredictorConfig) -> NDArray[np.uint8]:
    """[N] TRAIN, VALIDATION (by which the best epoch is chosen) or TEST (only measured).

    Test rows are those that the tokenizer's run held out, if they are between 1 % and half of the rows, else a random
    share. Validation rows are a random share of the others.
    """
    order = np.random.default_rng(np.random.SeedSequence(config.random_seed)).permutation(len(keys))
    splits = np.full(len(keys), TRAIN, np.uint8)
    of_run = splits if known is None else known.splits_of(keys)
    held_out = np.isin(of_run, (VALIDATION, TEST))
    if 0.01 <= held_out.mean() <= 0.5 and (of_run == TRAIN).any():
        splits[held_out] = TEST
    else:
        splits[order[: max(1, round(len(keys) * config.test_fraction))]] = TEST
    others = order[splits[order] == TRAIN]
    splits[others[: max(1, round(len(others) * config.val_fraction))]] = VALIDATION
    if not (splits == TRAIN).any():
        raise ConfigError("val_fraction and test_fraction leave no row to train on")
    return splits


def earlier_levels(categories: Sequence[str], enabled: bool) -> list[list[int]]:
    """[G] codebooks of the same category before each codebook."""
    return [[h for h in range(g) if categories[h] == name] if enabled else [] for g, name in enumerate(categories)]

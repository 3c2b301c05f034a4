"""The tokenizer of a checkpoint: raw features to tokens and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.checkpoints.directory import checkpoint_hash, load_payload, model_from_payload
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_arrays import to_real_tensor
from spinlock_fast.data.payload_checks import checked_strings, payload_errors
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError, OutputError
from spinlock_fast.features.cleaning import FeatureCleaner
from spinlock_fast.features.encode import FamilyEncoder, block_rows
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.features.row_keys import row_keys
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.models.input_check import InputCheck, KnownRows, TrainingRange
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.output.locks import locked_output_file
from spinlock_fast.output.part_files import write_in_order
from spinlock_fast.output.token_files import TokenTable, check_format, token_file

log = logging.getLogger(__name__)

DEFAULT_BUDGET = 1_250_000_000
_ROWS_AT_ONCE = 4096


@dataclass
class Tokenizer:
    """Encoders, cleaning, normalisation and model of one checkpoint."""

    model: CategoricalHierarchicalVQVAE
    families: list[FamilyEncoder]
    cleaner: FeatureCleaner
    normalizer: Normalizer
    feature_names: list[str]
    checkpoint_hash: str = ""
    allow_external: bool = True  # False: refuses data files with links to other directories
    known_rows: KnownRows | None = None  # None: written by an earlier version, or converted
    training_range: TrainingRange | None = None
    field_grid: FieldGrid | None = None  # of the fields that `extract` described; None: not recorded

    @classmethod
    def from_checkpoint(cls, directory: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
        """The tokenizer of a checkpoint directory; raises DataError."""
        payload = load_payload(directory)
        tokenizer = cls.from_payload(payload)
        tokenizer.checkpoint_hash = checkpoint_hash(directory)
        return tokenizer.to(device)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of the contents of a model file.

        Raises:
            DataError: an entry has the wrong type or shape, or does not fit the others; names the writing version.
        """
        model = model_from_payload(payload)
        F = model.config.input_dim
        with payload_errors(payload, "encoder_state_dicts"):
            families = [FamilyEncoder.from_state(name, state) for name, state in payload["encoder_state_dicts"].items()]
        with payload_errors(payload, "feature_cleaning"):
            cleaner = FeatureCleaner.from_state({"keep": payload["feature_mask"], **payload["feature_cleaning"]}, F)
            columns = sum(family.encoder.output_dim for family in families)
            if cleaner.keep.size != columns:
                raise DataError(f"feature_mask has {cleaner.keep.size} columns, but the encoders give {columns}")
        with payload_errors(payload, "normalization"):
            normalizer = Normalizer.from_state(payload["normalization"], F)
        known_rows = training_range = field_grid = None
        with payload_errors(payload, "known_rows"):
            if "known_rows" in payload:
                known_rows = KnownRows.from_state(payload["known_rows"])
        with payload_errors(payload, "training_range"):
            if "training_range" in payload:
                training_range = TrainingRange.from_state(payload["training_range"], F)
        with payload_errors(payload, "field_grid"):
            if payload.get("field_grid") is not None:
                field_grid = FieldGrid.from_state(payload["field_grid"])
        with payload_errors(payload, "feature_names"):
            names = checked_strings(payload["feature_names"], "feature_names", F)
        recorded: Any = {"known_rows": known_rows, "training_range": training_range, "field_grid": field_grid}
        return cls(model, families, cleaner, normalizer, names, **recorded)

    def to(self, device: str | torch.device) -> Tokenizer:
        """Moves the networks to a device; returns the tokenizer."""
        self.model.to(device)
        for family in self.families:
            family.to(torch.device(device))
        return self

    @property
    def device(self) -> torch.device:
        return self.model.feature_order.device

    def features(self, raw: Mapping[str, Any] | str | Path | list[str] | Any) -> NDArray[np.float32]:
        """Cleaned, normalised features [N, F] of raw families or of an HDF5 file; same argument as `encode`.

        Raises:
            DataError: a family is missing, unknown or of another shape, or has an infinite value.
        """
        if _is_path(raw):
            return np.concatenate([x for _, x in self.features_file(raw)])
        return self._features(self._arrays(self._families_of(raw)), None)

    def encode(self, raw: Mapping[str, Any] | str | Path | list[str] | Any) -> Any:
        """Tokens [N, G] int64 of raw families or of an HDF5 file.

        Missing values (NaN, or masked in a numpy.ma array) are replaced as in training, by default with the median of
        the training rows. Rows far outside the range of training are reported through `logging`.

        Args:
            raw: {family: [N, ...]} numpy or torch, or a path, a glob or a list of paths; a single array where the
                tokenizer has one family. Values must be raw: use `model.get_tokens` for normalised features.

        Returns:
            A torch tensor for torch tensors, else a numpy array.

        Raises:
            DataError: see `features`; for a file also see `FeatureSource`.
        """
        if _is_path(raw):
            return np.concatenate([tokens for _, tokens in self.encode_file(raw)])
        families = self._families_of(raw)
        as_torch = any(isinstance(array, Tensor) for array in families.values())
        arrays = self._arrays(families)
        check = InputCheck(self.training_range, len(arrays[self.families[0].name]))
        tokens = self._tokens(self._features(arrays, check), check)
        self._warn(check)
        return torch.from_numpy(tokens) if as_torch else tokens

    def _families_of(self, raw: Any) -> Mapping[str, Any]:
        """{family: array} of an argument of `encode`; raises DataError naming the expected input."""
        if isinstance(raw, Mapping):
            return raw
        expected = ", ".join(f'"{f.name}": {_shape_text(f.row_shape)}' for f in self.families)
        if not isinstance(raw, (np.ndarray, Tensor)):
            raise DataError(
                f"expected raw families {{{expected}}} or the path of an HDF5 file, got {type(raw).__name__}"
            )
        if len(self.families) > 1:
            hint = ""
            if raw.ndim == 2 and raw.shape[1] == len(self.feature_names):
                hint = "; for cleaned, normalised features: tokenizer.model.get_tokens(x)"
            raise DataError(
                f"expected raw families {{{expected}}} or the path of an HDF5 file, "
                f"got one array of shape {list(raw.shape)}{hint}"
            )
        return {self.families[0].name: raw}

    def _arrays(self, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        """Raw families as tensors with equal numbers of rows; raises DataError."""
        names = [family.name for family in self.families]
        if set(raw) != set(names):
            raise DataError(f"expected the families {', '.join(names)}, got {', '.join(map(str, raw)) or 'none'}")
        arrays = {name: to_real_tensor(raw[name], f"family {name!r}") for name in names}
        for family in self.families:
            if arrays[family.name].ndim == 0:
                raise DataError(f"family {family.name!r}: expected {_shape_text(family.row_shape)}, got one number")
        if len({array.shape[0] for array in arrays.values()}) > 1:
            raise DataError(
                "families differ in rows: "
                + ", ".join(f"{name} has {array.shape[0]}" for name, array in arrays.items())
            )
        return arrays

    def _features(self, arrays: Mapping[str, Tensor], check: InputCheck | None) -> NDArray[np.float32]:
        blocks = []
        for start in range(0, max(len(arrays[self.families[0].name]), 1), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            columns = []
            for family in self.families:

                def place(row: int, start: int = start, name: str = family.name) -> str:
                    return f"family {name!r}: row {start + row}"

                with device_guard(self.device):
                    columns.append(family(arrays[family.name][rows].to(self.device), place))
            blocks.append(torch.cat(columns, 1))
        return self._prepare(torch.cat(blocks).cpu().numpy(), lambda row: f"row {row}", check)

    def encode_file(
        self, path: str | Path | list[str], memory_budget: int = DEFAULT_BUDGET, ranks: Ranks = SINGLE
    ) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(first row, tokens [B, G]) of an HDF5 file, block by block; see `encode`.

        Args:
            ranks: if there are several, each gets consecutive blocks of those of one process; all of them must read
                their blocks to the end.
        """
        with self.source(path) as source:
            check = InputCheck(self.training_range, source.rows)
            for start, _, x in self.raw_and_features(source, memory_budget, check, ranks):
                yield start, self._tokens(x, check, start)
        check.merge(ranks)
        self._warn(check)

    def features_file(
        self, path: str | Path | list[str], memory_budget: int = DEFAULT_BUDGET, check: InputCheck | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, cleaned and normalised features [B, F]) of an HDF5 file, block by block."""
        with self.source(path) as source:
            for start, _, x in self.raw_and_features(source, memory_budget, check):
                yield start, x

    def source(self, path: str | Path | list[str]) -> FeatureSource:
        """Opens the families of an HDF5 file; a context manager."""
        paths = [str(part) for part in path] if isinstance(path, list) else str(path)
        return FeatureSource(
            paths, {family.name: family.dataset for family in self.families}, allow_external=self.allow_external
        )

    def raw_and_features(
        self,
        source: FeatureSource,
        memory_budget: int = DEFAULT_BUDGET,
        check: InputCheck | None = None,
        ranks: Ranks = SINGLE,
    ) -> Iterator[tuple[int, dict[str, Tensor], NDArray[np.float32]]]:
        """(first row, raw families [B, ...] on the device, features [B, F]) of an open source, block by block.

        Args:
            check: collects statistics of the features before clipping.
            ranks: if there are several, each gets consecutive blocks of those of one process.

        Raises:
            DataError: the rows have another shape than in training; see also `features`.
        """
        for family in self.families:
            info = source.datasets[family.name]
            if not family.accepts(info.row_shape):
                raise DataError(
                    f"{source.files[0]}: {info.path}: rows of shape {info.row_shape}, "
                    f"but the checkpoint was trained on {family.row_shape}"
                )
        share = memory_budget // len(self.families)
        rows = min(block_rows(info, share) for info in source.datasets.values())
        copy = rows * max(info.row_bytes for info in source.datasets.values())  # one family without NaN
        names = [family.name for family in self.families]
        part = ranks.share(-(-source.rows // rows))
        for start, raw in source.batches(names, rows, memory_budget - copy, self.device, part):
            with device_guard(self.device):
                columns = [family(raw[family.name], source.row_locator(family.name, start)) for family in self.families]
                encoded = torch.cat(columns, 1).cpu().numpy()
            place = source.row_locator(self.families[0].name, start)
            yield start, raw, self._prepare(encoded, place, check)

    def row_keys(self, raw: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """[B] keys of raw families {name: [B, ...]}, comparable with `known_rows`."""
        keys: NDArray[np.int64] = sum(row_keys(raw[f.name], f.name) for f in self.families).cpu().numpy()  # type: ignore[union-attr]
        return keys

    def decode(self, tokens: Any) -> Any:
        """Tokens [N, G] -> features [N, F] in the units of the cleaned features, see `feature_names`.

        Raises:
            DataError: a token is not a whole number.
            IndexError: a token is outside of its codebook.
        """
        as_torch = isinstance(tokens, Tensor)
        given = to_real_tensor(tokens, "tokens")
        index = given.to(self.device, torch.int64)
        if given.is_floating_point() and not torch.equal(index.to(given.dtype), given.to(self.device)):
            raise DataError("tokens: expected whole numbers")
        with device_guard(self.device):
            blocks = [self.model.decode_from_tokens(part).cpu().numpy() for part in index.split(_ROWS_AT_ONCE)]
        features = self.normalizer.inverse(np.concatenate(blocks))
        return torch.from_numpy(features) if as_torch else features

    def _prepare(
        self, columns: NDArray[np.float32], place: Callable[[int], str], check: InputCheck | None
    ) -> NDArray[np.float32]:
        selected = self.cleaner.select(columns)
        if check is not None:
            check.add_features(selected)
        x = self.normalizer(self.cleaner.clip(selected))
        finite = np.isfinite(x).all(1)
        if not finite.all():
            row = int(np.argmin(finite))
            name = self.feature_names[int(np.argmin(np.isfinite(x[row])))]
            raise DataError(f"{place(row)}: feature {name} is too large to normalise")
        return x

    def _tokens(self, x: NDArray[np.float32], check: InputCheck, start: int = 0) -> NDArray[np.int64]:
        with device_guard(self.device):
            tokens: NDArray[np.int64] = self.model.get_tokens(torch.from_numpy(x).to(self.device)).cpu().numpy()
        if (tokens < 0).any():
            row, g = np.argwhere(tokens < 0)[0]
            raise DataError(
                f"row {start + row}: overflow in the encoder of {self.model.codebook_names[g]}: "
                "its features are far outside the range of training"
            )
        if check.reference is not None:
            sampled = slice(-start % check.stride, None, check.stride)
            decoded = self.model.decode_from_tokens(torch.from_numpy(tokens[sampled]).to(self.device)).cpu().numpy()
            check.add_errors(np.square(decoded - x[sampled]).mean(1))
        return tokens

    def _warn(self, check: InputCheck) -> None:
        warning = check.warning()
        if warning is not None:
            log.warning("%s", warning)


def write_tokens(
    tokenizer: Tokenizer,
    data: str | list[str],
    output: Path,
    memory_budget: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE,
) -> int:
    """Writes the tokens of an HDF5 file to a file whose ending names the format; see `token_file`.

    Holds at most `memory_budget` bytes of raw values at once; an earlier file is replaced when all rows are written.

    Args:
        progress: called with (rows done, all rows).
        ranks: if there are several, each encodes a share of the rows, and rank 0 writes the file.

    Returns:
        Number of rows.

    Raises:
        ConfigError: the format needs a package that is not installed.
        DataError: the data cannot be read.
        OutputError: the file cannot be written, or is the input.
    """
    model = tokenizer.model
    check_format(output)
    with tokenizer.source(data) as source:
        rows = source.rows
        if any(os.path.exists(output) and output.samefile(file) for file in source.all_files):
            raise OutputError(f"{output}: is the input file")
    if os.path.isdir(output):
        raise OutputError(f"{output}: is a directory; name a file")
    table = TokenTable(rows, model.codebook_names, model.quantizer.num_codes, tokenizer.checkpoint_hash)
    blocks = (tokens for _, tokens in tokenizer.encode_file(data, memory_budget, ranks))
    with ExitStack() as stack:
        write = None
        if ranks.is_main:
            stack.enter_context(locked_output_file(output))
            write = stack.enter_context(token_file(output, table))
        write_in_order(blocks, (rows, len(table.codebook_names)), table.dtype, output, write, ranks, progress)
    ranks.barrier()  # the file is complete
    return rows


def _is_path(raw: Any) -> TypeGuard[str | Path | list[str]]:
    return isinstance(raw, (str, Path)) or (isinstance(raw, list) and all(isinstance(p, (str, Path)) for p in raw))


def _shape_text(row_shape: tuple[int, ...]) -> str:
    return f"[N, {', '.join(str(size) if size >= 0 else 'any' for size in row_shape)}]"

"""The tokenizer of a checkpoint: raw features to tokens and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.checkpoints.directory import checkpoint_hash, load_payload, model_from_payload, model_payload
from spinlock_fast.checkpoints.hub import checkpoint_directory
from spinlock_fast.checkpoints.tokenizer_files import Origin, write_tokenizer
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_arrays import to_token_tensor
from spinlock_fast.data.payload_checks import checked_strings, payload_errors
from spinlock_fast.descriptors.field_grid import FieldGrid
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.estimators.html_summary import tokenizer_html, unfitted_html
from spinlock_fast.estimators.rows import check_columns, check_source, families_of, family_tensors, is_path
from spinlock_fast.estimators.transformer import Estimator, not_fitted
from spinlock_fast.features.cleaning import FeatureCleaner
from spinlock_fast.features.encode import FamilyEncoder, block_rows
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.features.row_keys import row_keys
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.models.code_search import NEAREST, Search, TokenSearch
from spinlock_fast.models.input_check import InputCheck, KnownRows, TrainingRange
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

DEFAULT_BUDGET = 1_250_000_000
_ROWS_AT_ONCE = 4096
_TRAINED = ("model", "families", "cleaner", "normalizer", "feature_names")


class Tokenizer(Estimator):
    """Encoders, cleaning, normalisation and model: raw features to tokens and back.

    `fit` trains one, `from_checkpoint` and `from_pretrained` load one. It is a transformer of scikit-learn: `transform`
    is `encode`, `inverse_transform` is `decode`. The arguments are used by `fit` only.
    """

    model: CategoricalHierarchicalVQVAE
    families: list[FamilyEncoder]
    cleaner: FeatureCleaner
    normalizer: Normalizer
    feature_names: list[str]
    checkpoint_hash: str = ""  # of the loaded or saved model file
    allow_external: bool = True  # False: refuses data files with links to other directories
    known_rows: KnownRows | None = None  # None: of an earlier version, converted, or of a `TrainResult`
    training_range: TrainingRange | None = None
    field_grid: FieldGrid | None = None  # of the fields that `extract` described; None: not recorded
    metrics: Mapping[str, Any] = MappingProxyType({})  # the contents of metrics.json
    origin: Origin = Origin()

    def __getattr__(self, name: str) -> Any:
        if name in (*_TRAINED, "device"):
            raise not_fitted(type(self).__name__)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _repr_html_(self) -> str:  # for notebooks
        return tokenizer_html(self) if "model" in vars(self) else unfitted_html("Tokenizer", self.settings)

    @classmethod
    def from_checkpoint(cls, directory: str | Path, device: str | torch.device = "cpu") -> Tokenizer:
        """The tokenizer of a checkpoint directory; raises DataError."""
        tokenizer = cls.from_payload(payload := load_payload(directory))
        tokenizer.checkpoint_hash = checkpoint_hash(directory)
        tokenizer.origin = Origin.read(Path(directory), payload)
        tokenizer.metrics = tokenizer.origin.metrics()
        return tokenizer.to(device)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | torch.device = "cpu", *, revision: str | None = None, **options: Any
    ) -> Tokenizer:
        """The tokenizer of a checkpoint directory, or of a repository "owner/name" of the Hugging Face Hub.

        An existing directory comes first. Only the files of a checkpoint are downloaded; no code of them is run.

        Args:
            name: directory or repository.
            device: see `to`.
            revision: branch, tag or commit of the repository.
            options: further arguments of `huggingface_hub.snapshot_download`: cache_dir, token, local_files_only.

        Raises:
            ConfigError: huggingface_hub is not installed.
            DataError: there is no such directory or repository, it cannot be downloaded, or it has no checkpoint.
        """
        return cls.from_checkpoint(checkpoint_directory(name, revision=revision, **options), device)

    @classmethod
    def from_parts(
        cls,
        model: CategoricalHierarchicalVQVAE,
        families: list[FamilyEncoder],
        cleaner: FeatureCleaner,
        normalizer: Normalizer,
        feature_names: list[str],
        **more: Any,
    ) -> Tokenizer:
        """A tokenizer of trained parts; `more` are other attributes of the class."""
        tokenizer = cls()
        parts = (model, families, cleaner, normalizer, feature_names)
        vars(tokenizer).update(zip(_TRAINED, parts, strict=True), **more)
        return tokenizer

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
        return cls.from_parts(model, families, cleaner, normalizer, names, **recorded)

    def payload(self) -> dict[str, Any]:
        """The contents of a model file, which `from_payload` reads."""
        self._check_fitted()
        cleaning = self.cleaner.state()
        parts: dict[str, Any] = {
            "encoder_state_dicts": {family.name: family.state() for family in self.families},
            "feature_mask": cleaning.pop("keep"),
            "feature_cleaning": cleaning,
            "normalization": self.normalizer.state(),
            "feature_names": self.feature_names,
            "streams": self.origin.streams,
            "code_usage": self.model.quantizer.usage,
            "code_usage_rows": int(self.model.quantizer.rows_seen),
        }
        for name in ("known_rows", "training_range", "field_grid"):
            if (known := getattr(self, name)) is not None:
                parts[name] = known.state()
        return model_payload(self.model, self.model.state_dict(), self.origin.epoch, parts)

    def save(self, directory: str | Path) -> Path:
        """Writes a checkpoint directory for `from_checkpoint` and all commands, but not to resume; returns its path.

        An earlier checkpoint there is moved to its subdirectory `previous`.

        Raises:
            OutputError: the directory cannot be written.
        """
        payload, statistics = self.payload(), self.normalizer.by_category(self.model.config.group_indices)
        write_tokenizer(Path(directory), payload, statistics, self.origin)
        self.checkpoint_hash = checkpoint_hash(directory)
        return Path(directory)

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
        if is_path(raw):
            return np.concatenate([x for _, x in self.features_file(raw)])
        arrays = family_tensors(families_of(raw, self.families, self.feature_names), self.families)
        return self._features(arrays, None)

    def encode(
        self,
        raw: Mapping[str, Any] | str | Path | list[str] | Any,
        search: Search = "nearest",
        sweeps: int = 2,
        search_weight: float = 0.0,
        perturbations: int = 0,
    ) -> Any:
        """Tokens [N, G] int64 of raw families or of an HDF5 file.

        Missing values (NaN, or masked in a numpy.ma array) are replaced as in training, by default with the median of
        the training rows. Rows without any value of a family, and rows far outside the range of training, are reported
        through `logging`.

        Args:
            raw: {family: [N, ...]} numpy or torch, or a path, a glob or a list of paths; a single array where the
                tokenizer has one family. Values must be raw: use `model.get_tokens` for normalised features.
            search: "nearest", or "joint" for a lower error; it and its settings as in `model.get_tokens`.

        Returns:
            A torch tensor for torch tensors, else a numpy array.

        Raises:
            DataError: see `features`; for a file also see `FeatureSource`.
            ValueError: another `search`, or a number out of range.
        """
        token_search = TokenSearch(search, sweeps, search_weight, perturbations).check()
        if is_path(raw):
            return np.concatenate([tokens for _, tokens in self.encode_file(raw, search=token_search)])
        given = families_of(raw, self.families, self.feature_names)
        arrays = family_tensors(given, self.families)
        check = InputCheck(self.training_range, len(arrays[self.families[0].name]))
        tokens = self._tokens(self._features(arrays, check), check, search=token_search)
        check.add_raw(arrays)
        check.log_warnings()
        return torch.from_numpy(tokens) if any(isinstance(array, Tensor) for array in given.values()) else tokens

    def _features(self, arrays: Mapping[str, Tensor], check: InputCheck | None) -> NDArray[np.float32]:
        blocks = []
        for start in range(0, max(len(arrays[self.families[0].name]), 1), _ROWS_AT_ONCE):
            columns = []
            for family in self.families:

                def place(row: int, start: int = start, name: str = family.name) -> str:
                    return f"family {name!r}: row {start + row}"

                with device_guard(self.device):
                    columns.append(family(arrays[family.name][start : start + _ROWS_AT_ONCE].to(self.device), place))
            blocks.append(torch.cat(columns, 1))
        return self._prepare(torch.cat(blocks).cpu().numpy(), lambda row: f"row {row}", check)

    def encode_file(
        self,
        path: str | Path | list[str],
        memory_budget: int = DEFAULT_BUDGET,
        ranks: Ranks = SINGLE,
        search: TokenSearch = NEAREST,
    ) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(first row, tokens [B, G]) of an HDF5 file, block by block; see `encode`.

        Args:
            ranks: if there are several, each gets consecutive blocks of those of one process; all of them must read
                their blocks to the end.
        """
        for start, tokens, _ in self.tokens_and_features(path, memory_budget, ranks, search):
            yield start, tokens

    def tokens_and_features(
        self, path: str | Path | list[str], memory_budget: int, ranks: Ranks = SINGLE, search: TokenSearch = NEAREST
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
        """As `encode_file`, with the features [B, F] of each block."""
        with self.source(path) as source:
            check = InputCheck(self.training_range, source.rows)
            for start, _, x in self.raw_and_features(source, memory_budget, check, ranks):
                yield start, self._tokens(x, check, start, search), x
        check.merge(ranks)
        check.log_warnings()

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
        datasets = {family.name: family.dataset for family in self.families}
        return FeatureSource(paths, datasets, allow_external=self.allow_external)

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
        check_source(self.families, source)
        share = memory_budget // len(self.families)
        rows = min(block_rows(info, share) for info in source.datasets.values())
        copy = rows * max(info.row_bytes for info in source.datasets.values())  # one family without NaN
        names = [family.name for family in self.families]
        part = ranks.share(-(-source.rows // rows))
        for start, raw in source.batches(names, rows, memory_budget - copy, self.device, part):
            with device_guard(self.device):
                columns = [family(raw[family.name], source.row_locator(family.name, start)) for family in self.families]
                encoded = torch.cat(columns, 1).cpu().numpy()
            if check is not None:
                check.add_raw(raw)
            place = source.row_locator(self.families[0].name, start)
            yield start, raw, self._prepare(encoded, place, check)

    def row_keys(self, raw: Mapping[str, Tensor]) -> NDArray[np.int64]:
        """[B] keys of raw families {name: [B, ...]}, comparable with `known_rows`."""
        keys: NDArray[np.int64] = sum(row_keys(raw[f.name], f.name) for f in self.families).cpu().numpy()  # type: ignore[union-attr]
        return keys

    def decode(self, tokens: Any) -> Any:
        """Tokens [N, G] -> features [N, F] in the units of the cleaned features, see `feature_names`.

        Raises:
            DataError: the tokens have another shape, or one is not a whole number.
            IndexError: a token is outside of its codebook.
        """
        as_torch = isinstance(tokens, Tensor)
        index = to_token_tensor(tokens, len(self.model.codebook_names)).to(self.device)
        with device_guard(self.device):
            blocks = [self.model.decode_from_tokens(part).cpu().numpy() for part in index.split(_ROWS_AT_ONCE)]
        features = self.normalizer.inverse(np.concatenate(blocks))
        return torch.from_numpy(features) if as_torch else features

    def normalize(self, decoded: Any) -> NDArray[np.float32]:
        """Cleaned features [N, F], such as those of `decode`, in the units of `features`."""
        return self.normalizer(np.asarray(decoded))

    def _with_dropped_columns(self, decoded: Any) -> Any:
        """Rows with the columns that cleaning dropped, for a single family whose columns are raw values."""
        if [family.encoder_name for family in self.families] != ["IdentityEncoder"] or self.cleaner.keep.all():
            return decoded
        rows = np.tile(self.cleaner.fill.astype(np.float32), (len(decoded), 1))
        rows[:, self.cleaner.keep] = np.asarray(decoded)
        return torch.from_numpy(rows) if isinstance(decoded, Tensor) else rows

    def _check_columns(self, names: Sequence[str] | None) -> None:
        if len(self.families) == 1:
            check_columns(self.families[0], names, "X")

    def _codebook_names(self) -> list[str]:
        return self.model.codebook_names

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

    def _tokens(
        self, x: NDArray[np.float32], check: InputCheck, start: int = 0, search: TokenSearch = NEAREST
    ) -> NDArray[np.int64]:
        rows = torch.from_numpy(x)
        with device_guard(self.device):
            tokens: NDArray[np.int64] = self.model.get_tokens(rows.to(self.device), *search).cpu().numpy()
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

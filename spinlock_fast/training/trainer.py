"""Training on a matrix of features: what a user calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides, load_config
from spinlock_fast.config.random_streams import seed_torch, streams_of, version
from spinlock_fast.config.schema import Levels, RunConfig
from spinlock_fast.data.host_rows import HostRows, Rows, free_memory, place_rows
from spinlock_fast.data.input_arrays import masked_to_nan
from spinlock_fast.data.payload_checks import payload_errors
from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import Split, split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, DataError, Interrupted, TrainingError
from spinlock_fast.features.categories import (
    Groups,
    assign_categories,
    category_correlation,
    discover_categories,
    max_off_diagonal,
    nearest_categories,
)
from spinlock_fast.features.matrix import MatrixNormalizer, fit_matrix_normalizer
from spinlock_fast.features.normalize import units
from spinlock_fast.features.statistics import Blocks, mean_and_std
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.models.decoder_refit import refit_decoder
from spinlock_fast.models.metrics import Metrics, complete, evaluate, evaluate_with_use
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import EpochRecord, Observer, SilentObserver

log = logging.getLogger(__name__)

_ROWS_AT_ONCE = 16384  # that are looked at when data are checked


@dataclass
class TrainResult:
    """What `Trainer.fit` returns.

    `model` is the one of the best validation, in eval mode; its quantizer's `utilization()` and `perplexity()` are
    those of the validation rows. It takes normalised rows: `normalizer` makes them of rows in the units of x (None: x
    was taken as it is). `encode` and `decode` do both steps.
    """

    model: CategoricalHierarchicalVQVAE
    metrics: Metrics
    history: list[EpochRecord]
    best_epoch: int
    split: Split
    final_state: dict[str, Any] = field(repr=False)
    normalizer: MatrixNormalizer | None = field(default=None, repr=False)

    def encode(self, x: ArrayLike | Tensor) -> Any:
        """Rows [N, F] in the units of the x that was fitted -> tokens [N, G] int64.

        Returns:
            A torch tensor where a torch tensor was given, else a numpy array.

        Raises:
            DataError: x is not a finite matrix of F columns.
        """
        data = _as_matrix(x)
        if data.shape[1] != self.model.config.input_dim:
            raise DataError(f"x must be [N, {self.model.config.input_dim}], got {list(data.shape)}")
        rows = self.normalizer(data) if self.normalizer is not None else data.astype(np.float32, copy=False)
        blocks = [self.model.get_tokens(part).cpu() for part in torch.from_numpy(rows).split(_ROWS_AT_ONCE)]
        tokens = torch.cat(blocks)
        return tokens if isinstance(x, Tensor) else tokens.numpy()

    def decode(self, tokens: Any) -> Any:
        """Tokens [N, G] -> rows [N, F] in the units of the x that was fitted; raises IndexError outside a codebook."""
        index = tokens if isinstance(tokens, Tensor) else torch.from_numpy(np.array(tokens, np.int64))
        blocks = [self.model.decode_from_tokens(part).cpu() for part in index.split(_ROWS_AT_ONCE)]
        rows = torch.cat(blocks).numpy()
        rows = self.normalizer.inverse(rows) if self.normalizer is not None else rows
        return torch.from_numpy(rows) if isinstance(tokens, Tensor) else rows


class Trainer:
    """Trains a tokenizer on a matrix of features.

    Args:
        config: settings; `device`, `random_seed`, `model` and `training` matter here.
        observer: is told of every epoch and keeps resumable states.
        stop_requested: asked after every step for the number of a signal that asks `fit` to end, as `stop` does.
    """

    def __init__(
        self,
        config: RunConfig,
        observer: Observer | None = None,
        stop_requested: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.config = config
        self.observer = observer or SilentObserver()
        self._stop_requested = stop_requested
        self._stop_signal: int | None = None
        self._ended = False  # the last `fit` has; there is nothing to stop

    @classmethod
    def from_config(
        cls,
        config: str | Path | RunConfig,
        overrides: Sequence[str] | Mapping[str, Any] = (),
        observer: Observer | None = None,
    ) -> Trainer:
        """A trainer from a YAML file or settings; `overrides` such as {"training.num_epochs": 50}."""
        if isinstance(config, RunConfig):
            return cls(apply_overrides(config, overrides), observer)
        return cls(load_config(config, overrides), observer)

    def stop(self, signal_number: int) -> None:
        """Ends `fit` after the current step: it saves a resumable state and raises Interrupted.

        Before the first `fit` it ends that one; after a `fit` has returned or raised it has no effect.
        """
        if not self._ended:
            self._stop_signal = signal_number

    def _asked_to_stop(self) -> int | None:
        return self._stop_signal if self._stop_signal is not None else self._stop_requested()

    def fit(
        self,
        x: ArrayLike | Tensor,
        group_indices: Groups | None = None,
        levels: Levels | Mapping[str, Any] | None = None,
        feature_names: Sequence[str] | None = None,
        val_rows: ArrayLike | None = None,
        *,
        normalize: bool = True,
        resume: Mapping[str, Any] | None = None,
    ) -> TrainResult:
        """Trains on a matrix of features.

        Args:
            x: [N, F] numbers without NaN or Inf. A contiguous float32 matrix is not copied as a whole; it may be a
                memory map larger than the memory, see `training.data_on_device`.
            group_indices: features of each category; discovered on the training rows when not given.
            levels: codebook sizes, see `CategoricalVQVAEConfig`; the configuration's when not given.
            feature_names: F names; "family::name" lets categories report their families.
            val_rows: rows to validate on; drawn by the seed when not given.
            normalize: columns of an x that is not standardised (by the training rows; by features in a category where
                `group_indices` is given) are clipped as `feature_cleaning` says, then normalised as
                `training.normalization_method` says. Errors and quality are in those units, see metrics["units"], and
                new rows are for `TrainResult.encode`. A standardised x, and any x with False, is taken as it is.
            resume: a state that an observer was given to save.

        Returns:
            The best model, its metrics (those of metrics.json that a matrix determines), the history.

        Raises:
            DataError: x is not a finite matrix, or has too few rows.
            TrainingError: a loss became NaN or infinite; names the first step and term.
            Interrupted: `stop` was called.
        """
        self._ended = False
        try:
            with streams_of(version() if resume is None else resume.get("streams", 1)):
                return self._fit(x, group_indices, levels, feature_names, val_rows, normalize, resume)
        finally:
            self._ended, self._stop_signal = True, None

    def _fit(
        self,
        x: ArrayLike | Tensor,
        group_indices: Groups | None,
        levels: Levels | Mapping[str, Any] | None,
        feature_names: Sequence[str] | None,
        val_rows: ArrayLike | None,
        normalize: bool,
        resume: Mapping[str, Any] | None,
    ) -> TrainResult:
        started = time.perf_counter()
        data = _as_matrix(x)
        N, F = data.shape
        names = list(feature_names) if feature_names is not None else [f"feature_{i}" for i in range(F)]
        if len(names) != F:
            raise DataError(f"feature_names has {len(names)} names for {F} columns")
        training, seed = self.config.training, self.config.random_seed
        split = split_rows(N, training, seed, val_rows)
        device = resolve_device(self.config.device)
        groups = group_indices
        discover_seconds = 0.0
        normalizer = self._normalizer(data, split, groups) if normalize else None
        transform = normalizer
        if data.dtype != np.float32:
            data = transform(data) if transform is not None else data.astype(np.float32)
            transform = None
        train_rows = RowView(data, split.train, transform)
        if groups is None:
            groups = find_categories(train_rows, names, self.config)
            discover_seconds = time.perf_counter() - started
        model_config = self._model_config(train_rows, groups, levels)
        read = sum(len(members) for members in model_config.inputs.values())
        if read < F:
            log.warning("%d of %d features are in no category: they are reconstructed, but not encoded", F - read, F)
        correlation_max = max_off_diagonal(category_correlation(train_rows, groups))
        if correlation_max > training.orthogonality_target:
            log.warning(
                "category correlation reaches %.3f, above orthogonality_target %.3f: some categories overlap "
                "(more of them: training.num_categories_auto)",
                correlation_max,
                training.orthogonality_target,
            )
        _check_memory(model_config, device)
        with _random_state_of_its_own(device):
            seed_torch(seed, device)
            model = CategoricalHierarchicalVQVAE(model_config).to(device)
            largest = max(model.quantizer.num_codes)
            if split.train.size < largest:
                raise DataError(
                    f"{split.train.size} training rows are fewer than the {largest} codes of the largest codebook"
                )
            x_train = self._placed(train_rows, device)
            x_val = self._placed(RowView(data, split.val, transform), device)
            run = TrainingRun(self.config, self.observer, self._asked_to_stop, model, x_train, x_val)
            run.began, run.train_numbers, run.val_numbers = started + discover_seconds, split.train, split.val
            if model_config.extra_inputs:
                model.fit_extra_inputs(*(torch.from_numpy(values) for values in mean_and_std(train_rows)))
            if resume is not None:
                with payload_errors(resume, "the saved state"):
                    run.load(resume)
            else:
                run.initialize_codes()
            try:
                run.train()
            except torch.OutOfMemoryError:
                raise TrainingError(
                    f"{device} has no memory left for a step of {run.one_step.batch} rows; "
                    "a smaller training.batch_size or training.topo_samples may help"
                ) from None
            final_state = run.state()  # with the random state of the run, which a longer run goes on with
        with device_guard(device):  # the run above gave the caller's device back
            best_model = run.best_model()
            if training.decoder_refit:
                refit_decoder(best_model, x_train, training.decoder_refit)
            self._stop_before_the_end(final_state)
            metrics, code_use = evaluate_with_use(best_model, run.x_val, training, run.val_numbers, "validation")
            best_model.quantizer.usage.copy_(code_use)
            best_model.quantizer.rows_seen.fill_(metrics["val_rows"])
            if split.test.size:
                self._stop_before_the_end(final_state)
                x_test = self._placed(RowView(data, split.test, transform), device)
                metrics["test"] = evaluate(best_model, x_test, training, split.test, "test")
        complete(metrics, best_model, names, correlation_max)
        idle = [c["name"] for c in metrics["categories"] if max(c["perplexity"]) < 1.0 + 1e-6]
        if idle:
            log.warning("%s: one code serves every sample, so these tokens say nothing", ", ".join(idle))
        metrics |= {
            "epochs": len(run.history),
            "best_epoch": run.best_epoch,
            "samples": N,
            "rows": "heldout",
            "units": units(training) if normalizer is not None else "those of x",
        }
        self._stop_before_the_end(final_state)
        total = run.seconds_before + time.perf_counter() - started
        metrics["seconds"] = {"discover": discover_seconds, "train": total - discover_seconds, "total": total}
        return TrainResult(best_model, metrics, run.history, run.best_epoch, split, final_state, normalizer)

    def _stop_before_the_end(self, final_state: dict[str, Any]) -> None:
        """Ends a run that is asked to stop while it is measured: all epochs are in the state that is saved."""
        stopped_by = self._asked_to_stop()
        if stopped_by is not None:
            self.observer.save(final_state)
            raise Interrupted("stopped after the last epoch, before the metrics", stopped_by)

    def _normalizer(self, x: NDArray[Any], split: Split, groups: Groups | None) -> MatrixNormalizer | None:
        training = self.config.training
        columns = None if groups is None else [int(i) for members in groups.values() for i in members]
        if columns is not None and not all(0 <= i < x.shape[1] for i in columns):
            return None  # the model refuses such groups
        found = fit_matrix_normalizer(
            x, split.train, self.config.feature_cleaning, training.normalization_method, columns or None
        )
        if found is not None:
            log.warning(
                "x is not standardised: its columns are clipped and normalised by the training rows, and errors are in "
                "%s; result.encode(x) takes rows as they are (normalize=False: train on x as it is)",
                units(training),
            )
        return found

    def _placed(self, rows: RowView, device: torch.device) -> Rows:
        placed = place_rows(rows, device, self.config.training.data_on_device)
        if isinstance(placed, HostRows):
            log.info("%s rows stay in main memory and follow to %s as they are needed", f"{len(placed):,}", device)
        return placed

    def _model_config(
        self, x: Blocks, groups: Groups, levels: Levels | Mapping[str, Any] | None
    ) -> CategoricalVQVAEConfig:
        settings = self.config.model.model_dump()
        if levels is not None:
            settings["levels"] = levels
        try:
            config = CategoricalVQVAEConfig(
                **{
                    **settings,
                    "input_dim": x.shape[1],
                    "group_indices": {k: list(map(int, v)) for k, v in groups.items()},
                }
            )
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"model: {problem.removeprefix('Value error, ')}") from None
        if config.unassigned_features == "nearest":
            return config.model_copy(update={"extra_inputs": nearest_categories(x, config.group_indices)})
        return config


def _check_memory(config: CategoricalVQVAEConfig, device: torch.device) -> None:
    """Raises ConfigError where weights, gradients and the two moments of Adam cannot fit."""
    count = config.parameter_count()
    needed, free = 4 * 4 * count, min(free_memory(device), free_memory(torch.device("cpu")))
    if needed > free:
        raise ConfigError(
            f"model: {count:,} parameters need {needed / 1e9:,.1f} GB to train, and {free / 1e9:,.1f} GB are free; "
            "reduce model.group_hidden_dim, model.group_embedding_dim or model.levels"
        )


def find_categories(x: Blocks, feature_names: Sequence[str], config: RunConfig) -> Groups:
    """Categories of features as `training.category_assignment` says; see `discover_categories`."""
    training = config.training
    if training.mapping_file is not None:
        return assign_categories(training.mapping_file, feature_names)
    groups = discover_categories(x, feature_names, training, config.random_seed)
    asked = training.num_categories_auto
    if asked is not None and len(groups) != asked:
        log.warning(
            "%d categories instead of num_categories_auto %d: those under min_features_per_category %d were merged",
            len(groups),
            asked,
            training.min_features_per_category,
        )
    return groups


@contextmanager
def _random_state_of_its_own(device: torch.device) -> Iterator[None]:
    """Gives the caller's random state back afterwards; a CUDA device is the current one meanwhile."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    with torch.cuda.device(device), torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        yield


def _as_matrix(x: ArrayLike | Tensor) -> NDArray[Any]:
    """x as a numeric matrix that is finite in float32.

    A contiguous float32 matrix is returned as it is, be it in memory or mapped into it; other types keep their
    precision until they are normalised.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        array = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    else:
        array = masked_to_nan(x)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"x must be a matrix [N, F] with at least one column, got {list(array.shape)}")
    if array.dtype.kind not in "fiub":
        raise DataError(f"x must hold numbers, got {array.dtype}")
    data = np.ascontiguousarray(array, dtype=np.float32) if array.dtype == np.float32 else array
    for start in range(0, len(data), _ROWS_AT_ONCE):
        with np.errstate(over="ignore"):
            values = data[start : start + _ROWS_AT_ONCE].astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0] + (start, 0)
            raise DataError(f"x[{row}, {column}] is {float(data[row, column])}; features must be finite in float32")
    return data

"""`Trainer`: trains a tokenizer on a matrix of features."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from torch import Tensor

from spinlock_fast.config.families import AUTO
from spinlock_fast.config.loading import apply_overrides, load_config
from spinlock_fast.config.random_streams import forked_rng, seed_torch, streams_of, version
from spinlock_fast.config.schema import Levels, RunConfig
from spinlock_fast.data.host_rows import HostRows, Rows, free_memory, place_rows
from spinlock_fast.data.payload_checks import payload_errors
from spinlock_fast.data.row_view import RowView
from spinlock_fast.data.split import Split, split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import Ranks, current_ranks
from spinlock_fast.errors import ConfigError, DataError, Interrupted, TrainingError
from spinlock_fast.features.blocks import Blocks
from spinlock_fast.features.categories import (
    Groups,
    category_correlation,
    find_categories,
    max_off_diagonal,
    nearest_categories,
)
from spinlock_fast.features.matrix import MatrixNormalizer, fit_matrix_normalizer
from spinlock_fast.features.normalize import units
from spinlock_fast.features.statistics import mean_and_std
from spinlock_fast.kernels._common.guard import device_guard
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.joint_metrics import joint_searches
from spinlock_fast.models.metrics import Metrics, add_model_metrics, evaluate, evaluate_with_counts
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.distributed import (
    agreed_signal,
    broadcast_model,
    broadcast_random_state,
    check_same_arguments,
)
from spinlock_fast.training.initial_model import InitialModel, freeze, initial_model
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import Observer, SilentObserver
from spinlock_fast.training.result import TrainResult, as_feature_matrix
from spinlock_fast.training.token_decoder_fit import fit_decoders
from spinlock_fast.training.vocabulary import compare_vocabulary, log_summary

log = logging.getLogger(__name__)


class Trainer:
    """Trains a tokenizer on a matrix of features.

    Args:
        config: settings; `device`, `random_seed`, `feature_cleaning`, `model` and `training` are used.
        observer: receives epoch records and resumable states.
        stop_requested: called after every launch of steps; returns the number of a signal that ends `fit`, else None.
        ranks: processes that train one model together; those of `torch.distributed` if not given. All of them call
            `fit` with the same rows and settings, and get the same result. `training.batch_size` is that of all ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        observer: Observer | None = None,
        stop_requested: Callable[[], int | None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> None:
        self._given_ranks = ranks
        self.config = config
        self.observer = observer or SilentObserver()
        self._stop_requested = stop_requested
        self._stop_signal: int | None = None
        self._finished = False  # the last `fit` returned or raised

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
        """Ends `fit` after the current launch of steps: it saves a resumable state and raises Interrupted.

        Before the first `fit` it ends that one; after a `fit` has returned or raised it has no effect.
        """
        if not self._finished:
            self._stop_signal = signal_number

    def _ranks(self) -> Ranks:
        return current_ranks() if self._given_ranks is None else self._given_ranks

    def _requested_signal(self) -> int | None:
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
        init_from: str | Path | Tokenizer | InitialModel | None = None,
    ) -> TrainResult:
        """Trains on a matrix of features.

        Args:
            x: [N, F] numbers without NaN or Inf. A contiguous float32 matrix is not copied as a whole; it may be a
                memory map larger than the memory, see `training.data_on_device`.
            group_indices: features of each category; discovered on the training rows if not given.
            levels: codebook sizes, see `CategoricalVQVAEConfig`; those of the configuration if not given.
            feature_names: F names; with "family::name" the metrics of a category list its families.
            val_rows: numbers of the validation rows; drawn by the seed if not given.
            normalize: clips the columns as `feature_cleaning` says and normalises them as
                `training.normalization_method` says, both fitted to the training rows, unless x (its columns in a
                category, if `group_indices` is given) is standardised already. Errors and quality are in those units,
                see metrics["units"]; `TrainResult.encode` takes new rows in the units of x. False: x is used as it is.
            resume: a state that an observer received in `save`.
            init_from: checkpoint directory or tokenizer whose model is trained further, `training.init_from` if not
                given. x has its features in their units, which are normalised as in its training; categories and
                levels are its own.

        Returns:
            The best model, its metrics (the entries of metrics.json that a matrix determines), and the history.

        Raises:
            ConfigError: a setting contradicts the checkpoint of `init_from`.
            DataError: x is not a finite matrix, or has too few rows.
            TrainingError: a loss is not finite; names the first step and term.
            Interrupted: `stop` was called, or `stop_requested` returned a signal.
        """
        self._finished = False
        try:
            initial = initial_model(self.config, init_from, self._ranks())
            trainer = self
            if initial is not None:
                config = initial.settings(self.config.model_copy(update={"families": AUTO}))
                trainer = Trainer(config, self.observer, self._requested_signal, self._given_ranks)
            with streams_of(version() if resume is None else resume.get("streams", 1)):
                return trainer._fit(x, group_indices, levels, feature_names, val_rows, normalize, resume, initial)
        finally:
            self._finished, self._stop_signal = True, None

    def _fit(
        self,
        x: ArrayLike | Tensor,
        group_indices: Groups | None,
        levels: Levels | Mapping[str, Any] | None,
        feature_names: Sequence[str] | None,
        val_rows: ArrayLike | None,
        normalize: bool,
        resume: Mapping[str, Any] | None,
        initial: InitialModel | None,
    ) -> TrainResult:
        started = time.perf_counter()
        data = as_feature_matrix(x)
        N, F = data.shape
        ranks = self._ranks()
        device = resolve_device(self.config.device)
        others = {"group_indices": group_indices, "levels": levels, "normalize": normalize, "device": device.type}
        check_same_arguments(self.config, data, val_rows, resume, others, ranks)
        names = list(feature_names) if feature_names is not None else [f"feature_{i}" for i in range(F)]
        if len(names) != F:
            raise DataError(f"feature_names has {len(names)} names for {F} columns")
        training = self.config.training
        split = split_rows(N, training, self.config.random_seed, val_rows)
        if initial is not None:
            names = initial.check_features(F, None if feature_names is None else names)
            initial.check_structure(group_indices, levels)
            group_indices = initial.model_config.group_indices
        normalizer = self._normalizer(data, split, group_indices, initial) if normalize else None
        transform = normalizer
        if data.dtype != np.float32:
            data = transform(data) if transform is not None else data.astype(np.float32)
            transform = None
        rows = partial(RowView, data, transform=transform)
        train_rows = rows(split.train)
        groups, discover_seconds = group_indices, 0.0
        if groups is None:
            groups = ranks.on_main(lambda: find_categories(train_rows, names, self.config))
            discover_seconds = time.perf_counter() - started
        model_config = (
            self._model_config(train_rows, groups, levels) if initial is None else initial.model_settings(self.config)
        )
        correlation_max = self._checked_correlation(train_rows, model_config)
        _check_memory(model_config, device)
        run, final_state = self._train(model_config, rows, split, device, started + discover_seconds, resume, initial)
        with device_guard(device):  # `_train` has restored the caller's device
            model = run.best_model()
            fit_decoders(
                model, run.x_train, run.validation.x, self.config, ranks, lambda: self._requested_signal() is not None
            )
            model.quantizer.sync = True
            freeze(model, "none")
            metrics = self._evaluate(model, run, rows, split, final_state)
        add_model_metrics(metrics, model, names, correlation_max)
        constant = [c["name"] for c in metrics["categories"] if max(c["perplexity"]) < 1.0 + 1e-6]
        if constant:
            log.warning("%s: every sample has the same code; the tokens carry no information", ", ".join(constant))
        metrics |= {
            "epochs": len(run.history),
            "best_epoch": run.selection.best_epoch,
            "samples": N,
            "rows": "heldout",
            "units": units(training) if normalizer is not None else "those of x",
        }
        vocabulary = None
        if initial is not None:
            with device_guard(device):
                vocabulary = ranks.on_main(lambda: compare_vocabulary(initial, model, rows, split, training.freeze))
            metrics["init_from"] = log_summary(vocabulary)
        self._raise_if_stopped(final_state)
        total = run.seconds_before + time.perf_counter() - started
        metrics["seconds"] = {"discover": discover_seconds, "train": total - discover_seconds, "total": total}
        best = run.selection.best_epoch
        return TrainResult(
            model, metrics, run.history, best, split, final_state, normalizer, self.config, names, vocabulary
        )

    def _train(
        self,
        model_config: CategoricalVQVAEConfig,
        rows: Callable[[NDArray[np.int64]], RowView],
        split: Split,
        device: torch.device,
        started: float,
        resume: Mapping[str, Any] | None,
        initial: InitialModel | None,
    ) -> tuple[TrainingRun, dict[str, Any]]:
        """The finished run and its final state, which includes the random state that a longer run continues from."""
        with forked_rng(device):
            seed_torch(self.config.random_seed, device)
            model = CategoricalHierarchicalVQVAE(model_config).to(device)
            ranks = self._ranks()
            model.quantizer.sync = False  # the step itself sums over ranks
            config = self.config if initial is None else initial.start(model, self.config)
            largest = max(model.quantizer.num_codes)
            if split.train.size < largest and initial is None:
                raise DataError(
                    f"{split.train.size} training rows are fewer than the {largest} codes of the largest codebook; "
                    "model.levels sets smaller ones, such as [{num_tokens: 16, latent_dim: 4}]"
                )
            run = TrainingRun(
                config,
                self.observer,
                self._requested_signal,
                model,
                self._place_rows(rows(split.train), device),
                self._place_rows(rows(split.val[ranks.share(split.val.size)]), device),
                train_rows=split.train,
                val_rows=split.val[ranks.share(split.val.size)],
                started=started,
                ranks=ranks,
            )
            run.training_step.log_automatic_settings()
            if model_config.extra_inputs and initial is None:
                model.fit_extra_inputs(*(torch.from_numpy(values) for values in mean_and_std(rows(split.train))))
            if resume is not None:
                with payload_errors(resume, "the saved state"):
                    run.load(resume)
            elif initial is not None:  # its own weights are the first candidate for the best ones
                validation = run.validation
                start = evaluate(model, validation.x, config.training, validation.numbers, "validation", ranks)
                run.selection.update(start["val_loss"], 0, model)
            elif ranks.is_main:
                initialize_codebooks(model, run.x_train)
            broadcast_model(model, ranks)
            broadcast_random_state(ranks, device)
            try:
                run.train()
            except torch.OutOfMemoryError:
                raise TrainingError(
                    f"{device} has no memory left for a step of {run.training_step.batch_size} rows; "
                    "a smaller training.batch_size or training.topo_samples may help"
                ) from None
            return run, run.state()

    def _evaluate(
        self,
        model: CategoricalHierarchicalVQVAE,
        run: TrainingRun,
        rows: Callable[[NDArray[np.int64]], RowView],
        split: Split,
        final_state: dict[str, Any],
    ) -> Metrics:
        """Metrics of the validation rows, whose code usage the quantizer gets, and of the test rows if any."""
        training = self.config.training
        self._raise_if_stopped(final_state)
        ranks = self._ranks()
        validation = run.validation
        metrics, code_counts = evaluate_with_counts(
            model, validation.x, training, validation.numbers, "validation", ranks
        )
        metrics["joint"] = joint_searches(model, validation.x, ranks)
        model.quantizer.usage.copy_(code_counts)
        model.quantizer.rows_seen.fill_(metrics["val_rows"])
        if split.test.size:
            self._raise_if_stopped(final_state)
            test_rows = split.test[ranks.share(split.test.size)]
            x_test = self._place_rows(rows(test_rows), run.device)
            metrics["test"] = evaluate(model, x_test, training, test_rows, "test", ranks)
        return metrics

    def _raise_if_stopped(self, final_state: dict[str, Any]) -> None:
        """Saves the final state and raises Interrupted if `fit` was asked to stop after the last epoch."""
        stopped_by = agreed_signal(self._requested_signal(), self._ranks())
        if stopped_by is not None:
            self.observer.save(final_state)
            raise Interrupted("stopped after the last epoch, before the metrics", stopped_by)

    def _normalizer(
        self, x: NDArray[Any], split: Split, groups: Groups | None, initial: InitialModel | None
    ) -> MatrixNormalizer | None:
        """The transform of x to normalised features; None if x is standardised."""
        if initial is not None:
            return initial.matrix_normalizer()
        training = self.config.training
        columns = None if groups is None else [int(i) for members in groups.values() for i in members]
        if columns is not None and not all(0 <= i < x.shape[1] for i in columns):
            return None  # CategoricalVQVAEConfig raises the error
        normalizer = fit_matrix_normalizer(
            x, split.train, self.config.feature_cleaning, training.normalization_method, columns or None
        )
        if normalizer is not None:
            log.warning(
                "x is not standardised: its columns are clipped and normalised by the training rows, and errors are in "
                "%s; result.encode(x) takes rows as they are (normalize=False: train on x as it is)",
                units(training),
            )
        return normalizer

    def _place_rows(self, rows: RowView, device: torch.device) -> Rows:
        placed = place_rows(rows, device, self.config.training.data_on_device)
        if isinstance(placed, HostRows):
            text = "gathered" if device.type == "cpu" else f"copied to {device}"
            log.info("%s rows stay in main memory and are %s step by step", f"{len(placed):,}", text)
        return placed

    def _model_config(
        self, x: Blocks, groups: Groups, levels: Levels | Mapping[str, Any] | None
    ) -> CategoricalVQVAEConfig:
        settings = self.config.model.model_dump()
        if levels is not None:
            settings["levels"] = levels
        group_indices = {name: list(map(int, members)) for name, members in groups.items()}
        try:
            config = CategoricalVQVAEConfig(**{**settings, "input_dim": x.shape[1], "group_indices": group_indices})
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"model: {problem.removeprefix('Value error, ')}") from None
        if config.unassigned_features == "nearest":
            return config.model_copy(update={"extra_inputs": nearest_categories(x, config.group_indices)})
        return config

    def _checked_correlation(self, train_rows: Blocks, config: CategoricalVQVAEConfig) -> float:
        """The largest correlation of two categories; warns of high correlation and of features without a category."""
        target, F = self.config.training.orthogonality_target, config.input_dim
        encoded = sum(len(members) for members in config.inputs.values())
        if encoded < F:
            log.warning("%d of %d features are in no category: they are reconstructed, but not encoded", F - encoded, F)
        correlation_max = max_off_diagonal(category_correlation(train_rows, config.group_indices))
        if correlation_max > target:
            log.warning(
                "category correlation reaches %.3f, above orthogonality_target %.3f: some categories overlap "
                "(more of them: training.num_categories_auto)",
                correlation_max,
                target,
            )
        return correlation_max


def _check_memory(config: CategoricalVQVAEConfig, device: torch.device) -> None:
    """Raises ConfigError if weights, gradients and the two moments of Adam do not fit the free memory."""
    count = config.parameter_count()
    needed, free = 4 * 4 * count, min(free_memory(device), free_memory(torch.device("cpu")))
    if needed > free:
        raise ConfigError(
            f"model: {count:,} parameters need {needed / 1e9:,.1f} GB to train, and {free / 1e9:,.1f} GB are free; "
            "reduce model.group_hidden_dim, model.group_embedding_dim or model.levels"
        )

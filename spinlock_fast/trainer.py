"""The training loop."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import ValidationError
from torch import Tensor

from spinlock_fast.config import Levels, RunConfig, TrainingConfig
from spinlock_fast.config_file import apply_overrides, load_config
from spinlock_fast.errors import ConfigError, DataError, Interrupted, TrainingError
from spinlock_fast.features.categories import (
    Groups,
    assign_categories,
    category_correlation,
    discover_categories,
    max_off_diagonal,
)
from spinlock_fast.features.statistics import Matrix
from spinlock_fast.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.metrics import Metrics, complete, evaluate
from spinlock_fast.model import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig

log = logging.getLogger(__name__)

# Rows that the first codebooks are fitted to.
_INIT_ROWS = 4096


@dataclass
class EpochRecord:
    """One line of the training history."""

    epoch: int
    train_loss: float
    terms: dict[str, float]
    utilization: float
    learning_rate: float
    seconds: float
    resets: int | None = None
    validation: dict[str, float] | None = None


class Observer(Protocol):
    """What a `Trainer` tells while it runs."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None: ...

    def epoch_finished(self, record: EpochRecord) -> None: ...

    def save(self, state: dict[str, Any]) -> None: ...


class SilentObserver:
    """Hears everything, says and keeps nothing."""

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        pass

    def epoch_finished(self, record: EpochRecord) -> None:
        pass

    def save(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Split:
    """Row numbers, ascending."""

    train: np.ndarray[Any, np.dtype[np.int64]]
    val: np.ndarray[Any, np.dtype[np.int64]]
    test: np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class TrainResult:
    """What `Trainer.fit` returns; `model` is the one of the best validation, in eval mode."""

    model: CategoricalHierarchicalVQVAE
    metrics: Metrics
    history: list[EpochRecord]
    best_epoch: int
    split: Split
    final_state: dict[str, Any] = field(repr=False)


def split_rows(rows: int, config: TrainingConfig, seed: int, val_rows: ArrayLike | None = None) -> Split:
    """Training, validation and test rows, fixed by the seed.

    Args:
        rows: N.
        config: val_fraction and test_fraction.
        seed: of the permutation.
        val_rows: validation rows, instead of drawing them.

    Raises:
        DataError: nothing would be left to train on, or `val_rows` is not a set of rows.
    """
    if rows < 2:
        raise DataError(f"the data have {rows} row{'' if rows == 1 else 's'}: training and validation need at least 2")
    order = np.random.default_rng([seed, 0]).permutation(rows)
    if val_rows is None:
        val = order[: max(1, round(rows * config.val_fraction))]
        order = order[len(val) :]
    else:
        val = np.unique(np.asarray(val_rows, dtype=np.int64))
        if val.size != np.size(val_rows) or val.size == 0 or val[0] < 0 or val[-1] >= rows:
            raise DataError(f"val_rows must be distinct rows in 0..{rows - 1}")
        order = order[~np.isin(order, val)]
    test_size = max(1, round(rows * config.test_fraction)) if config.test_fraction > 0 else 0
    if order.size <= test_size:
        raise DataError(f"{rows} rows leave none to train on after {val.size} for validation and {test_size} for test")
    return Split(np.sort(order[test_size:]), np.sort(val), np.sort(order[:test_size]))


class Trainer:
    """Trains a tokenizer on a matrix of features.

    Args:
        config: settings; `device`, `random_seed`, `model` and `training` matter here.
        observer: hears of every epoch and keeps resumable states.
    """

    def __init__(self, config: RunConfig, observer: Observer | None = None) -> None:
        self.config = config
        self.observer = observer or SilentObserver()
        self._stop_signal: int | None = None

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
        """Ends `fit` after the current step: it saves a resumable state and raises Interrupted."""
        self._stop_signal = signal_number

    def fit(
        self,
        x: ArrayLike | Tensor,
        group_indices: Groups | None = None,
        levels: Levels | Mapping[str, Any] | None = None,
        feature_names: Sequence[str] | None = None,
        val_rows: ArrayLike | None = None,
        *,
        resume: Mapping[str, Any] | None = None,
    ) -> TrainResult:
        """Trains on cleaned, normalised features.

        Args:
            x: [N, F] numbers without NaN or Inf.
            group_indices: features of each category; discovered on the training rows when not given.
            levels: codebook sizes, see `CategoricalVQVAEConfig`; the configuration's when not given.
            feature_names: F names; "family::name" lets categories report their families.
            val_rows: rows to validate on; drawn by the seed when not given.
            resume: a state that an observer was given to save.

        Returns:
            The best model, its metrics (those of metrics.json that a matrix determines), the history.

        Raises:
            DataError: x is not a finite matrix, or has too few rows.
            TrainingError: a loss became NaN or infinite; names the first step and term.
            Interrupted: `stop` was called.
        """
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
        train_x = data[split.train].numpy()
        if groups is None:
            groups = find_categories(train_x, names, self.config)
            discover_seconds = time.perf_counter() - started
        model_config = self._model_config(F, groups, levels)
        outside = F - sum(model_config.group_sizes.values())
        if outside:
            log.warning("%d of %d features are in no category: they are reconstructed, but not encoded", outside, F)
        correlation_max = max_off_diagonal(category_correlation(train_x, groups))
        if correlation_max > training.orthogonality_target:
            log.warning(
                "category correlation reaches %.3f, above orthogonality_target %.3f: some categories overlap "
                "(more of them: training.num_categories_auto)",
                correlation_max,
                training.orthogonality_target,
            )
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model = CategoricalHierarchicalVQVAE(model_config).to(device)
            largest = max(model.quantizer.num_codes)
            if split.train.size < largest:
                raise DataError(
                    f"{split.train.size} training rows are fewer than the {largest} codes of the largest codebook"
                )
            run = _Run(self, model, data.to(device), split, device)
            if resume is not None:
                run.load(resume)
            else:
                run.initialize_codes()
            try:
                run.train()
            finally:
                self._stop_signal = None
        best_model = run.best_model()
        metrics = evaluate(best_model, run.x_val, training)
        if split.test.size:
            metrics["test"] = evaluate(best_model, data[split.test].to(device), training)
        complete(metrics, best_model, names, correlation_max)
        idle = [c["name"] for c in metrics["categories"] if max(c["perplexity"]) < 1.0 + 1e-6]
        if idle:
            log.warning("%s: one code serves every sample, so these tokens say nothing", ", ".join(idle))
        metrics |= {
            "epochs": len(run.history),
            "best_epoch": run.best_epoch,
            "samples": N,
        }
        total = time.perf_counter() - started
        metrics["seconds"] = {"discover": discover_seconds, "train": total - discover_seconds, "total": total}
        return TrainResult(best_model, metrics, run.history, run.best_epoch, split, run.state())

    def _model_config(
        self, F: int, groups: Groups, levels: Levels | Mapping[str, Any] | None
    ) -> CategoricalVQVAEConfig:
        settings = self.config.model.model_dump()
        if levels is not None:
            settings["levels"] = levels
        try:
            return CategoricalVQVAEConfig(
                **{
                    **settings,
                    "input_dim": F,
                    "group_indices": {k: list(map(int, v)) for k, v in groups.items()},
                }
            )
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ConfigError(f"model: {problem.removeprefix('Value error, ')}") from None


def find_categories(x: Matrix, feature_names: Sequence[str], config: RunConfig) -> Groups:
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


def resolve_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:N"; raises ConfigError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device: {name} is not available; {torch.cuda.device_count()} CUDA devices were found")
    return device


def _as_matrix(x: ArrayLike | Tensor) -> Tensor:
    data = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if data.ndim != 2 or data.shape[1] == 0:
        raise DataError(f"x must be a matrix [N, F] with at least one column, got {list(data.shape)}")
    data = data.to(torch.float32)
    finite = torch.isfinite(data)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise DataError(f"x[{row}, {column}] is {float(data[row, column])}; features must be finite")
    return data


class _Run:
    """The state of one call of `fit`: everything that a resumable checkpoint holds."""

    def __init__(
        self,
        trainer: Trainer,
        model: CategoricalHierarchicalVQVAE,
        x: Tensor,
        split: Split,
        device: torch.device,
    ) -> None:
        self.trainer = trainer
        self.training = trainer.config.training
        self.seed = trainer.config.random_seed
        self.model = model
        self.device = device
        self.x_train = x[torch.from_numpy(split.train).to(device)]
        self.x_val = x[torch.from_numpy(split.val).to(device)]
        self.weights = LossWeights.of(self.training)
        self.weighted = torch.tensor([weight != 0.0 for weight in self.weights], device=device)
        rows = self.x_train.shape[0]
        self.batch = min(self.training.batch_size, rows)
        if self.batch < self.training.batch_size:
            log.info("batch size is %d, all training rows (training.batch_size is %d)", rows, self.batch)
        self.steps_per_epoch = math.ceil(rows / self.batch)
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        self.optimizer = kinds[self.training.optimizer](
            model.parameters(),
            lr=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
            fused=True,
        )
        self.loss: Callable[[Tensor], tuple[Tensor, LossTerms, Tensor]] = self._loss
        if self.training.use_torch_compile:
            if device.type == "cuda":
                self.loss = torch.compile(self._loss)
            else:
                log.info("training.use_torch_compile has an effect on CUDA devices only")
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.sums = torch.zeros(1 + len(LossTerms._fields), device=device)
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=device)  # step, term
        self.history: list[EpochRecord] = []
        self.best_epoch = 0
        self.best_loss = math.inf
        self.best_state: dict[str, Tensor] = {}
        self.counted_loss = math.inf  # of the last validation that early stopping counted as better
        self.stale = 0

    def initialize_codes(self) -> None:
        if self.trainer.config.model.codebook_init != "kmeans":
            return
        order = torch.randperm(self.x_train.shape[0])[:_INIT_ROWS].to(self.device)
        self.model.eval()
        with torch.no_grad():
            latents = self.model.encode(self.x_train[order])
        if bool(torch.isfinite(latents).all(1).any()):
            self.model.quantizer.initialize(latents)
        self.model.train()

    def train(self) -> None:
        training = self.training
        observer = self.trainer.observer
        if self.epoch > training.num_epochs:
            raise ConfigError(f"training.num_epochs: {training.num_epochs}, but the run has done {self.epoch} epochs")
        if self.epoch and self.epoch == training.num_epochs:
            log.warning("the run is complete: %d of %d epochs are done", self.epoch, training.num_epochs)
        elif self._stopped_early():
            log.warning(
                "the run had stopped early, after epoch %d; a larger early_stopping_patience goes on", self.epoch
            )
        observer.training_started(training.num_epochs, self.epoch, self.x_train.shape[0])
        while self.epoch < training.num_epochs and not self._stopped_early():
            started = time.perf_counter()
            self._run_epoch()
            self._raise_if_not_finite()
            record = self._record(time.perf_counter() - started)
            self.history.append(record)
            self.epoch, self.step = self.epoch + 1, 0
            self.sums.zero_()
            self.model.quantizer.reset_usage()
            last = self.epoch == training.num_epochs
            if last or self.epoch % training.val_every_n_epochs == 0:
                record.validation = self._validate()
            interval = training.dead_code_reset_interval
            if not last and interval and self.epoch % interval == 0:
                record.resets = int(self._reset_dead_codes(self._recent_latents()).sum())
            observer.epoch_finished(record)
            if not last and self.epoch % training.save_every == 0:
                observer.save(self.state())

    def _stopped_early(self) -> bool:
        return self.stale >= self.training.early_stopping_patience

    def _run_epoch(self) -> None:
        self.model.train()
        generator = np.random.default_rng([self.seed, 2, self.epoch])
        order = torch.from_numpy(generator.permutation(self.x_train.shape[0])).to(self.device)
        for step, rows in enumerate(order.split(self.batch)):
            if step < self.step:
                continue  # done before the interruption that this run resumes from
            self._step(self.x_train[rows], rows.shape[0])
            self.step = step + 1
            if self.trainer._stop_signal is not None:
                signal_number = self.trainer._stop_signal
                self._raise_if_not_finite()
                self.trainer.observer.save(self.state())
                raise Interrupted(f"stopped in epoch {self.epoch + 1} of {self.training.num_epochs}", signal_number)

    def _loss(self, x: Tensor) -> tuple[Tensor, LossTerms, Tensor]:
        out = self.model(x)
        terms = loss_terms(self.model, x, out, self.training.topo_samples)
        return terms.total(self.weights), terms, out["latents"]

    def _step(self, x: Tensor, rows: int) -> None:
        step = self.epoch * self.steps_per_epoch + self.step
        rate = self._learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, terms, latents = self.loss(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            values = torch.stack([loss.detach(), *(term.detach() for term in terms)])
            bad = ~torch.isfinite(values[1:]) & self.weighted
            here = torch.stack([torch.full_like(self.first_bad[0], step), bad.to(torch.int64).argmax()])
            self.first_bad = torch.where((self.first_bad[0] < 0) & bad.any(), here, self.first_bad)
            self.sums += values * rows
        interval = self.training.dead_code_reset_steps
        if interval and (step + 1) % interval == 0:
            self._reset_dead_codes(latents.detach())

    def _learning_rate(self, step: int) -> float:
        training = self.training
        total = training.num_epochs * self.steps_per_epoch
        warmup = training.warmup_epochs * self.steps_per_epoch
        rate = training.learning_rate
        if step < warmup:
            return rate * (step + 1) / warmup
        if training.scheduler == "cosine":
            return rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
        return rate

    def _raise_if_not_finite(self) -> None:
        step, term = self.first_bad.tolist()
        if step >= 0:
            raise TrainingError(
                f"the {LossTerms._fields[term]} loss is not finite from step {step} on (epoch "
                f"{step // self.steps_per_epoch + 1}); "
                + ("the features are too large" if step == 0 else "a smaller training.learning_rate may help")
            )

    def _record(self, seconds: float) -> EpochRecord:
        means = (self.sums / self.x_train.shape[0]).tolist()
        return EpochRecord(
            epoch=self.epoch + 1,
            train_loss=means[0],
            terms=dict(zip(LossTerms._fields, means[1:], strict=True)),
            utilization=float(self.model.quantizer.utilization().mean()),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=seconds,
        )

    def _validate(self) -> dict[str, float]:
        found = evaluate(self.model, self.x_val, self.training)
        kept = {key: value for key, value in found.items() if isinstance(value, float)}
        if not math.isfinite(kept["val_loss"]):
            raise TrainingError(
                f"the validation loss is not finite after epoch {self.epoch}: "
                "a validation row holds values far outside those of training"
            )
        if kept["val_loss"] < self.counted_loss - self.training.early_stopping_min_delta:
            self.counted_loss = kept["val_loss"]
            self.stale = 0
        else:
            self.stale += 1
        if kept["val_loss"] < self.best_loss:
            self.best_loss = kept["val_loss"]
            self.best_epoch = self.epoch
            self.best_state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        return kept

    @torch.no_grad()
    def _recent_latents(self) -> Tensor | None:
        if self.training.dead_code_strategy != "sample":
            return None
        rows = torch.randperm(self.x_train.shape[0])[: max(self.batch, 1024)].to(self.device)
        self.model.eval()
        return self.model.encode(self.x_train[rows])

    def _reset_dead_codes(self, latents: Tensor | None) -> Tensor:
        training = self.training
        return self.model.reset_dead_codes(
            training.dead_code_threshold, training.dead_code_strategy, training.max_reset_fraction, latents
        )

    def best_model(self) -> CategoricalHierarchicalVQVAE:
        best = copy.deepcopy(self.model)
        best.load_state_dict(self.best_state)
        return best.eval()

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs to go on as if nothing had happened; tensors and plain values only."""
        return {
            "model_state_dict": self.model.state_dict(),
            "usage": self.model.quantizer.usage,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums,
            "history": [vars(record) for record in self.history],
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "counted_loss": self.counted_loss,
            "best_state_dict": self.best_state,
            "stale": self.stale,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model_state_dict"])
        self.model.quantizer.usage.copy_(state["usage"])
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.sums.copy_(state["sums"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self.best_state = {k: v.to(self.device) for k, v in state["best_state_dict"].items()}
        self.counted_loss, self.stale = state["counted_loss"], state["stale"]
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)

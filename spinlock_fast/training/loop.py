"""The training loop: epochs of steps with validation, dead-code resets, rewinds and exact resumption."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.random_streams import version
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError, Interrupted
from spinlock_fast.models.losses import LossTerms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.cuda_graphs import StepLauncher, dedicated_stream
from spinlock_fast.training.distributed import agreed_signal, all_ranks_agree, check_replicas
from spinlock_fast.training.divergence import (
    MAX_REWINDS,
    DivergenceError,
    Rewinds,
    all_finite,
    clone_tensors,
    raise_nonfinite_loss,
)
from spinlock_fast.training.epoch_rules import resets_dead_codes, settings_by_length
from spinlock_fast.training.model_selection import ModelSelection, check_selection_state
from spinlock_fast.training.observer import EpochRecord, Observer
from spinlock_fast.training.row_order import training_order
from spinlock_fast.training.step import EpochSummary, StepKind, TrainingStep, learning_rates
from spinlock_fast.training.validation import ValidationRows

log = logging.getLogger(__name__)

_RESET_ROWS = 1024  # fewest rows whose latents replace dead codes


class _PendingEpoch(NamedTuple):
    """An epoch whose steps were launched and whose summary was not read yet."""

    epoch: int
    started: float
    read_summary: Callable[[], EpochSummary]


class TrainingRun:
    """One call of `Trainer.fit`: the loop, and everything that a resumable checkpoint holds.

    Args:
        config: settings of the run.
        observer: receives epoch records and resumable states.
        stop_signal: called after every launch; returns the number of a signal that ends the run, else None.
        model: trained in place.
        x_train, x_val: [N, F] training and validation rows, for the model's device.
        train_rows, val_rows: [N] numbers of these rows in the data, for messages.
        started: `time.perf_counter` at which the run's time starts; now if not given.
        ranks: processes that share each batch; all of them run the same loop. x_train is the same on each; x_val are
            the validation rows of this rank, in the order of the ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        observer: Observer,
        stop_signal: Callable[[], int | None],
        model: CategoricalHierarchicalVQVAE,
        x_train: Rows,
        x_val: Rows,
        *,
        train_rows: NDArray[np.int64] | None = None,
        val_rows: NDArray[np.int64] | None = None,
        started: float | None = None,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.training = config.training
        self.seed = config.random_seed
        self.observer = observer
        self.stop_signal = stop_signal
        self.model = model
        self.device = device = x_train.device
        self.x_train = x_train
        self.train_rows = train_rows
        self.training_step = TrainingStep(model, x_train, self.training, ranks)
        self.launcher = StepLauncher(
            self.training_step, device, self.training.cuda_graphs, agree=partial(all_ranks_agree, ranks)
        )
        self.validation = ValidationRows(model, x_val, val_rows, self.training, self.launcher, ranks)
        rows = x_train.shape[0]
        if rows < self.training.batch_size:
            log.info("batch size is %d, all training rows (training.batch_size is %d)", rows, self.training.batch_size)
        if self.training.use_torch_compile:
            log.info("training.use_torch_compile has no effect: on CUDA devices steps are captured as CUDA graphs")
        self.epoch = 0  # completed epochs
        self.step = 0  # completed steps of the current epoch
        self.history: list[EpochRecord] = []
        self.selection = ModelSelection(self.training)
        self.rewinds = Rewinds(self.training.on_divergence)
        self._row_order: tuple[int, Tensor] | None = None  # epoch, permutation of the training rows
        # On CUDA the summary of an epoch is read after the steps of the next epoch were launched.
        self._overlap_readback = device.type == "cuda"
        self._pending: _PendingEpoch | None = None
        # What a run with fewer epochs does differently at its end; see `_extend_finished_run`.
        self._reset_skipped = False
        self._selection_before_last: dict[str, Any] | None = None
        self._previous_num_epochs: int | None = None
        self.seconds_before = 0.0  # of the interrupted runs before this one
        self._started = time.perf_counter() if started is None else started
        self._last_save = self._epoch_started = time.perf_counter()
        self._last_readback = 0.0
        self._interrupted_epoch_seconds = 0.0  # spent by an interrupted run on the current epoch

    def train(self) -> None:
        """Runs the remaining epochs.

        Raises:
            DivergenceError, TrainingError: a loss is not finite.
            Interrupted: `stop_signal` returned a signal; a resumable state was saved.
            ConfigError: the resumed run has more epochs than `training.num_epochs`.
        """
        training = self.training
        if self.epoch > training.num_epochs:
            raise ConfigError(f"training.num_epochs: {training.num_epochs}, but the run has done {self.epoch} epochs")
        if self.epoch and self.epoch == training.num_epochs:
            log.warning("the run is complete: %d of %d epochs are done", self.epoch, training.num_epochs)
        elif self.epoch:
            self._extend_finished_run()
        if self.epoch < training.num_epochs and self.selection.should_stop:
            log.warning(
                "the run stopped early after epoch %d; a larger training.early_stopping_patience continues it",
                self.epoch,
            )
        self.observer.training_started(training.num_epochs, self.epoch, self.x_train.shape[0])
        with dedicated_stream(self.device):
            self._snapshot_good_state()
            while self.epoch < training.num_epochs and not self.selection.should_stop:
                try:
                    self._train_epoch()
                except DivergenceError as error:
                    self._rewind(error)
        stopped_by = agreed_signal(self.stop_signal(), self.ranks)
        if stopped_by is not None:
            self.observer.save(self.state())
            raise Interrupted(f"stopped after epoch {self.epoch}, before the metrics", stopped_by)

    def _extend_finished_run(self) -> None:
        """Makes the state of a run that ended here that of a longer run at this epoch.

        The last epoch of a run always validates and never resets dead codes.
        """
        training = self.training
        if self._previous_num_epochs not in (None, training.num_epochs) and (by_length := settings_by_length(training)):
            log.warning(
                "%s, and the first %d epochs followed num_epochs %d: "
                "the weights will differ from those of a run that had %d from the start",
                by_length,
                self.epoch,
                self._previous_num_epochs,
                training.num_epochs,
            )
        if self._selection_before_last is not None:
            self.selection.load(self._selection_before_last, self.device)
            self._selection_before_last = None
            self.history[-1].validation = None
        if self._reset_skipped and resets_dead_codes(training, self.epoch):
            self.history[-1].resets = self._reset_dead_codes()
        self._reset_skipped = False

    def _snapshot_good_state(self) -> None:
        """Copies the state for `_rewind`, if the weights are finite."""
        if all_finite(self.model.state_dict()):
            self.rewinds.good_state = clone_tensors(self.state())

    def _rewind(self, error: DivergenceError) -> None:
        """Goes back to the last good state with half the learning rate, or raises; see `Rewinds.next`."""
        self._pending = None
        rewinds, seconds_before = self.rewinds.next(error, self.observer.save), self.seconds_before
        assert rewinds.good_state is not None
        self.load(rewinds.good_state)
        self.rewinds = rewinds
        self.seconds_before, self._interrupted_epoch_seconds = seconds_before, 0.0
        log.warning(
            "%s: back to the state after epoch %d, with a learning rate of %g (%d of at most %d times)",
            error,
            self.epoch,
            self.training.learning_rate * rewinds.rate_scale,
            rewinds.count,
            MAX_REWINDS,
        )

    def _train_epoch(self) -> None:
        training = self.training
        started = self._epoch_started = time.perf_counter() - self._interrupted_epoch_seconds
        self._interrupted_epoch_seconds = 0.0
        self._run_steps()
        self._report_pending_epoch()  # the device finished it before the steps launched above
        self._pending = _PendingEpoch(self.epoch, started, self.training_step.start_summary())
        self.epoch, self.step = self.epoch + 1, 0
        self.model.quantizer.reset_usage()
        last = self.epoch == training.num_epochs
        validates = self.epoch % training.val_every_n_epochs == 0
        interval = training.dead_code_reset_interval
        resets = interval > 0 and self.epoch % interval == 0 and resets_dead_codes(training, self.epoch)
        saves = not last and self.epoch % training.save_every == 0
        if self._overlap_readback and not (last or validates or resets or saves):
            return
        record = self._finish_pending_epoch()
        assert record is not None
        if last and not validates:
            self._selection_before_last = self.selection.snapshot()
        if last or validates:
            record.validation = self._validate()
        self._reset_skipped = last and interval > 0 and self.epoch % interval == 0  # no step would train the new codes
        if resets and not last:
            record.resets = self._reset_dead_codes()
        self.observer.epoch_finished(record)
        if validates and not (last or saves):
            self._snapshot_good_state()
        if saves:
            self._save()

    def _save(self) -> None:
        check_replicas(self.model, self.ranks, self.epoch * self.training_step.steps_per_epoch + self.step)
        self._snapshot_good_state()
        self.observer.save(self.state())
        self._last_save = time.perf_counter()

    def _save_is_due(self) -> bool:
        return time.perf_counter() - self._last_save >= 60.0 * self.training.save_minutes

    def _report_pending_epoch(self) -> None:
        record = self._finish_pending_epoch()
        if record is not None:
            self.observer.epoch_finished(record)

    def _finish_pending_epoch(self) -> EpochRecord | None:
        """Appends the pending epoch to the history; synchronises with the device. None if no epoch is pending."""
        if self._pending is None:
            return None
        epoch, started, read_summary = self._pending
        self._pending = None
        summary = self._check_finite(read_summary(), epoch)
        started, self._last_readback = max(started, self._last_readback), time.perf_counter()
        record = self._epoch_record(summary, epoch, self._last_readback - started)
        self.history.append(record)
        return record

    def _run_steps(self) -> None:
        """Launches the remaining steps of the epoch, without host synchronisation."""
        self.model.train()
        step = self.training_step
        rates = self.rewinds.rate_scale * learning_rates(self.training, step.steps_per_epoch, self.epoch)
        step.begin_epoch(self.row_order(self.epoch), rates, self.step)
        self.launcher.check_layout(step.memory_layout())  # an observer may have moved tensors
        while self.step < step.steps_per_epoch:
            kind, max_steps = self._next_launch()
            self.step += self.launcher.run(kind, max_steps)
            stopped_by, save_is_due = self._requests()
            if stopped_by is not None or save_is_due:
                self._report_pending_epoch()
                self._check_finite(step.summary(), self.epoch)
                self._save()
            if stopped_by is not None:
                raise Interrupted(f"stopped in epoch {self.epoch + 1} of {self.training.num_epochs}", stopped_by)
        if self.epoch + 1 < self.training.num_epochs:
            self.row_order(self.epoch + 1)  # overlaps with the device's work on this epoch

    def _requests(self) -> tuple[int | None, bool]:
        """The signal that ends the run, and whether to save the state; the same on all ranks."""
        stopped_by, save_is_due = self.stop_signal(), self._save_is_due()
        exchange = self.training_step.exchange
        if exchange is None:
            return stopped_by, save_is_due
        exchange.request(stopped_by, save_is_due)
        return exchange.requested()

    def row_order(self, epoch: int) -> Tensor:
        """Permutation [N] of the training rows, by seed and epoch alone: equal on every device and after a resume."""
        if self._row_order is None or self._row_order[0] != epoch:
            rows, columns = self.x_train.shape
            self._row_order = epoch, training_order(rows, columns, self.seed, epoch, self.training.row_order)
        return self._row_order[1]

    def _next_launch(self) -> tuple[StepKind, int]:
        """The kind of the next step, and how many consecutive steps of that kind can be launched."""
        step, interval = self.training_step, self.training.dead_code_reset_steps
        interval *= resets_dead_codes(self.training, self.epoch + 1)
        same_kind = step.full_batches - self.step if self.step < step.full_batches else 1
        same_kind = min(same_kind, step.feed.steps_available(self.step))
        if not interval:
            return step.kind(self.step, reset=False), same_kind
        until_reset = interval - 1 - (self.epoch * step.steps_per_epoch + self.step) % interval
        return step.kind(self.step, reset=until_reset == 0), min(same_kind, max(until_reset, 1))

    def _check_finite(self, summary: EpochSummary, epoch: int) -> EpochSummary:
        if summary.first_nonfinite is not None:
            step, term = summary.first_nonfinite
            step += epoch * self.training_step.steps_per_epoch
            groups = self.model.config.group_indices
            raise_nonfinite_loss(step, epoch, term, self.x_train, self.train_rows, groups)
        return summary

    def _epoch_record(self, summary: EpochSummary, epoch: int, seconds: float) -> EpochRecord:
        rates = learning_rates(self.training, self.training_step.steps_per_epoch, epoch)
        diverged_at, self.rewinds.diverged_steps = self.rewinds.diverged_steps or None, []
        return EpochRecord(
            epoch=epoch + 1,
            train_loss=summary.loss,
            terms=dict(zip(LossTerms._fields, summary.terms, strict=True)),
            utilization=summary.utilization,
            learning_rate=self.rewinds.rate_scale * float(rates[-1]),
            seconds=seconds,
            diverged_at=diverged_at,
        )

    def _validate(self) -> dict[str, float]:
        """Metrics of the validation rows, which model selection takes into account."""
        metrics = self.validation.measure(self.epoch, self.epoch * self.training_step.steps_per_epoch)
        self.selection.update(metrics["val_loss"], self.epoch, self.model)
        return metrics

    def _reset_dead_codes(self) -> int:
        latents = None
        if self.training.dead_code_strategy == "sample":
            count = max(self.training_step.batch_size, _RESET_ROWS)
            rows = torch.randperm(self.x_train.shape[0])[:count].to(self.device)
            self.model.eval()
            with torch.no_grad():
                latents = self.model.encode(self.x_train[rows])
        return int(self.training_step.reset_dead_codes(latents).sum())

    def best_model(self) -> CategoricalHierarchicalVQVAE:
        """A copy of the model with the weights of the best validation, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.selection.best_state)
        return model.eval()

    def state(self) -> dict[str, Any]:
        """A resumable state: tensors, which the next step changes in place, and plain values."""
        return {
            "model_state_dict": self.model.state_dict(),
            "usage": self.model.quantizer.usage,
            **self.training_step.state(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "history": [vars(record) for record in self.history],
            **self.selection.state(),
            "num_epochs": self.training.num_epochs,
            "streams": version(),
            "reset_left_out": self._reset_skipped,
            "before_last": self._selection_before_last,
            "rewinds": self.rewinds.count,
            "rewound_at": self.rewinds.diverged_steps,
            "seconds": self.seconds_before + time.perf_counter() - self._started,
            "epoch_seconds": time.perf_counter() - self._epoch_started if self.step else 0.0,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned; every tensor keeps its address.

        Raises:
            DataError: an entry does not fit the run. Malformed entries raise other errors, see `payload_errors`.
        """
        weights = self.model.state_dict()
        check_selection_state(state, weights)
        if state.get("before_last") is not None:
            check_selection_state(state["before_last"], weights)
        if state["epoch"] >= self.training.num_epochs and not state["best_state_dict"]:
            raise DataError("best_state_dict is empty, but all epochs are done")
        self.model.load_state_dict(state["model_state_dict"])
        self.model.quantizer.usage.copy_(state["usage"])
        self.training_step.load(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.selection.load(state, self.device)
        self._previous_num_epochs = state.get("num_epochs")
        self._reset_skipped = state.get("reset_left_out", False)
        self._selection_before_last = state.get("before_last")
        if "diverged_at" not in state:  # a run that ended by divergence resumes with the configured learning rate
            self.rewinds.count = state.get("rewinds", 0)
            self.rewinds.diverged_steps = list(state.get("rewound_at", []))
        # States of earlier versions only have the seconds of their epochs.
        self.seconds_before = state.get("seconds", sum(record.seconds for record in self.history))
        self._interrupted_epoch_seconds = state.get("epoch_seconds", 0.0)
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)

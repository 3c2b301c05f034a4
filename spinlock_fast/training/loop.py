"""The training loop: epochs of steps, validations, resets, and a state that resumes exactly."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.random_streams import Stream, generator, version
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.data.payload_checks import shape_difference, tensor_shapes
from spinlock_fast.errors import ConfigError, DataError, Interrupted, TrainingError
from spinlock_fast.messages import shown
from spinlock_fast.models.losses import LossTerms
from spinlock_fast.models.metrics import Validation
from spinlock_fast.models.outliers import LARGEST, largest_value, spoiled, without_outliers
from spinlock_fast.models.pq_init import product_start
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.cuda_graphs import StepLauncher, own_stream
from spinlock_fast.training.divergence import MOST_REWINDS, DivergenceError, cloned, is_finite
from spinlock_fast.training.observer import EpochRecord, Observer
from spinlock_fast.training.step import EpochSummary, StepKind, TrainingStep, learning_rate, learning_rates

log = logging.getLogger(__name__)

# Rows that the first codebooks are fitted to.
_INIT_ROWS = 4096


class _Unread(NamedTuple):
    """An epoch whose steps were launched, and whose figures nobody has waited for."""

    epoch: int
    started: float
    read: Callable[[], EpochSummary]


class TrainingRun:
    """The state of one call of `fit`: everything that a resumable checkpoint holds."""

    def __init__(
        self,
        config: RunConfig,
        observer: Observer,
        stop_signal: Callable[[], int | None],
        model: CategoricalHierarchicalVQVAE,
        x_train: Rows,
        x_val: Rows,
    ) -> None:
        self.config = config
        self.training = config.training
        self.seed = config.random_seed
        self.observer = observer
        self.stop_signal = stop_signal
        self.model = model
        self.device = device = x_train.device
        self.x_train = x_train
        self.one_step = TrainingStep(model, x_train, self.training)
        self.launcher = StepLauncher(self.one_step, device, self.training.cuda_graphs)
        self._validate_on(x_val)
        rows = x_train.shape[0]
        if rows < self.training.batch_size:
            log.info("batch size is %d, all training rows (training.batch_size is %d)", rows, self.training.batch_size)
        if self.training.use_torch_compile and device.type != "cuda":
            log.info("training.use_torch_compile has an effect on CUDA devices only")
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self._order: tuple[int, Tensor] | None = None  # of an epoch, drawn ahead
        self._reads_late = device.type == "cuda"  # an epoch's figures, when the steps of the next one are launched
        self._unread: _Unread | None = None
        self._read_at = 0.0
        self.history: list[EpochRecord] = []
        self.best_epoch = 0
        self.best_loss = math.inf
        self.best_state: dict[str, Tensor] = {}
        self.counted_loss = math.inf  # of the last validation that early stopping counted as better
        self.stale = 0
        self.seconds_before = 0.0  # of the runs that this one goes on with
        self.began = time.perf_counter()
        self._saved_at = self.began
        self._epoch_began = self.began
        self._epoch_seconds = 0.0  # that an interrupted run has spent on the epoch under way
        self._reset_left_out = False  # dead codes stay after the last epoch, as there is nothing to train them
        self._before_last: dict[str, Any] | None = None  # the best so far, where only the last epoch's end validates
        self._epochs_before: int | None = None  # num_epochs of the run that this one goes on with
        self._good: dict[str, Any] | None = None  # a copy of the last state that was finite
        self.rewinds = 0  # times that the run went back to it; each halves the learning rate
        self._diverged_at: list[int] = []  # steps, since the last epoch of the history
        self.train_numbers: NDArray[np.int64] | None = None  # of the rows in the data, for messages
        self.val_numbers: NDArray[np.int64] | None = None

    def _validate_on(self, x_val: Rows) -> None:
        self.x_val = x_val
        self.validation = Validation(self.model, x_val, self.training)
        self._run_validation = self.validation.run
        if isinstance(x_val, Tensor):  # reading rows of main memory is the host's work, which no graph holds
            self._run_validation = self.launcher.beside(self.validation.run, "validations")

    def initialize_codes(self) -> None:
        start = self.config.model.codebook_init
        if start == "uniform":
            return
        order = torch.randperm(self.x_train.shape[0])[:_INIT_ROWS].to(self.device)
        if start == "product":
            product_start(self.model, self.x_train[order])
            return
        self.model.eval()
        with torch.no_grad():
            latents = self.model.encode(self.x_train[order])
        if bool(torch.isfinite(latents).all(1).any()):
            self.model.quantizer.initialize(latents)
        self.model.train()

    def train(self) -> None:
        training = self.training
        observer = self.observer
        if self.epoch > training.num_epochs:
            raise ConfigError(f"training.num_epochs: {training.num_epochs}, but the run has done {self.epoch} epochs")
        if self.epoch and self.epoch == training.num_epochs:
            log.warning("the run is complete: %d of %d epochs are done", self.epoch, training.num_epochs)
        elif self.epoch:
            self._go_on_after_the_end()
        if self.epoch < training.num_epochs and self._stopped_early():
            log.warning(
                "the run had stopped early, after epoch %d; a larger early_stopping_patience goes on", self.epoch
            )
        observer.training_started(training.num_epochs, self.epoch, self.x_train.shape[0])
        with own_stream(self.device):
            self._keep_good()
            while self.epoch < training.num_epochs and not self._stopped_early():
                try:
                    self._train_epoch()
                except DivergenceError as error:
                    self._go_back(error)
        stopped_by = self.stop_signal()
        if stopped_by is not None:
            self.observer.save(self.state())
            raise Interrupted(f"stopped after epoch {self.epoch}, before the metrics", stopped_by)

    def _go_on_after_the_end(self) -> None:
        """Turns the state of a run that had fewer epochs into the one that a longer run has there."""
        training = self.training
        if self._epochs_before not in (None, training.num_epochs) and training.scheduler == "cosine":
            log.warning(
                "training.scheduler is cosine, and the first %d epochs followed num_epochs %d: "
                "the weights will differ from those of a run that had %d from the start",
                self.epoch,
                self._epochs_before,
                training.num_epochs,
            )
        if self._before_last is not None:
            before, self._before_last = self._before_last, None
            self._select(before)
            self.history[-1].validation = None
        if self._reset_left_out:
            self._reset_left_out = False
            self.history[-1].resets = self._reset()

    def _keep_good(self) -> None:
        """Keeps a copy of the state, unless it is spoiled already: what a run that diverges goes back to."""
        if is_finite(self.model.state_dict()):
            self._good = cloned(self.state())

    def _go_back(self, error: DivergenceError) -> None:
        """Goes back to the last good state, or saves it and raises, as `training.on_divergence` says."""
        good, self._unread = self._good, None
        if good is None:
            raise error
        rewinds = self.rewinds + 1
        if self.training.on_divergence == "stop" or rewinds > MOST_REWINDS:
            begun = good["epoch"] > 0 or good["step"] > 0
            if begun:
                self.observer.save({**good, "diverged_at": error.step})
            kept = f"; the state after epoch {good['epoch']} is kept, to resume with another rate" if begun else ""
            tried = f", also after {self.rewinds} halvings of it" if self.rewinds else ""
            raise DivergenceError(f"{error}{tried}{kept}", error.step)
        diverged_at, seconds = [*self._diverged_at, error.step], self.seconds_before
        self.load(good)
        self.rewinds, self._diverged_at, self.seconds_before, self._epoch_seconds = rewinds, diverged_at, seconds, 0.0
        log.warning(
            "%s: back to the state after epoch %d, with a learning rate of %g (%d of at most %d times)",
            error,
            self.epoch,
            self.training.learning_rate * self._rate_scale,
            rewinds,
            MOST_REWINDS,
        )

    @property
    def _rate_scale(self) -> float:
        return 0.5**self.rewinds

    def _train_epoch(self) -> None:
        training = self.training
        started = self._epoch_began = time.perf_counter() - self._epoch_seconds
        self._epoch_seconds = 0.0
        self._run_steps()
        self._tell_unread()  # of the epoch before, which a device had to do while the steps of this one were launched
        self._unread = _Unread(self.epoch, started, self.one_step.summary_to_come())
        self.epoch, self.step = self.epoch + 1, 0
        self.model.quantizer.reset_usage()
        last = self.epoch == training.num_epochs
        validates = self.epoch % training.val_every_n_epochs == 0
        interval = training.dead_code_reset_interval
        resets = interval > 0 and self.epoch % interval == 0
        saves = not last and self.epoch % training.save_every == 0
        if self._reads_late and not (last or validates or resets or saves):
            return
        record = self._read()
        assert record is not None
        if last and not validates:
            self._before_last = self._selected()
        if last or validates:
            record.validation = self._validate()
        self._reset_left_out = resets and last
        if resets and not last:
            record.resets = self._reset()
        self.observer.epoch_finished(record)
        if validates and not (last or saves):
            self._keep_good()
        if saves:
            self._save()

    def _save(self) -> None:
        self._keep_good()
        self.observer.save(self.state())
        self._saved_at = time.perf_counter()

    def _save_is_due(self) -> bool:
        return time.perf_counter() - self._saved_at >= 60.0 * self.training.save_minutes

    def _reset(self) -> int:
        return int(self.one_step.reset_dead_codes(self._recent_latents()).sum())

    def _tell_unread(self) -> None:
        record = self._read()
        if record is not None:
            self.observer.epoch_finished(record)

    def _read(self) -> EpochRecord | None:
        """The record of the epoch that was not read yet; waits for the device."""
        if self._unread is None:
            return None
        epoch, started, read = self._unread
        self._unread = None
        found = self._finite(read(), epoch)
        started, self._read_at = max(started, self._read_at), time.perf_counter()
        record = self._record(found, epoch, self._read_at - started)
        self.history.append(record)
        return record

    def _stopped_early(self) -> bool:
        return self.stale >= self.training.early_stopping_patience

    def _run_steps(self) -> None:
        """The steps of an epoch that are not done yet. Nothing here waits for the device."""
        self.model.train()
        step = self.one_step
        rates = self._rate_scale * learning_rates(self.training, step.count, self.epoch)
        step.begin_epoch(self._rows_of(self.epoch), rates, self.step)
        self.launcher.follow(step.places())  # an observer may have moved tensors
        while self.step < step.count:
            kind, most = self._next_steps()
            self.step += self.launcher.run(kind, most)
            stopped_by = self.stop_signal()
            if stopped_by is not None or self._save_is_due():
                self._tell_unread()
                self._finite(self.one_step.summary(), self.epoch)
                self._save()
            if stopped_by is not None:
                raise Interrupted(f"stopped in epoch {self.epoch + 1} of {self.training.num_epochs}", stopped_by)
        if self.epoch + 1 < self.training.num_epochs:
            self._rows_of(self.epoch + 1)  # drawn while a device still works on this epoch

    def _rows_of(self, epoch: int) -> Tensor:
        """The order of rows, by seed and epoch alone: the same on every device, and after an interruption."""
        if self._order is None or self._order[0] != epoch:
            drawn = generator(self.seed, Stream.ROW_ORDER, epoch).permutation(self.x_train.shape[0])
            self._order = epoch, torch.from_numpy(drawn)
        return self._order[1]

    def _next_steps(self) -> tuple[StepKind, int]:
        """The kind of the next step, and how many of that kind follow each other."""
        step, interval = self.one_step, self.training.dead_code_reset_steps
        alike = step.full - self.step if self.step < step.full else 1
        alike = min(alike, step.feed.ready(self.step))
        if not interval:
            return step.kind(self.step, reset=False), alike
        before = interval - 1 - (self.epoch * step.count + self.step) % interval  # steps before one that resets
        return step.kind(self.step, reset=before == 0), min(alike, max(before, 1))

    def _finite(self, found: EpochSummary, epoch: int) -> EpochSummary:
        if found.first_bad is not None:
            step, term = epoch * self.one_step.count + found.first_bad[0], found.first_bad[1]
            row, largest = largest_value(self.x_train)
            text = f"the {LossTerms._fields[term]} loss is not finite from step {step} on (epoch {epoch + 1})"
            if largest <= LARGEST and step > 0:
                raise DivergenceError(f"{text}; a smaller training.learning_rate may help", step)
            number = row if self.train_numbers is None else int(self.train_numbers[row])
            raise TrainingError(
                f"{text}; the features are too large: row {number} holds a value of size {largest:.3g}"
                f"{self._category_of_largest(row)}"
            )
        return found

    def _category_of_largest(self, row: int) -> str:
        """ ", in category C" of the largest value of a training row; empty where it is in none."""
        values = self.x_train[torch.tensor([row])] if isinstance(self.x_train, Tensor) else None
        if values is None:
            return ""
        column = int(values.abs().argmax())
        names = [name for name, members in self.model.config.group_indices.items() if column in members]
        return f", in category {names[0]}" if names else ""

    def _record(self, found: EpochSummary, epoch: int, seconds: float) -> EpochRecord:
        steps = self.one_step.count
        diverged_at, self._diverged_at = self._diverged_at or None, []
        return EpochRecord(
            epoch=epoch + 1,
            train_loss=found.loss,
            terms=dict(zip(LossTerms._fields, found.terms, strict=True)),
            utilization=found.utilization,
            learning_rate=self._rate_scale * learning_rate(self.training, steps, (epoch + 1) * steps - 1),
            seconds=seconds,
            diverged_at=diverged_at,
        )

    def _validate(self) -> dict[str, float]:
        self._run_validation()
        kept = self.validation.result()
        if spoiled(kept["reconstruction_error"], kept.values(), self.x_val.shape):
            rows, self.val_numbers, _ = without_outliers(self.model, self.x_val, self.val_numbers, "validation")
            self._validate_on(rows)
            self._run_validation()
            kept = self.validation.result()
        if not math.isfinite(kept["val_loss"]):
            message = f"the validation loss is not finite after epoch {self.epoch}: "
            if largest_value(self.x_val)[1] > LARGEST:
                raise TrainingError(message + "validation rows hold values far outside those of training")
            step = self.epoch * self.one_step.count
            raise DivergenceError(message + "the weights have grown too large for validation rows", step)
        if kept["val_loss"] < self.counted_loss - self.training.early_stopping_min_delta:
            self.counted_loss = kept["val_loss"]
            self.stale = 0
        else:
            self.stale += 1
        if kept["val_loss"] < self.best_loss:
            self.best_loss = kept["val_loss"]
            self.best_epoch = self.epoch
            self._keep_best()
        return kept

    def _selected(self) -> dict[str, Any]:
        """A copy of what validations have found so far."""
        return {
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "counted_loss": self.counted_loss,
            "best_state_dict": {name: value.clone() for name, value in self.best_state.items()},
            "stale": self.stale,
        }

    def _select(self, found: Mapping[str, Any]) -> None:
        """Goes back to what `_selected` or `state` gave."""
        self.best_epoch, self.best_loss = found["best_epoch"], found["best_loss"]
        self.best_state = {k: v.to(self.device, copy=True) for k, v in found["best_state_dict"].items()}
        self.counted_loss, self.stale = found["counted_loss"], found["stale"]

    def _keep_best(self) -> None:
        now = self.model.state_dict()
        if not self.best_state:
            self.best_state = {name: torch.empty_like(value) for name, value in now.items()}
        for name, value in now.items():
            self.best_state[name].copy_(value)

    @torch.no_grad()
    def _recent_latents(self) -> Tensor | None:
        if self.training.dead_code_strategy != "sample":
            return None
        rows = torch.randperm(self.x_train.shape[0])[: max(self.one_step.batch, 1024)].to(self.device)
        self.model.eval()
        return self.model.encode(self.x_train[rows])

    def best_model(self) -> CategoricalHierarchicalVQVAE:
        best = copy.deepcopy(self.model)
        best.load_state_dict(self.best_state)
        return best.eval()

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs to go on as if nothing had happened; tensors and plain values only."""
        return {
            "model_state_dict": self.model.state_dict(),
            "usage": self.model.quantizer.usage,
            **self.one_step.state(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "history": [vars(record) for record in self.history],
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "counted_loss": self.counted_loss,
            "best_state_dict": self.best_state,
            "stale": self.stale,
            "num_epochs": self.training.num_epochs,
            "streams": version(),
            "reset_left_out": self._reset_left_out,
            "before_last": self._before_last,
            "rewinds": self.rewinds,
            "rewound_at": self._diverged_at,
            "seconds": self.seconds_before + time.perf_counter() - self.began,
            "epoch_seconds": time.perf_counter() - self._epoch_began if self.step else 0.0,
        }

    def _check_figures(self, state: Mapping[str, Any]) -> None:
        """Raises DataError where figures or weights of validations are not those that `state` gives."""
        for name in ("epoch", "step", "best_epoch", "stale"):
            if name in state and (not isinstance(state[name], int) or not 0 <= state[name] < 2**62):
                raise DataError(f"{name} must be a number from 0 on, got {shown(state[name])}")
        for name in ("best_loss", "counted_loss"):
            if not isinstance(state[name], (int, float)):
                raise DataError(f"{name} must be a number, got {shown(state[name])}")
        best = tensor_shapes(state["best_state_dict"])
        if best and (problem := shape_difference(best, tensor_shapes(self.model.state_dict()))):
            raise DataError(f"best_state_dict: {problem}")

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` gave; raises DataError, or what a wrong entry raises (see `payload.reading`)."""
        self._check_figures(state)
        if state.get("before_last") is not None:
            self._check_figures(state["before_last"])
        if state["epoch"] >= self.training.num_epochs and not state["best_state_dict"]:
            raise DataError("best_state_dict is empty, but all epochs are done")
        self.model.load_state_dict(state["model_state_dict"])
        self.model.quantizer.usage.copy_(state["usage"])
        self.one_step.load(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = [EpochRecord(**record) for record in state["history"]]
        self._select(state)
        self._epochs_before = state.get("num_epochs")
        self._reset_left_out = state.get("reset_left_out", False)
        self._before_last = state.get("before_last")
        if "diverged_at" not in state:  # else the run was ended, and its learning rate counts from anew
            self.rewinds, self._diverged_at = state.get("rewinds", 0), list(state.get("rewound_at", []))
        # States of earlier versions have the seconds of their epochs alone.
        self.seconds_before = state.get("seconds", sum(record.seconds for record in self.history))
        self._epoch_seconds = state.get("epoch_seconds", 0.0)
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)

"""The training loop: epochs of steps, validations, resets, and a state that resumes exactly."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.config import RunConfig
from spinlock_fast.errors import ConfigError, Interrupted, TrainingError
from spinlock_fast.losses import LossTerms, LossWeights, loss_terms
from spinlock_fast.metrics import evaluate
from spinlock_fast.model import CategoricalHierarchicalVQVAE

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


class TrainingRun:
    """The state of one call of `fit`: everything that a resumable checkpoint holds."""

    def __init__(
        self,
        config: RunConfig,
        observer: Observer,
        stop_signal: Callable[[], int | None],
        model: CategoricalHierarchicalVQVAE,
        x_train: Tensor,
        x_val: Tensor,
    ) -> None:
        self.config = config
        self.training = config.training
        self.seed = config.random_seed
        self.observer = observer
        self.stop_signal = stop_signal
        self.model = model
        self.device = device = x_train.device
        self.x_train, self.x_val = x_train, x_val
        self.weights = LossWeights.of(self.training)
        self.weighted = torch.tensor([weight != 0.0 for weight in self.weights], device=device)
        rows = x_train.shape[0]
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
        if self.config.model.codebook_init != "kmeans":
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
        observer = self.observer
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
            stopped_by = self.stop_signal()
            if stopped_by is not None:
                self._raise_if_not_finite()
                self.observer.save(self.state())
                raise Interrupted(f"stopped in epoch {self.epoch + 1} of {self.training.num_epochs}", stopped_by)

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

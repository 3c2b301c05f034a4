"""Trains a predictor of tokens."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.checkpoints.directory import finite_or_null, load_torch, save_torch
from spinlock_fast.checkpoints.host_copies import to_cpu
from spinlock_fast.config.random_streams import seed_torch
from spinlock_fast.data.payload_checks import payload_errors
from spinlock_fast.errors import ConfigError, DataError, Interrupted, OutputError, TrainingError
from spinlock_fast.models.input_check import TEST, TRAIN, VALIDATION, KnownRows
from spinlock_fast.output.atomic_files import write_json
from spinlock_fast.output.locks import locked_output_directory
from spinlock_fast.prediction.cached_inputs import CachedInputs
from spinlock_fast.prediction.evaluation import evaluate
from spinlock_fast.prediction.inputs import (
    Batch,
    Inputs,
    Standardizer,
    Targets,
    read_targets,
    signature,
    split_rows,
)
from spinlock_fast.prediction.predictor import FILE, Neighbours, Predictor, build_networks, differing_settings
from spinlock_fast.prediction.settings import PredictorConfig
from spinlock_fast.tokenizer import Tokenizer

STATE = "state.pt"
METRICS = "metrics.json"
_MOST_NEIGHBOURS = 4096
_MIN_ROWS = 20

Progress = Callable[[str, int, int], None]


def train_predictor(
    checkpoint: str | Path,
    data: str | list[str],
    config: PredictorConfig,
    output: Path,
    device: torch.device,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Trains on a file, and writes predictor.pt and metrics.json to a directory.

    The best epoch by log-loss on the validation rows is kept; metrics are of the test rows. The state after every epoch
    is kept for `resume`.

    Args:
        checkpoint: directory of the tokenizer.
        data: HDF5 file, glob or list, with the inputs and the features that the tokenizer encodes.
        output: directory.
        resume: continue an interrupted training there.
        overwrite: replace a predictor, or an interrupted training.
        progress: called with a word, and numbers done and in all.

    Returns:
        The metrics, see `evaluate`.

    Raises:
        ConfigError, DataError, OutputError, TrainingError: each with one line.
        Interrupted: by a signal.
    """
    started = time.perf_counter()
    with locked_output_directory(output):
        state = _state_to_resume(output, config, resume, overwrite)
        tokenizer = Tokenizer.from_checkpoint(checkpoint, device)
        stored = Inputs(data, config)
        targets = read_targets(tokenizer, data, progress)
        inputs = CachedInputs(stored, output)
        if inputs.rows != len(targets.tokens):
            raise DataError(f"{data}: {inputs.rows} rows of inputs, but {len(targets.tokens)} of features")
        if inputs.rows < _MIN_ROWS:
            raise DataError(f"{data}: {inputs.rows} rows are too few: at least {_MIN_ROWS} are needed")
        splits = split_rows(tokenizer.known_rows, targets.keys, config)
        predictor = _new_predictor(tokenizer, inputs, targets, splits, config)
        if state is not None and state["keys"] != int(targets.keys.sum()):
            raise ConfigError(f"--resume {output}: the data or the tokenizer are not those of the interrupted training")
        run = _Run(predictor.to(device), inputs, targets, splits, output, state)
        try:
            history = run.train(progress)
        except Interrupted as stopped:
            hint = f"stopped; the same command with --resume goes on in {output}" if run.saved else "stopped in epoch 1"
            raise Interrupted(hint, stopped.exit_status - 128) from None
        metrics = evaluate(predictor, inputs.batches(splits == TEST), targets)
        metrics |= {
            "rows": "heldout",
            "best_epoch": run.best_epoch["tokens"],
            "epochs": len(history),
            "history": history,
        }
        metrics |= {"trained_rows": int((splits == TRAIN).sum()), "validation_rows": int((splits == VALIDATION).sum())}
        metrics["tokenizer_sha256"] = tokenizer.checkpoint_hash
        metrics["seconds"] = time.perf_counter() - started
        predictor.save(output / FILE)
        write_json(output / METRICS, finite_or_null(metrics))
        (output / STATE).unlink(missing_ok=True)
    return metrics


def _state_to_resume(output: Path, config: PredictorConfig, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    if resume:
        if not (output / STATE).exists():
            raise DataError(f"--resume {output}: holds no interrupted training")
        state = load_torch(output / STATE)
        with payload_errors(state, "the saved state"):
            differing = differing_settings(state["config"], config)
        if differing:
            raise ConfigError(f"--resume {output}: was started with another {', '.join(differing)}")
        return state
    existing = next((name for name in (FILE, STATE) if (output / name).exists()), None)
    if existing is not None and not overwrite:
        resumable = "; --resume goes on" if existing == STATE else ""
        raise OutputError(f"{output / existing}: exists; --overwrite replaces it{resumable}")
    return None


def _new_predictor(
    tokenizer: Tokenizer, inputs: CachedInputs, targets: Targets, splits: NDArray[np.uint8], config: PredictorConfig
) -> Predictor:
    """A predictor before its first step."""
    training = splits == TRAIN
    standardizer = Standardizer.fit(inputs.shape, inputs.batches(training))
    with torch.random.fork_rng(devices=[]):
        seed_torch(config.random_seed)
        networks = build_networks(tokenizer, inputs.shape, config)
    rows = np.flatnonzero(training)
    sampled = np.zeros(len(training), dtype=bool)
    sampled[rows[:: max(1, -(-len(rows) // _MOST_NEIGHBOURS))]] = True
    signatures, places = [], []
    for batch in inputs.batches(sampled):
        signatures.append(signature(*standardizer(batch, torch.device("cpu"))))
        places.append(batch.index)
    tokens = targets.tokens[torch.from_numpy(rows)]
    counts = [torch.bincount(tokens[:, g], minlength=k) for g, k in enumerate(tokenizer.model.quantizer.num_codes)]
    known = KnownRows(targets.keys, splits)
    neighbours = Neighbours(torch.cat(signatures), targets.tokens[torch.cat(places)])
    return Predictor(
        config,
        tokenizer,
        inputs.shape,
        tokenizer.checkpoint_hash,
        *networks,
        standardizer,
        counts,
        neighbours,
        known,
        inputs.names,
    )


class _Run:
    """The loop over epochs."""

    def __init__(
        self,
        predictor: Predictor,
        inputs: CachedInputs,
        targets: Targets,
        splits: NDArray[np.uint8],
        output: Path,
        state: dict[str, Any] | None,
    ) -> None:
        self.predictor, self.inputs, self.targets = predictor, inputs, targets
        self.training, self.validation = splits == TRAIN, splits == VALIDATION
        self.output, self.saved = output, state is not None
        self.networks = torch.nn.ModuleDict({"tokens": predictor.network, "regression": predictor.regression})
        config = predictor.config
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.history: list[dict[str, float]] = []
        self.best_epoch: dict[str, int] = {}  # of each network, by its own loss on the validation rows
        self.best = {name: copy.deepcopy(network.state_dict()) for name, network in self.networks.items()}
        if state is not None:
            with payload_errors(state, "the saved state"):
                self.networks.load_state_dict(state["networks"])
                self.optimizer.load_state_dict(state["optimizer"])
                self.history, self.best_epoch, self.best = state["history"], state["best_epoch"], state["best"]

    def train(self, progress: Progress) -> list[dict[str, float]]:
        """Trains the remaining epochs, and loads the best weights; returns the history."""
        epochs = self.predictor.config.num_epochs
        for epoch in range(len(self.history), epochs):
            train_loss = self._epoch(epoch)
            record = {"epoch": epoch + 1, "train_loss": train_loss, **self._validate()}
            if not all(map(math.isfinite, record.values())):
                raise TrainingError(f"epoch {epoch + 1}: the loss is not finite; a smaller learning_rate may help")
            for name, network in self.networks.items():
                best = self.best_epoch.get(name)
                if best is None or record[f"val_{name}"] < self.history[best - 1][f"val_{name}"]:
                    self.best_epoch[name] = epoch + 1
                    self.best[name] = copy.deepcopy(network.state_dict())
            self.history.append(record)
            self._save()
            progress("epochs", epoch + 1, epochs)
        for name, network in self.networks.items():
            network.load_state_dict(self.best[name])
        self.networks.eval()
        return self.history

    def _epoch(self, epoch: int) -> float:
        config, device = self.predictor.config, self.predictor.device
        self.networks.train()
        steps = -(-int(self.training.sum()) // config.batch_size)
        total, rows = 0.0, 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            seed_torch((config.random_seed + epoch + 1) % 2**63, device)
            for step, batch in enumerate(self.inputs.shuffled(self.training, config.random_seed, epoch)):
                share = (epoch + step / steps) / config.num_epochs
                rate = config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                token_loss, error = self._losses(batch)
                self.optimizer.zero_grad()
                (token_loss + error).backward()  # the networks share no weights
                for network in self.networks.values():
                    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                self.optimizer.step()
                total += float(token_loss.detach()) * len(batch.index)
                rows += len(batch.index)
        return total / max(rows, 1)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """On the validation rows: mean log-loss of a token, in nats, and squared error of the regression."""
        self.networks.eval()
        totals, rows = np.zeros(2), 0
        for batch in self.inputs.batches(self.validation):
            totals += np.array([float(loss) for loss in self._losses(batch)]) * len(batch.index)
            rows += len(batch.index)
        return {"val_tokens": float(totals[0]) / rows, "val_regression": float(totals[1]) / rows}

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean log-loss of a token, and the mean squared error of the regression."""
        device = self.predictor.device
        inputs = self.predictor.standardizer(batch, device)
        tokens, features = self.targets.tokens[batch.index].to(device), self.targets.features[batch.index].to(device)
        logits, _ = self.predictor.network(*inputs, tokens)
        token_loss = torch.stack([F.cross_entropy(part, tokens[:, g]) for g, part in enumerate(logits)]).mean()
        return token_loss, F.mse_loss(self.predictor.regression(*inputs), features)

    def _save(self) -> None:
        state = {
            "config": self.predictor.config.model_dump(mode="json"),
            "keys": int(self.targets.keys.sum()),
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best": self.best,
        }
        save_torch(self.output / STATE, to_cpu(state))
        self.saved = True

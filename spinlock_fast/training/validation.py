"""Validation during training: metrics of the validation rows, without rows that no model can measure."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import Rows
from spinlock_fast.distributed import Ranks
from spinlock_fast.errors import TrainingError
from spinlock_fast.models.metrics import Validation
from spinlock_fast.models.outliers import MAX_MAGNITUDE, has_unusable_values, largest_magnitude, without_outliers
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.training.cuda_graphs import StepLauncher
from spinlock_fast.training.divergence import DivergenceError


class ValidationRows:
    """The validation rows of a run; measures the model on them, on CUDA as a graph.

    Args:
        model: measured with its current weights.
        x: [N, F] validation rows of this rank, in the order of the ranks.
        numbers: [N] numbers of the rows in the data, for messages.
        training: weights of the loss terms.
        launcher: of the training steps.
        ranks: all of them measure together.
    """

    def __init__(
        self,
        model: CategoricalHierarchicalVQVAE,
        x: Rows,
        numbers: NDArray[np.int64] | None,
        training: TrainingConfig,
        launcher: StepLauncher,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.numbers = numbers
        self.training = training
        self._launcher = launcher
        self._ranks = ranks
        self._set_rows(x)

    def _set_rows(self, x: Rows) -> None:
        self.x = x
        self._validation = Validation(self.model, x, self.training, self._ranks)
        self._run = self._validation.run
        if isinstance(x, Tensor):  # copies of rows from host memory cannot be captured
            self._run = self._launcher.captured(self._validation.run, "validations")

    def measure(self, epoch: int, step: int) -> dict[str, float]:
        """The metrics. Rows without a finite error or code are removed, with a warning.

        Args:
            epoch, step: completed ones, for messages.

        Raises:
            TrainingError: rows have values far outside those of training.
            DivergenceError: the loss is not finite for another reason.
        """
        self._run()
        metrics = self._validation.result()
        shape = self._validation.total_rows, self.x.shape[1]  # of all ranks, which must come to the same conclusion
        if has_unusable_values(metrics["reconstruction_error"], metrics.values(), shape):
            x, self.numbers, _ = without_outliers(self.model, self.x, self.numbers, "validation", self._ranks)
            self._set_rows(x)
            self._run()
            metrics = self._validation.result()
        if not math.isfinite(metrics["val_loss"]):
            message = f"the validation loss is not finite after epoch {epoch}: "
            largest = torch.tensor(largest_magnitude(self.x)[1] if self.x.shape[0] else 0.0)
            if self._ranks.max_(largest) > MAX_MAGNITUDE:
                raise TrainingError(message + "validation rows have values far outside those of training")
            raise DivergenceError(message + "the weights are too large for the validation rows", step)
        return metrics

"""The result of `Trainer.fit`, and the check of feature matrices that it takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from spinlock_fast.checkpoints.tokenizer_files import Origin
from spinlock_fast.config.schema import FamilyConfig, RunConfig
from spinlock_fast.data.feature_source import DatasetInfo
from spinlock_fast.data.input_arrays import masked_to_nan, to_token_tensor
from spinlock_fast.data.mapped_pages import MappedPages
from spinlock_fast.data.split import Split
from spinlock_fast.errors import DataError
from spinlock_fast.estimators.html_summary import model_html
from spinlock_fast.estimators.transformer import MATRIX
from spinlock_fast.features.cleaning import FeatureCleaner
from spinlock_fast.features.encode import FamilyEncoder
from spinlock_fast.features.matrix import MatrixNormalizer
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.models.code_search import Search, TokenSearch
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.observer import EpochRecord

_ROWS_PER_BLOCK = 16384


@dataclass
class TrainResult:
    """What `Trainer.fit` returns.

    `model` has the weights of the best validation and is in eval mode; its quantizer's `utilization()` and
    `perplexity()` are those of the validation rows. It takes normalised rows: `normalizer` converts rows in the units
    of x to them (None if x was not normalised). `encode` and `decode` do both steps, and so does the `Tokenizer`
    in `tokenizer`, which can be saved.
    """

    model: CategoricalHierarchicalVQVAE
    metrics: Metrics
    history: list[EpochRecord]
    best_epoch: int
    split: Split
    final_state: dict[str, Any] = field(repr=False)
    normalizer: MatrixNormalizer | None = field(default=None, repr=False)
    config: RunConfig = field(default_factory=RunConfig, repr=False)
    feature_names: list[str] = field(default_factory=list, repr=False)
    vocabulary: dict[str, Any] | None = field(default=None, repr=False)  # see `compare_vocabulary`

    def encode(
        self,
        x: ArrayLike | Tensor,
        search: Search = "nearest",
        sweeps: int = 2,
        search_weight: float = 0.0,
        perturbations: int = 0,
    ) -> Any:
        """Rows [N, F] in the units of the fitted x -> tokens [N, G] int64; see `model.get_tokens`.

        Returns:
            A torch tensor if x is one, else a numpy array.

        Raises:
            DataError: x is not a finite matrix of F columns.
        """
        data = as_feature_matrix(x)
        if data.shape[1] != self.model.config.input_dim:
            raise DataError(f"x must be [N, {self.model.config.input_dim}], got {list(data.shape)}")
        rows = self.normalizer(data) if self.normalizer is not None else data.astype(np.float32, copy=False)
        blocks = torch.from_numpy(rows).split(_ROWS_PER_BLOCK)
        chosen = TokenSearch(search, sweeps, search_weight, perturbations)
        tokens = torch.cat([self.model.get_tokens(block, *chosen).cpu() for block in blocks])
        return tokens if isinstance(x, Tensor) else tokens.numpy()

    def decode(self, tokens: Any) -> Any:
        """Tokens [N, G] -> rows [N, F] in the units of the fitted x.

        Raises:
            DataError: the tokens have another shape, or one is not a whole number.
            IndexError: a token is outside of its codebook.
        """
        index = to_token_tensor(tokens, len(self.model.codebook_names))
        blocks = [self.model.decode_from_tokens(block).cpu() for block in index.split(_ROWS_PER_BLOCK)]
        rows = torch.cat(blocks).numpy()
        rows = self.normalizer.inverse(rows) if self.normalizer is not None else rows
        return torch.from_numpy(rows) if isinstance(tokens, Tensor) else rows

    def _repr_html_(self) -> str:
        """Sizes, epochs and metrics as HTML, for notebooks."""
        rows = [
            ("epochs", f"{len(self.history):,}, best {self.best_epoch:,}"),
            ("rows", f"{len(self.split.train):,} training, {len(self.split.val):,} validation"),
        ]
        return model_html("TrainResult", self.model, self.feature_names, self.metrics, rows)

    @property
    def tokenizer(self) -> Tokenizer:
        """A `Tokenizer` of rows [N, F] in the units of the fitted x, on the CPU, with weights of its own."""
        F = self.model.config.input_dim
        low, high, normalizer = np.full(F, -np.inf), np.full(F, np.inf), Normalizer("standard", np.zeros(F), np.ones(F))
        if self.normalizer is not None:
            low, high, normalizer = self.normalizer.low, self.normalizer.high, self.normalizer.normalizer
        dataset = f"features/{MATRIX}/features"
        identity = FamilyConfig(encoder="IdentityEncoder", dataset=dataset)
        family = FamilyEncoder.seeded(MATRIX, identity, DatasetInfo(dataset, 0, (F,), 1), seed=0)
        family.column_names = self.feature_names
        config = self.config.model_copy(update={"families": {MATRIX: identity}})
        history = {"best_epoch": self.best_epoch, "epochs": [vars(record) for record in self.history]}
        return Tokenizer.from_parts(
            copy.deepcopy(self.model).cpu(),
            [family],
            FeatureCleaner(np.ones(F, dtype=bool), np.zeros(F), low, high),
            normalizer,
            self.feature_names,
            metrics=self.metrics,
            origin=Origin.of_run(config, self.metrics, history, self.vocabulary),
            n_features_in_=F,
        )


def as_feature_matrix(x: ArrayLike | Tensor) -> NDArray[Any]:
    """x [N, F] as a numeric array, without a copy if it is contiguous float32 (in memory or memory-mapped).

    Other dtypes are kept until normalisation.

    Raises:
        DataError: x is not a numeric matrix, or has a value that is not finite in float32.
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
    pages = MappedPages(data)
    for start in range(0, len(data), _ROWS_PER_BLOCK):
        pages.release_if_many()
        with np.errstate(over="ignore"):
            values = data[start : start + _ROWS_PER_BLOCK].astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0] + (start, 0)
            raise DataError(f"x[{row}, {column}] is {float(data[row, column])}; features must be finite in float32")
    return data

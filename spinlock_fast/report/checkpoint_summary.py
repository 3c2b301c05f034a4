"""The contents of a checkpoint directory: the single source of the numbers in all dashboards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spinlock_fast.checkpoints.directory import CONFIG, HISTORY, METRICS, load_run_config
from spinlock_fast.checkpoints.run_directory import VOCABULARY, find
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.names import count_families, family_of
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.report.run_files import read_history, read_metrics, read_vocabulary
from spinlock_fast.tokenizer import Tokenizer


class Codebook(NamedTuple):
    """One codebook: its category and level, K and D."""

    category: int
    level: int
    codes: int
    dim: int


@dataclass
class CheckpointSummary:
    """A checkpoint directory. Sizes come from the model, measured figures from metrics.json."""

    name: str
    tokenizer: Tokenizer
    config: RunConfig | None
    metrics: Metrics  # contents of metrics.json, empty without the file
    measured_on: str  # the rows that `metrics` were measured on, as text
    epochs: list[dict[str, Any]]
    best_epoch: int | None
    vocabulary: dict[str, Any]  # contents of vocabulary.json, empty without the file
    notes: list[str] = field(default_factory=list)  # omitted parts, with the reason

    @property
    def model(self) -> CategoricalHierarchicalVQVAE:
        return self.tokenizer.model

    @property
    def categories(self) -> list[str]:
        return self.model.categories

    @property
    def groups(self) -> list[list[int]]:
        """Feature indices of each category."""
        return list(self.model.config.group_indices.values())

    @property
    def codebooks(self) -> list[Codebook]:
        """All codebooks, in the order of the tokens."""
        return [
            Codebook(c, level, codebook.num_tokens, codebook.latent_dim)
            for c, name in enumerate(self.categories)
            for level, codebook in enumerate(self.model.levels[name])
        ]

    @property
    def levels(self) -> int:
        """Largest number of levels of a category."""
        return max(len(codebooks) for codebooks in self.model.levels.values())

    @property
    def total_codes(self) -> int:
        return sum(codebook.codes for codebook in self.codebooks)

    @property
    def feature_names(self) -> list[str]:
        return self.tokenizer.feature_names

    @property
    def families(self) -> list[str]:
        """Feature families, in the order of the columns."""
        return list(dict.fromkeys(map(family_of, self.feature_names)))

    @property
    def nameless_families(self) -> list[str]:
        """Families whose columns have no names, such as the outputs of a random network."""
        return [family.name for family in self.tokenizer.families if family.column_names is None]

    def family_counts(self) -> list[dict[str, int]]:
        """Number of features of each family, for each category."""
        return [count_families(self.feature_names, members) for members in self.groups]

    def per_category(self, key: str) -> list[Any] | None:
        """An entry of each category in metrics.json; None where it is missing."""
        values = [category.get(key) for category in self.metrics.get("categories", [])]
        return values if values and None not in values else None

    def totals_line(self) -> str:
        """The totals shown at the head of every dashboard."""
        parts = [
            _count(len(self.categories), "category", "categories"),
            _count(len(self.codebooks), "codebook"),
            f"{len(self.feature_names):,} features of {_count(len(self.families), 'family', 'families')}",
        ]
        codes = _count(self.total_codes, "code")
        if "active_codes" in self.metrics:
            codes += f", {self.metrics['active_codes']:,} of them in use on {self.measured_on}"
        return "  ·  ".join([*parts, codes])


def read_checkpoint_summary(directory: str | Path, device: str | torch.device = "cpu") -> CheckpointSummary:
    """Reads a checkpoint directory; missing optional files are noted.

    Raises:
        DataError: no checkpoint, a damaged file, or one that belongs to another model.
    """
    directory = Path(directory)
    tokenizer = Tokenizer.from_checkpoint(directory, device)
    notes: list[str] = []
    config = None
    if os.path.exists(find(directory, CONFIG)):
        try:
            config = load_run_config(directory)
        except ConfigError as error:
            notes.append(f"{error}: the data of the run are unknown")
    metrics = read_metrics(find(directory, METRICS))
    history = read_history(find(directory, HISTORY))
    if metrics:
        _check_same_model(metrics, tokenizer.model, directory / METRICS)
    epochs = [record for record in history.get("epochs", []) if {"epoch", "train_loss"} <= record.keys()]
    if not epochs:
        notes.append(f"no {HISTORY}: training curves are omitted")
    return CheckpointSummary(
        name=directory.resolve().name,
        tokenizer=tokenizer,
        config=config,
        metrics=metrics,
        measured_on=_count(metrics.get("val_rows", 0), "row" if metrics.get("rows") == "all" else "validation row"),
        epochs=epochs,
        best_epoch=history.get("best_epoch"),
        vocabulary=read_vocabulary(find(directory, VOCABULARY)),
        notes=notes,
    )


def _check_same_model(metrics: Metrics, model: CategoricalHierarchicalVQVAE, path: Path) -> None:
    """Raises DataError where metrics.json describes another model."""
    described = metrics.get("categories", [])
    sizes = {name: len(members) for name, members in model.config.group_indices.items()}
    matches = not described or [category.get("name") for category in described] == list(sizes)
    for category in described if matches else ():
        name = category["name"]
        codes = [codebook.num_tokens for codebook in model.levels[name]]
        matches &= category.get("features", sizes[name]) == sizes[name] and category.get("codes", codes) == codes
    if not matches:
        raise DataError(f"{path}: describes other categories than the model beside it")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"

"""What a checkpoint directory tells: the one source of the numbers in all dashboards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spinlock_fast.checkpoints.directory import CONFIG, HISTORY, METRICS, load_run_config
from spinlock_fast.checkpoints.run_directory import find
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.names import count_families, family_of
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE
from spinlock_fast.report.run_files import read_history, read_metrics
from spinlock_fast.tokenizer import Tokenizer


class Codebook(NamedTuple):
    """One codebook: its place, K and D."""

    category: int
    level: int
    codes: int
    dim: int


@dataclass
class Contents:
    """A checkpoint directory. Sizes come from the model, what was measured from metrics.json."""

    name: str
    tokenizer: Tokenizer
    config: RunConfig | None
    metrics: Metrics  # empty where nothing was measured
    measured_on: str  # the rows that `metrics` rest on, in words
    epochs: list[dict[str, Any]]
    best_epoch: int | None
    notes: list[str] = field(default_factory=list)  # what is left out, and why

    @property
    def model(self) -> CategoricalHierarchicalVQVAE:
        return self.tokenizer.model

    @property
    def categories(self) -> list[str]:
        return self.model.categories

    @property
    def groups(self) -> list[list[int]]:
        """Features of each category."""
        return list(self.model.config.group_indices.values())

    @property
    def codebooks(self) -> list[Codebook]:
        """In the order of the tokens."""
        return [
            Codebook(c, level, book.num_tokens, book.latent_dim)
            for c, name in enumerate(self.categories)
            for level, book in enumerate(self.model.levels[name])
        ]

    @property
    def levels(self) -> int:
        """Most levels of a category."""
        return max(len(books) for books in self.model.levels.values())

    @property
    def total_codes(self) -> int:
        return sum(book.codes for book in self.codebooks)

    @property
    def feature_names(self) -> list[str]:
        return self.tokenizer.feature_names

    @property
    def families(self) -> list[str]:
        """Families of the features, in the order of the columns."""
        return list(dict.fromkeys(map(family_of, self.feature_names)))

    def family_counts(self) -> list[dict[str, int]]:
        """Features of each family, for each category."""
        return [count_families(self.feature_names, members) for members in self.groups]

    def per_category(self, key: str) -> list[Any] | None:
        """An entry of the categories in metrics.json; None where it is not there."""
        found = [category.get(key) for category in self.metrics.get("categories", [])]
        return found if found and None not in found else None

    def line(self) -> str:
        """The totals, in the words that every dashboard uses."""
        parts = [
            _count(len(self.categories), "category", "categories"),
            _count(len(self.codebooks), "codebook"),
            f"{len(self.feature_names):,} features of {_count(len(self.families), 'family', 'families')}",
        ]
        codes = _count(self.total_codes, "code")
        if "active_codes" in self.metrics:
            codes += f", {self.metrics['active_codes']:,} of them in use on {self.measured_on}"
        return "  ·  ".join([*parts, codes])


def read_contents(directory: str | Path, device: str | torch.device = "cpu") -> Contents:
    """What lies in a checkpoint directory; what is optional and missing is noted.

    Raises:
        DataError: no checkpoint, a damaged file, or one that belongs to another model.
    """
    directory = Path(directory)
    tokenizer = Tokenizer.from_checkpoint(directory, device)
    notes: list[str] = []
    config = None
    if find(directory, CONFIG).exists():
        try:
            config = load_run_config(directory)
        except ConfigError as error:
            notes.append(f"{error}: the data of the run are not known")
    metrics = read_metrics(find(directory, METRICS))
    history = read_history(find(directory, HISTORY))
    if metrics:
        _check_belongs(metrics, tokenizer.model, directory / METRICS)
    epochs = [record for record in history.get("epochs", []) if {"epoch", "train_loss"} <= record.keys()]
    if not epochs:
        notes.append(f"no {HISTORY}: the curves are left out")
    return Contents(
        name=directory.resolve().name,
        tokenizer=tokenizer,
        config=config,
        metrics=metrics,
        measured_on=_count(metrics.get("val_rows", 0), "row" if metrics.get("rows") == "all" else "validation row"),
        epochs=epochs,
        best_epoch=history.get("best_epoch"),
        notes=notes,
    )


def _check_belongs(metrics: Metrics, model: CategoricalHierarchicalVQVAE, path: Path) -> None:
    """Numbers of one model must not be drawn beside the sizes of another."""
    described = metrics.get("categories", [])
    sizes = {name: len(members) for name, members in model.config.group_indices.items()}
    same = not described or [category.get("name") for category in described] == list(sizes)
    for category in described if same else ():
        name = category["name"]
        codes = [book.num_tokens for book in model.levels[name]]
        same &= category.get("features", sizes[name]) == sizes[name] and category.get("codes", codes) == codes
    if not same:
        raise DataError(f"{path}: describes other categories than the model beside it")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"

"""Writes a tokenizer as a checkpoint directory, without the states that resume a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spinlock_fast.checkpoints.directory import finite_or_null, save_torch, write_normalization
from spinlock_fast.checkpoints.integrity import write_manifest
from spinlock_fast.checkpoints.model_card import model_card
from spinlock_fast.checkpoints.run_directory import (
    BEST,
    CARD,
    CONFIG,
    HISTORY,
    METRICS,
    NORMALIZATION,
    REFERENCE,
    SAFETENSORS,
    VOCABULARY,
    RunDirectory,
    find,
)
from spinlock_fast.config.loading import dump_config
from spinlock_fast.config.random_streams import VERSION
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.output.atomic_files import write_atomically, write_text

log = logging.getLogger(__name__)

_TEXTS = (CONFIG, HISTORY, METRICS, CARD, VOCABULARY, REFERENCE)
_MAX_BYTES = 64_000_000


@dataclass(frozen=True)
class Origin:
    """The run that a tokenizer comes from.

    Args:
        texts: contents of the text files of its checkpoint directory, by name.
        epoch: epoch of the weights.
        streams: version of its random streams, see `config.random_streams`.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    epoch: int = 0
    streams: int = VERSION

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        metrics: Metrics,
        history: Mapping[str, Any],
        vocabulary: Mapping[str, Any] | None = None,
        reference: str | None = None,
    ) -> Origin:
        """Of a run in this process; `vocabulary` if it was started from another checkpoint.

        `reference` is the text of reference_statistics.json.
        """
        texts = {
            CONFIG: dump_config(config),
            HISTORY: json.dumps(finite_or_null(history), indent=2) + "\n",
            METRICS: json.dumps(finite_or_null(metrics), indent=2) + "\n",
            CARD: model_card(metrics, config),
        }
        if vocabulary is not None:
            texts[VOCABULARY] = json.dumps(finite_or_null(vocabulary), indent=2) + "\n"
        if reference is not None:
            texts[REFERENCE] = reference
        return cls(texts, metrics["best_epoch"])

    @classmethod
    def read(cls, directory: Path, payload: Mapping[str, Any]) -> Origin:
        """Of a checkpoint directory; a file that cannot be read is left out."""
        texts = {}
        for name in _TEXTS:
            path = find(directory, name)
            try:
                if path.stat().st_size <= _MAX_BYTES:
                    texts[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                log.debug("%s: not read: %s", path, error)
        streams = payload.get("streams")
        return cls(texts, int(payload["epoch"]), streams if isinstance(streams, int) else 1)

    def metrics(self) -> dict[str, Any]:
        """The contents of metrics.json; empty if there are none."""
        try:
            metrics = json.loads(self.texts.get(METRICS, "{}"))
        except (ValueError, RecursionError):
            return {}
        return metrics if isinstance(metrics, dict) else {}


def write_tokenizer(
    directory: Path,
    payload: Mapping[str, Any],
    normalization: Mapping[str, np.ndarray[Any, Any]],
    origin: Origin,
) -> None:
    """Writes a checkpoint directory; an earlier result there is moved to `previous`.

    Args:
        directory: created if it does not exist.
        payload: contents of best_model.pt.
        normalization: arrays of normalization_stats.npz.
        origin: the other files.

    Raises:
        OutputError: it cannot be written, or another process writes to it.
    """
    from safetensors.torch import save

    tensors = {key: value.contiguous() for key, value in payload["model_state_dict"].items()}
    with RunDirectory(directory) as output:
        partial = output.begin(resumed=False)
        for name, text in origin.texts.items():
            write_text(partial / name, text)
        write_atomically(partial / SAFETENSORS, lambda temporary: temporary.write_bytes(save(tensors)))
        write_normalization(partial / NORMALIZATION, normalization)
        save_torch(partial / BEST, payload)
        write_manifest(partial)
        output.publish()

"""Writing and reading the files of a checkpoint directory."""

from __future__ import annotations

import logging
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pydantic import ValidationError

from spinlock_fast import __version__
from spinlock_fast.checkpoints.host_copies import to_cpu
from spinlock_fast.checkpoints.integrity import RESUME, file_sha256, write_manifest
from spinlock_fast.checkpoints.model_card import model_card
from spinlock_fast.checkpoints.run_directory import (
    BEST,
    CARD,
    CONFIG,
    FILES,
    FINAL,
    HISTORY,
    METRICS,
    NORMALIZATION,
    SAFETENSORS,
    TENSORBOARD,
    check_integrity,
    find,
    unfinished,
)
from spinlock_fast.config.loading import dump_config, load_written_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.payload_checks import (
    checked_array,
    payload_errors,
    shape_difference,
    tensor_shapes,
    writer_note,
)
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line, shown
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.models.token_decoder import TOKEN_DECODER
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.output.atomic_files import write_atomically, write_json, write_text

__all__ = ["BEST", "CONFIG", "FILES", "FINAL", "HISTORY", "METRICS", "RESUME", "SAFETENSORS", "TENSORBOARD"]

log = logging.getLogger(__name__)

_REQUIRED_KEYS = (
    "model_state_dict",
    "model_config",
    "encoder_state_dicts",
    "feature_mask",
    "feature_cleaning",
    "normalization",
    "feature_names",
    "epoch",
)


class _ErrorKeepingFile:
    """A file for torch.save that keeps the OSError of a failed write, which torch replaces by a generic error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_torch(path: Path, payload: Mapping[str, Any]) -> None:
    """Writes a file for `torch.load(weights_only=True)`, atomically; raises OutputError.

    Equal payloads give identical files.
    """

    def write(temporary: Path) -> None:
        # Given a path, torch would store its name in the archive, and so change the file's hash.
        with open(temporary, "wb") as file:
            sink = _ErrorKeepingFile(file)
            try:
                torch.save(dict(payload), sink)  # type: ignore[arg-type]
            except RuntimeError:
                if sink.error is None:
                    raise
                raise sink.error from None

    write_atomically(path, write)


def load_torch(path: Path) -> dict[str, Any]:
    """Reads tensors and plain values from a file, onto the CPU, without running code from it.

    Raises:
        DataError: the file is missing, damaged, or holds other types than tensors and plain values.
    """
    try:
        return load_restricted(path)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path}: holds objects other than tensors and plain values; a checkpoint of the original project "
            "is read by `python -m spinlock_fast.convert`"
        ) from None


def load_restricted(path: Path) -> dict[str, Any]:
    """As `load_torch`, but raises pickle.UnpicklingError for types that may not be loaded."""
    try:
        if os.path.exists(path) and not zipfile.is_zipfile(path):
            raise DataError(f"{path}: not a checkpoint, or a damaged one (torch files are zip archives)")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{path}: cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(payload, dict):
        raise DataError(f"{path}: not a checkpoint")
    return payload


def load_payload(directory: str | Path) -> dict[str, Any]:
    """The contents of best_model.pt of a checkpoint directory (of final_model.pt if that is missing).

    Raises:
        DataError: there is no checkpoint, or a required entry is missing.
    """
    directory = Path(directory)
    path = _model_path(directory)
    if path is None:
        advice = f"; its run is unfinished; --resume {directory} continues it" if unfinished(directory) else ""
        raise DataError(f"{directory}: no {BEST} there; it is not the directory of a finished run{advice}")
    check_integrity(directory, path.name)
    payload = load_torch(path)
    missing = [key for key in _REQUIRED_KEYS if key not in payload]
    if missing:
        raise DataError(f"{path}: {missing[0]} is missing; it is not a checkpoint of this package")
    return payload


def model_from_payload(payload: Mapping[str, Any]) -> CategoricalHierarchicalVQVAE:
    """The model of a payload, in eval mode.

    Raises:
        DataError: settings or weights do not fit the model; names the version that wrote them.
    """
    settings, weights = payload["model_config"], payload["model_state_dict"]
    if not isinstance(settings, Mapping) or not isinstance(weights, Mapping):
        raise DataError(f"model_config and model_state_dict must be mappings{writer_note(payload)}")
    try:
        config = CategoricalVQVAEConfig(**settings)
    except (ValidationError, TypeError) as error:
        raise DataError(f"model_config: {_first_problem(error)}{writer_note(payload)}") from None
    with payload_errors(payload, "model_state_dict"):
        sizes = tensor_shapes(weights)
    # Checked before the model is built: a damaged configuration could cause an allocation of any size.
    if config.parameter_count() > sum(map(math.prod, sizes.values())):
        raise DataError(
            f"model_config describes {config.parameter_count():,} parameters, but model_state_dict holds "
            f"{sum(map(math.prod, sizes.values())):,} numbers{writer_note(payload)}"
        )
    model = CategoricalHierarchicalVQVAE(config)
    if any(name.startswith(TOKEN_DECODER) for name in sizes):
        linear = model.add_token_decoder().linear
        weights = {f"{TOKEN_DECODER}linear": linear, **weights}  # missing in files of earlier versions
        sizes = tensor_shapes(weights)
    if problem := shape_difference(sizes, {name: tuple(value.shape) for name, value in model.state_dict().items()}):
        raise DataError(f"model_state_dict: {problem}{writer_note(payload)}")
    with payload_errors(payload, "model_state_dict"):
        model.load_state_dict(weights)
    if "code_usage" in payload:  # missing in files of earlier versions
        with payload_errors(payload, "code_usage"):
            usage = checked_array(payload["code_usage"], "code_usage", "fiu", model.quantizer.usage.shape)
            model.quantizer.usage.copy_(torch.from_numpy(usage))
            model.quantizer.rows_seen.fill_(int(payload["code_usage_rows"]))
    return model.eval()


def _first_problem(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return one_line(error)
    problem = error.errors(include_url=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}, got {shown(problem['input'])}" if place else one_line(problem["msg"])


def load_checkpoint(directory: str | Path) -> CategoricalHierarchicalVQVAE:
    """The model of a checkpoint directory, in eval mode, on the CPU.

    Its quantizer's `utilization()` and `perplexity()` are those of the run's validation rows.

    Raises:
        DataError: there is no checkpoint, or it cannot be read.
    """
    return model_from_payload(load_payload(directory))


def load_run_config(directory: str | Path) -> RunConfig:
    """The settings of a checkpoint directory's run; raises ConfigError."""
    directory = Path(directory)
    try:
        check_integrity(directory, CONFIG)
    except (DataError, OSError):
        log.warning("%s was changed after the run that made it", find(directory, CONFIG))
    return load_written_config(find(directory, CONFIG))


def checkpoint_hash(directory: str | Path) -> str:
    """SHA-256 of the model file, in hexadecimal."""
    path = _model_path(Path(directory))
    if path is None:
        raise DataError(f"{directory}: no {BEST} there; it is not the directory of a finished run")
    return file_sha256(path)


def _model_path(directory: Path) -> Path | None:
    paths = (find(directory, name) for name in (BEST, FINAL))
    return next((path for path in paths if os.path.exists(path)), None)


def write_results(
    directory: Path,
    config: RunConfig,
    model: CategoricalHierarchicalVQVAE,
    parts: Mapping[str, Any],
    normalization: Mapping[str, np.ndarray[Any, Any]],
    metrics: Metrics,
    history: Mapping[str, Any],
    resumable: Mapping[str, Any],
) -> None:
    """Writes the files of a finished run, the manifest last.

    Args:
        parts: entries of the model files that do not come from the model.
        normalization: arrays of normalization_stats.npz.
        history: contents of training_history.json.
        resumable: the final state in the format of resume.pt, stored in final_model.pt.

    Raises:
        OutputError: a file cannot be written.
    """
    from safetensors.torch import save

    payload = model_payload(model, model.state_dict(), metrics["best_epoch"], parts)
    tensors = {key: value.contiguous() for key, value in payload["model_state_dict"].items()}
    write_text(directory / CONFIG, dump_config(config))
    write_atomically(directory / SAFETENSORS, lambda temporary: temporary.write_bytes(save(tensors)))
    write_normalization(directory / NORMALIZATION, normalization)
    write_json(directory / HISTORY, finite_or_null(history))
    final = resumable["run"]
    final_payload = model_payload(model, final["model_state_dict"], final["epoch"], parts)
    save_torch(directory / FINAL, {**final_payload, "run_state": resumable})
    write_text(directory / CARD, model_card(metrics, config))
    save_torch(directory / BEST, payload)
    write_json(directory / METRICS, finite_or_null(metrics))
    write_manifest(directory)


def finite_or_null(value: Any, name: str = "") -> Any:
    """A nested value with None for non-finite numbers, which JSON does not have; a warning names each."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        log.warning("%s is %s: written as null", name, value)
        return None
    return value


def model_payload(
    model: CategoricalHierarchicalVQVAE,
    state_dict: Mapping[str, torch.Tensor],
    epoch: int,
    parts: Mapping[str, Any],
) -> dict[str, Any]:
    """Contents of a model file."""
    return {
        "written_by": f"spinlock-fast {__version__}",
        "model_state_dict": {key: value.detach().cpu() for key, value in state_dict.items()},
        "model_config": model.config.model_dump(mode="json"),
        "epoch": epoch,
        **to_cpu(parts),
    }


def write_normalization(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Writes normalization_stats.npz, atomically; raises OutputError."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)

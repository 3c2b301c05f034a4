"""Schemas of metrics.json, training_history.json and vocabulary.json, as far as the dashboards read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spinlock_fast.config.loading import read_text_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line, shown

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


class _JsonFile(BaseModel):
    model_config = ConfigDict(extra="allow")  # undeclared entries are not read by any dashboard


class _Category(_JsonFile):
    name: str
    features: Count | None = None
    families: dict[str, Count] | None = None
    mse: Number | None = None
    partial_mse: Number | None = None
    utilization: list[Number] | None = None
    perplexity: list[Number] | None = None
    codes: list[Count] | None = None
    dims: list[Count] | None = None


class _MetricsFile(_JsonFile):
    quality: Number | None = None
    reconstruction_error: Number | None = None
    utilization: Number | None = None
    perplexity: Number | None = None
    perplexity_over_k: Number | None = None
    category_correlation_max: Number | None = None
    val_loss: Number | None = None
    topo_pre: Number | None = None
    topo_post: Number | None = None
    val_rows: Count | None = None
    samples: Count | None = None
    parameters: Count | None = None
    epochs: Count | None = None
    best_epoch: Count | None = None
    total_codes: Count | None = None
    active_codes: Count | None = None
    device: str | None = None
    backend: str | None = None
    seconds: dict[str, Number] = {}
    categories: list[_Category] = []


class _Epoch(_JsonFile):
    epoch: Count | None = None
    train_loss: Number | None = None
    resets: Count | None = None
    validation: dict[str, Number] | None = None


class _HistoryFile(_JsonFile):
    best_epoch: Count | None = None
    epochs: list[_Epoch] = []


class _StartedFrom(_JsonFile):
    name: str
    freeze: str = "none"


class _KeptCodes(_JsonFile):
    in_use: Count
    in_use_kept: Count


class _TokenChange(_JsonFile):
    missing: str | None = None
    equal_tokens: Number | None = None
    adjusted_mutual_information: Number | None = None
    error_before: Number | None = None
    error_after: Number | None = None


class _CodebookTokens(_JsonFile):
    died: list[Count]
    newly_used: list[Count]
    equal_tokens: Number


class _CodebookChange(_JsonFile):
    name: str
    codes: Count
    shift: list[Number]
    replaced: list[Count]
    new_data: _CodebookTokens
    old_data: _CodebookTokens | None = None

    @model_validator(mode="after")
    def _codes_exist(self) -> Self:
        if len(self.shift) != self.codes or not all(code < self.codes for code in self.replaced):
            raise ValueError(f"{self.name} has {self.codes} codes, and a shift for each")
        return self


class _VocabularyFile(_JsonFile):
    init_from: _StartedFrom
    codes: _KeptCodes
    new_data: _TokenChange
    old_data: _TokenChange
    codebooks: list[_CodebookChange] = []


def read_metrics(path: Path) -> dict[str, Any]:
    """The validated contents of metrics.json; empty without a file. Raises DataError with one line."""
    return _read(path, _MetricsFile)


def read_history(path: Path) -> dict[str, Any]:
    """The validated contents of training_history.json; empty without a file. Raises DataError with one line."""
    return _read(path, _HistoryFile)


def read_vocabulary(path: Path) -> dict[str, Any]:
    """The validated contents of vocabulary.json; empty without a file. Raises DataError with one line."""
    return _read(path, _VocabularyFile)


def _read(path: Path, kind: type[_JsonFile]) -> dict[str, Any]:
    if not os.path.exists(path):
        return {}
    try:
        contents = json.loads(read_text_file(path), parse_constant=_refuse_constant)
    except ConfigError as error:
        raise DataError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {one_line(error)}") from None
    if not isinstance(contents, dict):
        raise DataError(f"{path}: expected a JSON object")
    contents = {key: value for key, value in contents.items() if value is not None}
    try:
        kind.model_validate(contents)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path}: {place}: {problem['msg']}, got {shown(problem['input'])}") from None
    return contents


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

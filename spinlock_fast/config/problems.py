"""Validation errors of pydantic as messages that name the user's key, the value and the allowed values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spinlock_fast.config.schema import ENCODER_PARAMS, FamilyConfig, LevelConfig, RunConfig, Section
from spinlock_fast.messages import shown

_MAX_LINES = 20
_ABSENT = object()

_Key = tuple[str, ...]


def describe_problems(error: ValidationError, data: Mapping[str, Any], root: type[BaseModel] = RunConfig) -> list[str]:
    """One line for each wrong key of `data`, unknown keys first, at most 20 lines.

    Args:
        data: the settings that were validated.
        root: the model that they were validated against.
    """
    by_key: dict[_Key, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        key = _user_key(problem["loc"], data, problem["type"] == "missing")
        by_key.setdefault(key, []).append(problem)
    unknown = {key for key, problems in by_key.items() if problems[0]["type"] == "extra_forbidden"}
    lines = [
        _describe(key, problems[0], data, root)
        for key, problems in sorted(by_key.items(), key=lambda item: item[0] not in unknown)
        if not _is_consequence(key, problems[0], by_key, unknown)
    ]
    more = len(lines) - _MAX_LINES
    return lines if more <= 0 else [*lines[:_MAX_LINES], f"and {more} more wrong keys"]


def _is_consequence(
    key: _Key, problem: ErrorDetails, by_key: Mapping[_Key, list[ErrorDetails]], unknown: set[_Key]
) -> bool:
    """Whether another line explains a problem.

    A misspelt key leaves the correct one missing. Of a union such as `model.levels`, pydantic reports every member: the
    type error of the whole value says nothing where a problem inside of the value was found.
    """
    if problem["type"] == "missing":
        return any(other[:-1] == key[:-1] for other in unknown)
    return any(len(other) > len(key) > 0 and other[: len(key)] == key for other in by_key)


def _describe(key: _Key, problem: ErrorDetails, data: Mapping[str, Any], root: type[BaseModel]) -> str:
    name = ".".join(key)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{_suggestion(key, data, root)}"
    if problem["type"] == "missing":
        return f"{name}: required, not given"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:] if message.startswith(("Input", "Value")) else message
    if problem["type"] == "value_error" and not name:
        return message
    value = problem["input"]
    if problem["type"] == "value_error":
        return f"{name}: {message}" + ("" if isinstance(value, dict) else f", got {shown(value)}")
    nearest = ""
    if problem["type"] == "literal_error" and isinstance(value, str):
        allowed = re.findall(r"'([^']+)'", problem.get("ctx", {}).get("expected", ""))
        close = difflib.get_close_matches(value, allowed, 1)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
    return f"{name}: {message}, got {shown(value)} ({type(value).__name__}){nearest}"


def _user_key(loc: tuple[int | str, ...], data: Any, missing: bool) -> _Key:
    """The keys in `data` that lead to an error; pydantic adds the names of union members to its location."""
    keys: list[str] = []
    for part in loc:
        child = _child(data, part)
        if child is not _ABSENT:
            data = child
        elif not (missing and part == loc[-1]):
            continue
        keys.append(str(part))
    return tuple(keys)


def _child(data: Any, part: int | str) -> Any:
    if isinstance(data, Mapping):
        return data.get(part, _ABSENT)
    if isinstance(data, list) and isinstance(part, int) and part < len(data):
        return data[part]
    return _ABSENT


def _suggestion(key: _Key, data: Mapping[str, Any], root: type[BaseModel]) -> str:
    """The key that an unknown one probably stands for, else all keys of its section."""
    if elsewhere := [full for full in _full_names(root) if full.rpartition(".")[2] == key[-1]]:
        return f"; did you mean {' or '.join(map(repr, elsewhere))}?"
    allowed = list(_section_at(key[:-1], data, root).model_fields)
    close = difflib.get_close_matches(key[-1], allowed, 1)
    if close:
        return f"; did you mean {close[0]!r}?" + (" (--help-config lists all)" if root is RunConfig else "")
    return f"; allowed: {', '.join(allowed) or 'no keys at all'}"


def _full_names(root: type[BaseModel]) -> list[str]:
    """Every key of the file outside of `families`, with its section: "device", "training.num_epochs"."""
    names: list[str] = []
    for key, field in root.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            names += [f"{key}.{inner}" for inner in kind.model_fields]
        else:
            names.append(key)
    return names


def _section_at(key: _Key, data: Mapping[str, Any], root: type[BaseModel]) -> type[BaseModel]:
    """The model of the section at a key; `root` where it is none."""
    match key:
        case ["families", _]:
            return FamilyConfig
        case ["families", name, "encoder_params"]:
            return ENCODER_PARAMS[data["families"][name].get("encoder", "auto")]
        case ["model", "levels", *_]:
            return LevelConfig
        case [name] if isinstance(section := root.model_fields[name].annotation, type):
            return section
    return root

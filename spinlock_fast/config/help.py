"""The text of `--help-config`: every configuration key with its type, default and description."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.config.schema import ENCODER_PARAMS, INT32_MAX, RunConfig, Section
from spinlock_fast.messages import format_bytes

_SCALARS = {bool: "true or false", int: "integer", float: "number", str: "text", NoneType: "null"}
_COMPARISONS = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}


def help_text() -> str:
    """Every key with its type, default and description."""
    lines = _section_lines(RunConfig, "")
    for name, params in ENCODER_PARAMS.items():
        lines.append(f"\nfamilies.<name>.encoder_params of {name}:")
        lines += _section_lines(params, "  ") or ["  no keys"]
    return "\n".join(lines)


def _section_lines(section: type[BaseModel], indent: str) -> list[str]:
    lines: list[str] = []
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines += [f"\n{indent}{key}:", *_section_lines(kind, indent + "  ")]
        elif key == "families":
            lines += [f"\n{indent}{key}:  # {field.description}", f"{indent}  <name>:"]
            lines += _section_lines(get_args(kind)[1], indent + "    ")
        else:
            is_section = key == "encoder_params"
            type_text = "section" if is_section else _type_text(kind, field.metadata)
            default = "default {}" if is_section else _default(field)
            lines += [f"{indent}{key}  ({type_text}; {default})", f"{indent}    {field.description}"]
    return lines


def _default(field: FieldInfo) -> str:
    """The default as it is written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if _is_size(field.metadata):
        return f"default {format_bytes(value).replace(' ', '')}"
    return f"default {value if isinstance(value, str) else json.dumps(value)}"


def _is_size(constraints: Sequence[Any]) -> bool:
    return any(getattr(entry, "func", None) is parse_bytes for entry in constraints)


def _type_text(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """A type in words: "integer >= 1", "list of text", "adam | adamw"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0], [part for entry in args[1:] for part in getattr(entry, "metadata", [entry])])
    if _is_size(constraints):
        return "size such as 1.25GB or 512MiB"
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        return f"list of {_type_text(args[0])}"
    if origin is dict:
        return f"mapping from name to {_type_text(args[1])}"
    if origin is tuple:
        return f"list of {len(args)} {_type_text(args[0])}s"
    if args:  # a union
        return " or ".join(_type_text(arg, constraints if arg is not NoneType else ()) for arg in args)
    if issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}"
    limits = [
        f"{_COMPARISONS[type(constraint)]} {limit:g}"
        for constraint in constraints
        if type(constraint) in _COMPARISONS
        for limit in astuple(constraint)
        if limit not in (INT32_MAX, 2**63)  # the range of the integer type says nothing to a reader
    ]
    return f"{_SCALARS[annotation]} {' and '.join(limits)}".rstrip()

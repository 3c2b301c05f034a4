"""Reads the settings of a run from YAML, with error messages that name the key."""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from spinlock_fast.config.problems import describe_problems
from spinlock_fast.config.schema import RunConfig, Section, with_current_names
from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import one_line

# Limits of a file and of the values that its aliases expand to.
_MAX_BYTES = 16_000_000
_MAX_NODES = 1_000_000


class BoundedLoader(yaml.SafeLoader):
    """SafeLoader with a limit on the expansion of aliases.

    Raises ConstructorError for a value that Python cannot represent, such as month 13 or an integer of 5,000 digits.
    """

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_expansion(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, one_line(error), node.start_mark) from None


class _Loader(BoundedLoader):
    """A loader that reads 1e-8 as a number (YAML 1.2) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _check_expansion(root: yaml.Node) -> None:
    """Raises ConstructorError for a recursive alias, or where aliases expand to too many values."""
    sizes: dict[int, int] = {}  # id of a node -> number of values below it
    open_nodes: set[int] = set()
    stack = [root]
    while stack:
        node = stack[-1]
        children = _children(node)
        if id(node) in sizes:
            stack.pop()
        elif id(node) in open_nodes:
            stack.pop()
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > _MAX_NODES:
                raise yaml.constructor.ConstructorError(
                    None, None, f"aliases expand to more than {_MAX_NODES:,} values", node.start_mark
                )
        else:
            open_nodes.add(id(node))
            if any(id(child) in open_nodes for child in children):
                raise yaml.constructor.ConstructorError(
                    None, None, "an alias refers to a value that contains it", node.start_mark
                )
            stack += children


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which `_Loader` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, loader: type[BoundedLoader] = _Loader) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise yaml.YAMLError("values are nested too deeply") from None


def read_text_file(path: Path, what: str = "file") -> str:
    """Reads a settings file.

    Raises:
        ConfigError: the file (called `what` in messages) does not exist, is not regular, is too large, or not UTF-8.
    """
    try:
        mode = path.stat()
        if stat.S_ISDIR(mode.st_mode):
            raise ConfigError(f"{path}: is a directory, not a file")
        if not stat.S_ISREG(mode.st_mode):
            raise ConfigError(f"{path}: is not a regular file")
        if mode.st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: has {mode.st_size:,} bytes; at most {_MAX_BYTES:,} are read")
        return path.read_text(encoding="utf-8")
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{one_line(path)}: is not a text file; expected a {what} in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else one_line(error)
        raise ConfigError(f"{one_line(path)}: cannot be read: {reason}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, none for an empty file; raises ConfigError with one line."""
    text = read_text_file(path, "configuration file")
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections and keys, got a {type(data).__name__}")
    return data


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides.

    Args:
        path: YAML file with the sections of `RunConfig`.
        overrides: texts such as "training.num_epochs=5" (the right side is YAML), or a mapping
            from dotted key to value.

    Returns:
        The validated settings; `output_dir` defaults to checkpoints/<name of the file>.

    Raises:
        ConfigError: one line per wrong key, with the given and the allowed values.
    """
    path = Path(path)
    data = read_yaml(path)
    # A section without keys is null in YAML.
    data = {key: {} if value is None and _is_section(key) else value for key, value in data.items()}
    _override(data, parse_overrides(overrides))
    config = check_config(data, source=str(path))
    if config.output_dir is None:
        config = config.model_copy(update={"output_dir": f"checkpoints/{path.stem}"})
    return config


def make_config(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunConfig:
    """`RunConfig` from plain sections and overrides by dotted key; raises ConfigError."""
    settings = copy.deepcopy(dict(data))
    for key, value in overrides.items():
        _set_dotted(settings, key, value)
    return check_config(settings, source="settings")


def setting_key(name: str) -> str:
    """The dotted key of a setting: "training.num_epochs" of itself, of training__num_epochs and of num_epochs.

    A name that is in no section, or in several, is returned as it is.
    """
    if "__" in name or "." in name or name in RunConfig.model_fields:
        return name.replace("__", ".")
    owners = [key for key in RunConfig.model_fields if _is_section(key) and name in _section_fields(key)]
    return f"{owners[0]}.{name}" if len(owners) == 1 else name


def load_written_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config` of a file written by a run; nan_fill is zero in files of versions without this setting."""
    # A run writes every setting, so that a missing one identifies an earlier version.
    older = path.is_file() and not re.search(r"^ +nan_fill:", path.read_text("utf-8", "replace"), re.MULTILINE)
    return load_config(path, [*(["feature_cleaning.nan_fill=zero"] if older else []), *overrides])


def _is_section(key: str) -> bool:
    field = RunConfig.model_fields.get(key)
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _section_fields(key: str) -> Collection[str]:
    section = RunConfig.model_fields[key].annotation
    return section.model_fields if isinstance(section, type) and issubclass(section, Section) else ()


def check_config(data: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """`RunConfig` from plain data; raises ConfigError with one line per wrong key."""
    try:
        data = resolve_aliases(data)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(*(f"{source}: {problem}" for problem in describe_problems(error, data))) from None


def resolve_aliases(data: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings with aliases and old names replaced by the names of `RunConfig`; see also `with_current_names`.

    training.checkpoint_dir stands for output_dir, training.category_mapping_file for training.category_assignment; null
    stands for a missing key.

    Raises:
        ValueError: output_dir and its alias differ.
    """
    settings, training = dict(data), data.get("training")
    if not isinstance(training, Mapping):
        return settings
    training = settings["training"] = with_current_names(training)
    directory, mapping = (training.pop(alias, None) for alias in ("checkpoint_dir", "category_mapping_file"))
    if mapping is not None:
        training["category_assignment"] = mapping
    if directory is not None:
        if settings.get("output_dir") not in (None, directory):
            output = settings["output_dir"]
            raise ValueError(f"output_dir ({output}) and training.checkpoint_dir ({directory}) are the same setting")
        settings["output_dir"] = directory
    return settings


def dump_config(config: RunConfig) -> str:
    """YAML text of the settings, which `load_config` reads back unchanged."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(config: RunConfig, overrides: Sequence[str] | Mapping[str, Any]) -> RunConfig:
    """The settings with overrides; raises ConfigError."""
    data = config.model_dump(mode="json", exclude_unset=True)
    _override(data, parse_overrides(overrides))
    return check_config(data)


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(key, value) of texts such as "training.num_epochs=5", whose right side is YAML; raises ConfigError."""
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {text}: expected key=value, such as training.num_epochs=5")
        try:
            # A leading * starts a glob here, not a YAML alias, and @ a list of paths, not an error.
            pairs.append((key.strip(), value if value.lstrip().startswith(("*", "@")) else parse_yaml(value)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: not valid YAML: {one_line(error)}") from None
    return pairs


def _override(data: dict[str, Any], pairs: Sequence[tuple[str, Any]]) -> None:
    """Sets values by dotted key; keys of one family change the default families where none are given."""
    if "families" not in data and any(key.startswith("families.") for key, _ in pairs):
        data["families"] = RunConfig().model_dump(mode="json")["families"]
    for key, value in pairs:
        _set_dotted(data, key, value)


def _set_dotted(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {parent} holds a value, not a section")
        data = child
    data[last] = value

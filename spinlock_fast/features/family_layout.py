"""Finds the feature families of an HDF5 file, and chooses an encoder by the shape of their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import h5py

from spinlock_fast.config.families import DEFAULT_DATASETS, FamilyConfig, MLPEncoderParams
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, find_dataset, get_dataset
from spinlock_fast.data.input_files import find_files, open_file, reporting_damage
from spinlock_fast.errors import ConfigError, DataError

GROUP = "features"
_SUFFIXES = ("aggregated/features", "features")  # of the dataset in the group of a family, by preference
_PARAMETERS = "architecture"  # holds the parameters of the simulations; `families: auto` leaves it out
_WIDEST = 1024  # values that an IdentityEncoder keeps as columns
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def resolve_families(config: RunConfig) -> RunConfig:
    """The settings with dataset and encoder of every family, as far as they are not given.

    `families: auto` becomes the families of the file's group `features`, without `architecture`, in which the
    parameters of simulations are stored. The dataset of a family is `features/NAME`, or in that group
    `aggregated/features`, `features`, or the only 2-D or 3-D dataset of numbers.

    Raises:
        ConfigError: dataset_path is not set.
        DataError: a family has no dataset in the first file, or several; names those that it has.
    """
    if config.families and all(
        family.encoder != "auto" and (family.dataset or name in DEFAULT_DATASETS)
        for name, family in config.families.items()
    ):
        return config
    if config.dataset_path is None:
        raise ConfigError("dataset_path: required, not given; name an HDF5 file, a glob or a list of files")
    file = find_files(config.dataset_path)[0]
    policy = ExternalFilePolicy(config.data.allow_external)
    with open_file(file) as handle:
        families = config.families or {name: FamilyConfig() for name in _family_names(file, handle)}
        resolved = {}
        for name, family in families.items():
            path = family.dataset or _dataset_path(file, handle, name, policy)
            with reporting_damage(file, path):
                shape = get_dataset(file, handle, path, policy).shape
            if shape is None or len(shape) not in (2, 3):
                raise DataError(f"{file}: {path}: family {name!r} needs a 2-D or 3-D dataset, got shape {shape}")
            resolved[name] = with_encoder(family, shape[1:], path)
    return with_families(config, resolved)


def with_families(config: RunConfig, families: dict[str, FamilyConfig]) -> RunConfig:
    """The settings with other families; raises ConfigError where training.isolated_families names none of them."""
    for name in config.training.isolated_families:
        if name not in families:
            raise ConfigError(f"training.isolated_families names {name!r}, which is none of {', '.join(families)}")
    return config.model_copy(update={"families": families})


def with_encoder(family: FamilyConfig, row_shape: Sequence[int], dataset: str) -> FamilyConfig:
    """The family with its dataset, and with an encoder for rows of a shape where its encoder is auto.

    StatisticsEncoder for time series (T, D), IdentityEncoder for up to 1,024 values, else MLPEncoder on standardised
    values.
    """
    if family.encoder != "auto":
        return family.model_copy(update={"dataset": dataset})
    if len(row_shape) == 2 and row_shape[0] > 1:
        return FamilyConfig(encoder="StatisticsEncoder", dataset=dataset, standardize=family.standardize)
    if math.prod(row_shape) <= _WIDEST:
        return FamilyConfig(encoder="IdentityEncoder", dataset=dataset, standardize=family.standardize)
    return FamilyConfig(encoder="MLPEncoder", encoder_params=MLPEncoderParams(), dataset=dataset, standardize=True)


def _family_names(file: Path, handle: h5py.File) -> list[str]:
    """Names in the group `features` that hold a family; raises DataError if there are none."""
    with reporting_damage(file, GROUP):
        group = handle.get(GROUP)
        names = list(group) if isinstance(group, h5py.Group) else []
        found = [name for name in names if _candidates(handle, name)]
        if not found:
            raise DataError(f"{file}: families: auto finds none in the group {GROUP}; {_advice(handle)}")
    unsafe = next((name for name in found if not _SAFE_NAME.fullmatch(name)), None)
    if unsafe is not None:
        raise DataError(f"{file}: {GROUP}/{unsafe}: names of families have letters, digits, '_', '.', '-'")
    return [name for name in found if name != _PARAMETERS] or found


def _advice(handle: h5py.File) -> str:
    """What to do with a file without a family in the group `features`."""
    holds = [path for path in _matrices(handle, "") if not path.startswith("metadata/")][:6]
    if holds:
        return f"families.NAME.dataset names one of {', '.join(holds)}"
    others: list[str] = []
    handle.visititems(lambda name, item: others.append(name) if isinstance(item, h5py.Dataset) else None)
    found = ", ".join(f"{name} is {handle[name].dtype} {list(handle[name].shape or ())}" for name in others[:3])
    return f"a family is a dataset features/NAME of real numbers [N, D] or [N, T, D]{f', but {found}' if found else ''}"


def _dataset_path(file: Path, handle: h5py.File, name: str, policy: ExternalFilePolicy) -> str:
    """Path of the dataset of a family without `dataset`; raises DataError."""
    default = DEFAULT_DATASETS.get(name)
    if default is not None and find_dataset(file, handle, default, policy) is not None:
        return default
    with reporting_damage(file, f"{GROUP}/{name}"):
        found = _candidates(handle, name)
    if len(found) == 1:
        return found[0]
    where = f"{file}: family {name!r}: no `dataset` given, and "
    if found:
        raise DataError(f"{where}{GROUP}/{name} has several: {', '.join(found[:6])}")
    try:
        get_dataset(file, handle, default or f"{GROUP}/{name}", policy)  # raises with the nearest path
    except DataError as error:
        raise DataError(f"{error}; families.{name}.dataset names another") from None
    raise DataError(f"{where}{GROUP}/{name} is not a 2-D or 3-D dataset of numbers")


def _candidates(handle: h5py.File, name: str) -> list[str]:
    """Paths of datasets that may hold a family: one of the usual paths, else all in the group."""
    path = f"{GROUP}/{name}"
    node = handle.get(path)
    if isinstance(node, h5py.Dataset):
        return [path] if _is_matrix(node) else []
    if not isinstance(node, h5py.Group):
        return []
    usual = [f"{path}/{suffix}" for suffix in _SUFFIXES if _is_matrix(handle.get(f"{path}/{suffix}"))]
    return usual[:1] or _matrices(handle, path)


def _matrices(handle: h5py.File, group: str) -> list[str]:
    """Paths of all 2-D and 3-D datasets of numbers in a group."""
    paths: list[str] = []
    node = handle[group] if group else handle
    node.visititems(lambda name, item: paths.append(f"{group}/{name}".lstrip("/")) if _is_matrix(item) else None)
    return paths


def _is_matrix(node: object) -> bool:
    return (
        isinstance(node, h5py.Dataset)
        and node.shape is not None
        and len(node.shape) in (2, 3)
        and node.dtype.kind in "fiub"
    )

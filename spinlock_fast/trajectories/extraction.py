"""Files of trajectories -> the HDF5 file of features that `train`, `tokenize`, `evaluate` and `analyze` read.

Blocks of described samples are kept beside the output, in OUTPUT.partial/, until all are there: an interrupted
extraction goes on with the next block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.data.window_sizes import available_cpus
from spinlock_fast.descriptors.describe import Describer, aggregate
from spinlock_fast.descriptors.field_grid import GENERATOR
from spinlock_fast.descriptors.names import Groups, changes_with
from spinlock_fast.errors import ConfigError, DataError, Interrupted, OutputError
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import check_regular, check_writable, replacing, write_json
from spinlock_fast.output.hdf5_files import replacing_hdf5
from spinlock_fast.output.locks import locked
from spinlock_fast.trajectories.layouts import open_trajectories
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import TrajectorySet

BLOCK = 32  # samples that are kept at a time
_CHUNK_ROWS = 8
_FORMAT = 1
_PER_TRAJECTORY = "features/summary/per_trajectory/features"
_SETTINGS = "settings.json"

Progress = Callable[[int, int], None]


def extract(
    paths: str | list[str],
    output: Path,
    layout: str = "auto",
    options: Options | None = None,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    opened: Callable[[TrajectorySet], None] = lambda trajectories: None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Describes every trajectory of some files; memory does not grow with their number.

    Args:
        paths: a file, a glob, or a list of those.
        output: the HDF5 file of features.
        layout: see `open_trajectories`.
        options: overrides of the file metadata.
        shard: (i, n): the i-th (from 0) of n consecutive parts of the samples.
        device: where descriptors are computed.
        overwrite: replace the output, or an unfinished extraction.
        resume: keep the blocks of an unfinished extraction of the same files and settings.
        opened: called with the trajectories once their headers are read.
        progress: called with the number of samples that are done, and of all.

    Raises:
        ConfigError: an impossible setting, an empty shard, or a resumed extraction of other files or settings.
        DataError: files cannot be read or do not fit together.
        OutputError: the output exists or cannot be written.
        Interrupted: a signal; finished blocks are kept for `resume`.
    """
    options = options or Options()
    check_regular(output)
    partial = output.with_name(output.name + ".partial")
    if not overwrite:
        if os.path.exists(output) and not resume:
            raise OutputError(f"{output}: exists; --overwrite replaces it")
        if os.path.exists(partial) and not resume:
            raise OutputError(
                f"{partial}: an unfinished extraction is there; --resume goes on with it, --overwrite starts again"
            )
    trajectories = open_trajectories(paths, layout, options)
    if os.path.exists(output) and any(os.path.samefile(output, file.path) for file in trajectories.files):
        raise OutputError(f"{output}: is one of the files to read")
    opened(trajectories)
    start, stop = (trajectories.samples * i // shard[1] for i in (shard[0], shard[0] + 1))
    if start == stop:
        raise ConfigError(f"--shard {shard[0]}/{shard[1]}: leaves none of {trajectories.samples} trajectories")
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = _settings(trajectories, options, (start, stop))
    with locked(output):
        if overwrite:
            _remove_blocks(partial)
        _begin(partial, settings)
        shape = trajectories.shape
        describer = Describer(shape.grid, len(shape.channels), shape.time_step, device)
        _describe_blocks(trajectories, describer, partial, (start, stop), progress)
        _write(trajectories, describer, partial, (start, stop), output)
        _remove_blocks(partial)
    return output


def _settings(trajectories: TrajectorySet, options: Options, span: tuple[int, int]) -> dict[str, Any]:
    """What the described samples depend on."""
    files = []
    for file in trajectories.files:
        status = file.path.stat()
        files.append([str(file.path.resolve()), status.st_size, status.st_mtime_ns])
    chosen = {name: value for name, value in asdict(options).items() if name != "memory_budget"}
    digest = hashlib.sha256(json.dumps(files).encode(errors="replace")).hexdigest()
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({"format": _FORMAT, "layout": trajectories.layout, "files": digest, "span": span, **chosen})
    )


def _begin(partial: Path, settings: dict[str, Any]) -> None:
    """Makes the directory of blocks, or checks that it is of the same extraction."""
    path = partial / _SETTINGS
    if os.path.exists(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if found != settings:
            name = next(
                (name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]), ""
            )
            what = "files have changed" if name == "files" else f"{name} differs"
            raise ConfigError(f"{partial}: made with other settings: {what}; --overwrite starts again")
        return
    _remove_blocks(partial)
    try:
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{partial}: cannot be made: {error.strerror}") from None
    write_json(path, settings)


def _remove_blocks(partial: Path) -> None:
    """Removes a directory of blocks; raises OutputError, and removes nothing, if it holds anything else."""
    if not os.path.lexists(partial):
        return
    names = os.listdir(partial) if partial.is_dir() and not partial.is_symlink() else [""]
    # Temporary files of a killed process have the name of their target, with a dot before it.
    ours = re.compile(rf"{re.escape(_SETTINGS)}|\d+\.npz|\.({re.escape(_SETTINGS)}|\d+\.npz)\..*")
    if others := [name for name in names if not (ours.fullmatch(name) and (partial / name).is_file())]:
        shown = printable(others[0]) or "a file"
        raise OutputError(f"{partial}: is not a directory of an extraction ({shown}); remove it")
    try:
        for name in names:
            os.unlink(partial / name)
        partial.rmdir()
    except OSError as error:
        raise OutputError(f"{partial}: cannot be removed: {error.strerror}") from None


def _block_path(partial: Path, first: int) -> Path:
    return partial / f"{first:012d}.npz"


def _describe_blocks(
    trajectories: TrajectorySet, describer: Describer, partial: Path, span: tuple[int, int], progress: Progress
) -> None:
    start, stop = span
    firsts = [first for first in range(start, stop, BLOCK) if not _block_path(partial, first).exists()]
    done = (stop - start) - sum(min(BLOCK, stop - first) for first in firsts)
    try:
        for low, high in _runs(firsts, stop):
            described = _described(trajectories.read(low, high), describer)
            for first in range(low, high, BLOCK):
                states, each, diverged = [], [], []
                for _ in range(first, min(first + BLOCK, high)):
                    state, one = next(described)
                    states.append(state)
                    each.append(one)
                    diverged.append(bool(np.isnan(state).all()))
                    done += 1
                    progress(done, stop - start)
                with replacing(_block_path(partial, first)) as temporary, open(temporary, "wb") as file:
                    np.savez(file, temporal=np.stack(states), trajectories=np.stack(each), diverged=np.array(diverged))
    except Interrupted as stopped:
        kept = sum(1 for _ in partial.glob("*.npz")) * BLOCK
        message = f"stopped; about {min(kept, stop - start)} of {stop - start} trajectories are kept, --resume goes on"
        raise Interrupted(message, stopped.exit_status - 128) from None


def _described(
    samples: Iterator[NDArray[np.floating]], describer: Describer
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Descriptors of each sample, in order. On a CPU several samples at a time, each in one thread."""

    def describe(sample: NDArray[np.floating]) -> tuple[NDArray[Any], NDArray[Any]]:
        state, trajectories = describer(torch.from_numpy(sample).to(describer.device))
        return state.cpu().numpy(), trajectories.cpu().numpy()

    if describer.device.type != "cpu":
        yield from map(describe, samples)
        return
    workers = available_cpus()
    with (
        single_thread(describer.device),
        ThreadPoolExecutor(workers, "describe", initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        waiting: deque[Future[tuple[NDArray[Any], NDArray[Any]]]] = deque()
        for sample in samples:
            waiting.append(pool.submit(describe, sample))
            if len(waiting) > workers:  # one more than are described, so that memory does not grow
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _runs(firsts: list[int], stop: int) -> Iterator[tuple[int, int]]:
    """Consecutive blocks as ranges of samples, so that each is read in one pass."""
    i = 0
    while i < len(firsts):
        j = i
        while j + 1 < len(firsts) and firsts[j + 1] == firsts[j] + BLOCK:
            j += 1
        yield firsts[i], min(firsts[j] + BLOCK, stop)
        i = j + 1


def _write(
    trajectories: TrajectorySet, describer: Describer, partial: Path, span: tuple[int, int], output: Path
) -> None:
    start, stop = span
    N, shape = stop - start, trajectories.shape
    names = {
        "features/temporal": describer.state_names,
        "features/summary/per_trajectory": describer.trajectory_names,
        "features/summary/aggregated": describer.summary_names(shape.realizations),
    }
    rows = {
        DEFAULT_DATASETS["temporal"]: (shape.steps, len(describer.state_names)),
        _PER_TRAJECTORY: (shape.realizations, len(describer.trajectory_names)),
        DEFAULT_DATASETS["summary"]: (len(names["features/summary/aggregated"]),),
    }
    chunk = min(_CHUNK_ROWS, N)
    with replacing_hdf5(output) as writer:
        file = writer.file
        for path, row in rows.items():
            file.create_dataset(path, (N, *row), "f4", chunks=(chunk, *row), compression="gzip", shuffle=True)
        file.create_dataset("metadata/diverged", (N,), "u1")
        for first in range(start, stop, BLOCK):
            with _block(_block_path(partial, first)) as block:
                each = block["trajectories"]
                values = {
                    DEFAULT_DATASETS["temporal"]: block["temporal"],
                    _PER_TRAJECTORY: each,
                    DEFAULT_DATASETS["summary"]: aggregate(torch.from_numpy(each)).numpy(),
                    "metadata/diverged": block["diverged"].astype(np.uint8),
                }
                for path, value in values.items():
                    writer.write(file[path], first - start, value)
        origins = trajectories.origins[start:stop]
        texts = np.array([path for path, _ in origins], dtype=object)
        file.create_dataset("metadata/source_files", data=texts, dtype=h5py.string_dtype())
        file.create_dataset("metadata/source_rows", data=np.array([i for _, i in origins], np.int64))
        _write_parameters(trajectories, file, span)
        for path, columns in names.items():
            file[path].attrs["feature_names"] = columns
        for family, groups in (("temporal", describer.names.state), ("summary", describer.names.trajectory)):
            file["features"][family].attrs["feature_registry"] = json.dumps(_registry(groups))
        grid = shape.grid
        file.attrs.update(
            {
                "generator": GENERATOR,
                "layout": trajectories.layout,
                "channels": list(shape.channels),
                "extents": list(grid.extents),
                "spacing": list(grid.spacing),
                "periodic": list(grid.periodic),
                "time_step": shape.time_step,
                "first_sample": start,
            }
        )


def _write_parameters(trajectories: TrajectorySet, file: h5py.File, span: tuple[int, int]) -> None:
    """parameters/params in their units, and the architecture family, scaled to [0, 1] over all samples of the files."""
    parameters = trajectories.parameters
    if not parameters:
        return
    values = np.stack(list(parameters.values()), 1)
    low, high = values.min(0), values.max(0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    for path, rows in (("parameters/params", values), (DEFAULT_DATASETS["architecture"], scaled.astype(np.float32))):
        dataset = file.create_dataset(path, data=rows[slice(*span)])
        dataset.parent.attrs["feature_names"] = list(parameters)
        dataset.attrs["low"], dataset.attrs["high"] = low, high


def _registry(groups: Groups) -> dict[str, dict[str, dict[str, Any]]]:
    """Group -> descriptor -> column, unit, formula, source and what it changes with."""
    column, out = 0, {}
    for group, features in groups.items():
        out[group] = {
            feature.name: {
                "column": column + i,
                **dict(zip(feature._fields[1:], feature[1:], strict=True)),
                "changes_with": list(changes_with(feature)),
            }
            for i, feature in enumerate(features)
        }
        column += len(features)
    return out


@contextmanager
def _block(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            yield {name: found[name] for name in ("temporal", "trajectories", "diverged")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        os.unlink(path)
        raise DataError(f"{path}: is damaged ({' '.join(str(error).split())}); --resume describes it again") from None

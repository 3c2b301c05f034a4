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
from contextlib import ExitStack
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
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import ConfigError, DataError, Interrupted, OutputError
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import check_regular, check_writable, replacing, write_json
from spinlock_fast.output.hdf5_files import replacing_hdf5
from spinlock_fast.output.locks import locked
from spinlock_fast.trajectories.layouts import open_trajectories
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import TrajectorySet
from spinlock_fast.trajectories.zarr_arrays import store_state

BLOCK = 32  # most samples that are kept at a time
_BLOCKS_OF_A_RANK = 4  # at least, so that all ranks end at about the same time
_CHUNK_ROWS = 8
_FORMAT = 1
_PER_TRAJECTORY = "features/summary/per_trajectory/features"
_INITIAL = "inputs/fields"
_SETTINGS = "settings.json"

_Described = tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]  # of each state, of trajectories, the first state

Progress = Callable[[int, int], None]
Block = tuple[int, int]  # first sample, and the one after the last


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
    ranks: Ranks = SINGLE,
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
        ranks: if there are several, each describes a share of the blocks, and rank 0 writes the output. Their number
            may differ from that of an extraction to resume.

    Raises:
        ConfigError: an impossible setting, an empty shard, or a resumed extraction of other files or settings.
        DataError: files cannot be read or do not fit together.
        OutputError: the output exists or cannot be written.
        Interrupted: a signal; finished blocks are kept for `resume`.
    """
    options = options or Options()
    partial = output.with_name(output.name + ".partial")
    if ranks.is_main:
        _check_output(output, partial, overwrite, resume)
    trajectories = open_trajectories(paths, layout, options)
    if ranks.is_main and os.path.exists(output):
        read = [str(file.path) for file in trajectories.files] + [options.parameters or ""]
        if any(os.path.samefile(output, path) for path in read if os.path.exists(path)):
            raise OutputError(f"{output}: is one of the files to read")
    opened(trajectories)
    start, stop = (trajectories.samples * i // shard[1] for i in (shard[0], shard[0] + 1))
    if start == stop:
        raise ConfigError(f"--shard {shard[0]}/{shard[1]}: leaves none of {trajectories.samples} trajectories")
    shape = trajectories.shape
    describer = Describer(shape.grid, len(shape.channels), shape.time_step, device)
    with ExitStack() as stack:
        if ranks.is_main:
            check_writable(output.parent)
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(output))
            if overwrite:
                _remove_blocks(partial)
            block = _begin(
                partial, _settings(trajectories, options, (start, stop)), _block_samples(stop - start, ranks)
            )
        block = ranks.broadcast_object(block if ranks.is_main else 0)
        blocks = [(first, min(first + block, stop)) for first in range(start, stop, block)]
        missing = ranks.broadcast_object(_missing(partial, blocks) if ranks.is_main else [])
        if not os.path.exists(partial / _SETTINGS):
            raise OutputError(f"{partial}: rank {ranks.rank} does not see what rank 0 wrote; use a shared directory")
        kept = options.initial_fields
        _describe_blocks(trajectories, describer, partial, missing, stop - start, kept, ranks, progress)
        ranks.barrier()
        if ranks.is_main:
            if ranks.size > 1:
                progress(stop - start, stop - start)
            _write(trajectories, describer, partial, blocks, output)
            _remove_blocks(partial)
    ranks.barrier()  # the file is complete
    return output


def _check_output(output: Path, partial: Path, overwrite: bool, resume: bool) -> None:
    check_regular(output)
    if overwrite or resume:
        return
    if os.path.exists(output):
        raise OutputError(f"{output}: exists; --overwrite replaces it")
    if os.path.exists(partial):
        raise OutputError(
            f"{partial}: an unfinished extraction is there; --resume goes on with it, --overwrite starts again"
        )


def _settings(trajectories: TrajectorySet, options: Options, span: tuple[int, int]) -> dict[str, Any]:
    """What the described samples depend on."""
    files = []
    for file in trajectories.files:
        files.append([str(file.path.resolve()), *store_state(file.path)])
    if options.parameters is not None and os.path.isfile(options.parameters):
        files.append([str(Path(options.parameters).resolve()), *store_state(Path(options.parameters))])
    chosen = {name: value for name, value in asdict(options).items() if name != "memory_budget"}
    digest = hashlib.sha256(json.dumps(files).encode(errors="replace")).hexdigest()
    return json.loads(  # type: ignore[no-any-return]
        json.dumps({"format": _FORMAT, "layout": trajectories.layout, "files": digest, "span": span, **chosen})
    )


def _block_samples(count: int, ranks: Ranks) -> int:
    """Samples of a block in a new extraction of `count` samples: BLOCK, or BLOCK / 2^i if ranks would have too few."""
    block = BLOCK
    while ranks.size > 1 and block % 2 == 0 and block * ranks.size * _BLOCKS_OF_A_RANK > count:
        block //= 2
    return block


def _begin(partial: Path, settings: dict[str, Any], block: int) -> int:
    """Makes the directory of blocks, or checks that it is of the same extraction; returns the samples of a block."""
    path = partial / _SETTINGS
    if os.path.exists(path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        existing = found.pop("block", BLOCK) if isinstance(found, dict) else 0
        if found != settings or type(existing) is not int or existing < 1:
            name = next(
                (name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]), "block"
            )
            what = "files have changed" if name == "files" else f"{name} differs"
            raise ConfigError(f"{partial}: made with other settings: {what}; --overwrite starts again")
        return existing
    _remove_blocks(partial)
    try:
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{partial}: cannot be made: {error.strerror}") from None
    write_json(path, {**settings, "block": block})
    return block


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


def _missing(partial: Path, blocks: list[Block]) -> list[Block]:
    """The blocks that are not there."""
    names = set(os.listdir(partial))  # a test of each path could be remembered as missing by a network file system
    return [block for block in blocks if _block_path(partial, block[0]).name not in names]


def _describe_blocks(
    trajectories: TrajectorySet,
    describer: Describer,
    partial: Path,
    missing: list[Block],
    count: int,
    keep_initial: bool,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Describes this rank's share of the missing blocks; `progress` assumes that the other ranks are as fast."""
    done = count - sum(last - first for first, last in missing)
    workers = max(1, available_cpus() // ranks.local_size)
    try:
        for blocks in _runs(missing[ranks.share(len(missing))]):
            described = _described(trajectories.read(blocks[0][0], blocks[-1][1]), describer, workers)
            for first, last in blocks:
                states, each, diverged, initial = [], [], [], []
                for _ in range(first, last):
                    state, one, start = next(described)
                    states.append(state)
                    each.append(one)
                    initial.append(start)
                    diverged.append(bool(np.isnan(state).all()))
                    done += ranks.size
                    progress(done if ranks.size == 1 else min(done, count - 1), count)
                with replacing(_block_path(partial, first)) as temporary, open(temporary, "wb") as file:
                    arrays: dict[str, Any] = {"temporal": np.stack(states), "trajectories": np.stack(each)}
                    if keep_initial:
                        arrays["initial"] = np.stack(initial)
                    np.savez(file, diverged=np.array(diverged), **arrays)
    except Interrupted as stopped:
        left = _missing(partial, missing)
        kept = count - sum(last - first for first, last in left)
        message = f"stopped; {kept} of {count} trajectories are kept, --resume goes on"
        raise Interrupted(message, stopped.exit_status - 128) from None


def _described(samples: Iterator[NDArray[np.floating]], describer: Describer, workers: int) -> Iterator[_Described]:
    """Descriptors and first state of each sample, in order. On a CPU `workers` samples at a time, a thread each."""

    def describe(sample: NDArray[np.floating]) -> _Described:
        state, trajectories = describer(torch.from_numpy(sample).to(describer.device))
        with np.errstate(over="ignore"):  # of a trajectory that is reported as diverged
            initial = sample[0, 0].astype(np.float32)
        return state.cpu().numpy(), trajectories.cpu().numpy(), initial

    if describer.device.type != "cpu":
        yield from map(describe, samples)
        return
    with (
        single_thread(describer.device),
        ThreadPoolExecutor(workers, "describe", initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        waiting: deque[Future[_Described]] = deque()
        for sample in samples:
            waiting.append(pool.submit(describe, sample))
            if len(waiting) > workers:  # one more than are described, so that memory does not grow
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _runs(blocks: list[Block]) -> Iterator[list[Block]]:
    """Runs of consecutive blocks, so that each is read in one pass."""
    i = 0
    while i < len(blocks):
        j = i + 1
        while j < len(blocks) and blocks[j][0] == blocks[j - 1][1]:
            j += 1
        yield blocks[i:j]
        i = j


def _write(trajectories: TrajectorySet, describer: Describer, partial: Path, blocks: list[Block], output: Path) -> None:
    start, stop = span = blocks[0][0], blocks[-1][1]
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
        at_once = max(1, BLOCK // (blocks[0][1] - start))  # so that chunks are compressed once
        for i in range(0, len(blocks), at_once):
            group = _read_blocks([_block_path(partial, first) for first, _ in blocks[i : i + at_once]])
            each = group["trajectories"]
            values = {
                DEFAULT_DATASETS["temporal"]: group["temporal"],
                _PER_TRAJECTORY: each,
                DEFAULT_DATASETS["summary"]: aggregate(torch.from_numpy(each)).numpy(),
                "metadata/diverged": group["diverged"].astype(np.uint8),
            }
            if "initial" in group:
                values[_INITIAL] = group["initial"]
                if _INITIAL not in file:
                    row = group["initial"].shape[1:]
                    file.create_dataset(_INITIAL, (N, *row), "f4", chunks=(1, *row), compression="gzip")
            for path, value in values.items():
                writer.write(file[path], blocks[i][0] - start, value)
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


def _read_blocks(paths: list[Path]) -> dict[str, NDArray[Any]]:
    """The arrays of consecutive blocks; a damaged one is removed."""
    blocks = []
    for path in paths:
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                blocks.append({name: found[name] for name in {"temporal", "trajectories", "diverged", *found}})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            raise DataError(
                f"{path}: is damaged ({' '.join(str(error).split())}); --resume describes it again"
            ) from None
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

"""Simulates operators tile by tile and computes their features."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.descriptors.per_step import StepFeatures, concatenate_series
from spinlock_fast.descriptors.registry import PER_TRAJECTORY
from spinlock_fast.descriptors.sensitivity import sensitivity_features
from spinlock_fast.descriptors.spectral import Wavenumbers
from spinlock_fast.descriptors.trajectory import trajectory_features
from spinlock_fast.errors import SpinlockFastError
from spinlock_fast.kernels._common.single_thread import single_thread
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.noise import Purpose, generator
from spinlock_fast.simulate.parameters import Theta, ThetaSequence
from spinlock_fast.simulate.rollout import TILE, Rollout

Array = NDArray[np.float32]
_MIN_TILES_PER_WORKER = 8  # starting a process takes as long as simulating a few tiles
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_KEPT_BYTES = 1 << 28
_CV_TINY, _CV_MAX = 1e-8, 100.0


@dataclass(frozen=True)
class Rows:
    """n operators as rows of the datasets of a file."""

    fields: Array  # [n, 3, G, G]
    temporal: Array  # [n, T, 63]
    trajectories: Array  # [n, M, 120]
    diverged: NDArray[np.bool_]  # [n]
    last_fields: Array  # [n, 3, G, G] of the first realization, or [n, 0, G, G] where they are not kept

    def __len__(self) -> int:
        return len(self.fields)

    def select(self, rows: slice) -> Rows:
        """A slice of the rows."""
        return Rows(*(value[rows] for value in vars(self).values()))


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """Concatenates consecutive rows."""
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


class Simulator:
    """Simulates operators by index; row i is determined by the configuration and i.

    On the CPU, processes with one thread each simulate single operators, so that results are bit-identical for any
    number of processes and any batch. On CUDA, operators run in tiles of 32 fixed indices.

    Args:
        config: settings of the data set.
        device: device of the simulation.
        sharing: number of processes of this host that share its CPUs.
    """

    def __init__(self, config: GeneratorConfig, device: torch.device, sharing: int = 1) -> None:
        self.config, self.device = config, device
        self.sequence = ThetaSequence(config.parameters, config.random_seed)
        self._waves = Wavenumbers(config.grid_size, device)
        self._workers = (config.workers or max(1, _cores() // sharing)) if device.type == "cpu" else 1

    def simulate(self, start: int, stop: int) -> Rows:
        """Simulates the operators start .. stop - 1."""
        return concatenate_rows(list(self.stream(start, stop)))

    def stream(self, start: int, stop: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Rows]:
        """Yields the operators start .. stop - 1 in order, tile by tile, until `stopped` returns True.

        Memory does not depend on their number. Worker processes are spawned for larger ranges: a calling script needs
        `if __name__ == "__main__":`.

        Raises:
            SpinlockFastError: a worker process died.
        """
        yield from self.stream_ranges([(start, stop)], stopped)

    def stream_ranges(
        self, ranges: Sequence[tuple[int, int]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Rows]:
        """As `stream`, for several ranges, one after the other."""
        tile = TILE[self.device.type]
        firsts = [range(start // tile * tile, stop, tile) for start, stop in ranges]
        workers = min(self._workers, sum(map(len, firsts)) // _MIN_TILES_PER_WORKER)
        tiles = (
            self._in_worker_processes(chain.from_iterable(firsts), workers, stopped)
            if workers > 1
            else self._in_this_process(chain.from_iterable(firsts), stopped)
        )
        for (start, stop), of_range in zip(ranges, firsts, strict=True):
            for first, rows in islice(tiles, len(of_range)):
                yield rows.select(slice(max(start - first, 0), stop - first))

    def _in_this_process(self, firsts: Iterable[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, Rows]]:
        tile = TILE[self.device.type]
        with single_thread(torch.device("cpu")):
            for first in firsts:
                if stopped():
                    return
                yield first, self.simulate_tile(self.sequence.thetas(first, first + tile))

    def _in_worker_processes(
        self, firsts: Iterable[int], workers: int, stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, Rows]]:
        context = get_context("spawn")  # a fork would inherit locks of the parent's threads
        with ProcessPoolExecutor(workers, context, _start_worker, (self.config,)) as pool:
            remaining, pending = iter(firsts), deque[tuple[int, Future[Rows]]]()
            try:
                while not stopped():
                    for first in islice(remaining, 4 * workers - len(pending)):
                        pending.append((first, pool.submit(_in_worker, first)))
                    if not pending:
                        return
                    first, future = pending.popleft()
                    yield first, future.result()
            except BrokenProcessPool:
                if not stopped():
                    raise SpinlockFastError("a worker process died; it may have run out of memory") from None
            finally:
                pool.shutdown(cancel_futures=True)

    def simulate_tile(self, thetas: Sequence[Theta]) -> Rows:
        """Simulates the operators of one tile."""
        with torch.inference_mode():
            return self._tile_rows(thetas)

    def _tile_rows(self, thetas: Sequence[Theta]) -> Rows:
        config, M, count = self.config, self.config.num_realizations, len(thetas)
        rollout = Rollout(thetas, config, self.device)
        initial = rollout.initial.expand(M, *rollout.initial.shape).flatten(0, 1)
        steps = StepFeatures(initial, config.clip, self._waves)
        blocks = []
        for states in rollout.blocks():
            blocks.append(steps.block(states.flatten(1, 2)))
            last = states[-1]
        series = concatenate_series(blocks)
        temporal = series.features.view(config.num_timesteps, M, count, -1).double().mean(1).transpose(0, 1)
        features = trajectory_features(series).view(M, count, -1)
        sensitivity = torch.full((M, count, len(PER_TRAJECTORY["operator_sensitivity"])), torch.nan, device=self.device)
        if config.operator_sensitivity:
            sensitivity = sensitivity_features(rollout.step, last, self._direction(thetas))
        return Rows(
            fields=_array(rollout.initial),
            temporal=_array(temporal),
            trajectories=_array(torch.cat([features, sensitivity], 2).transpose(0, 1)),
            diverged=series.at_bound.view(-1, M, count).any(0).any(0).cpu().numpy(),
            last_fields=_array(last[0] if config.last_fields else last[0, :, :0]),
        )

    def _direction(self, thetas: Sequence[Theta]) -> Tensor:
        """One normal perturbation per operator: [O, 3, G, G]."""
        shape = (3, self.config.grid_size, self.config.grid_size)
        draws = [
            generator(self.config.random_seed, Purpose.PROBE, theta.index).standard_normal(shape) for theta in thetas
        ]
        return torch.from_numpy(np.stack(draws)).float().to(self.device)


def aggregate(trajectories: Array) -> Array:
    """Mean, standard deviation and coefficient of variation over realizations: [n, M, 120] -> [n, 360]."""
    values = trajectories.astype(np.float64)
    mean, std = values.mean(1), values.std(1)
    variation = np.minimum(std / (np.abs(mean) + _CV_TINY), _CV_MAX)
    return np.concatenate([mean, std, variation], axis=1).astype(np.float32)


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.float().cpu().numpy())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: Simulator | None = None  # set in worker processes


def _start_worker(config: GeneratorConfig) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _keep_freed_memory()
    _worker = Simulator(config, torch.device("cpu"))


def _keep_freed_memory() -> None:
    """Lets the C library keep the memory of freed tensors, which costs fewer page faults than allocating it anew."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(parameter, _KEPT_BYTES)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(first: int) -> Rows:
    assert _worker is not None
    return _worker.simulate_tile(_worker.sequence.thetas(first, first + TILE["cpu"]))

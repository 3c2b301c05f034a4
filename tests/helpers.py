"""Synthetic data, reference formulas and context managers that several tests share."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.training.step import StepKind, TrainingStep
from spinlock_fast.training.trainer import Trainer

SUMMARY = "features/summary/aggregated/features"
TRAJECTORIES = "features/summary/per_trajectory/features"
TEMPORAL = "features/temporal/features"
ARCHITECTURE = "features/architecture/aggregated/features"
FIELDS = "inputs/fields"
PARAMS = "parameters/params"
_STORAGE = ("chunk_rows", "compression", "shuffle", "fletcher32")
# Settings of a run of seconds on a few hundred rows.
SMALL_RUN = {
    "device": "cpu",
    "training.batch_size": 64,
    "training.topo_samples": 64,
    "training.num_epochs": 4,
    "training.val_every_n_epochs": 2,
    "training.orthogonality_target": 1.0,
}
# The same in a configuration file, with the dataset x as the only family.
SMALL_SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
    "training": {
        "batch_size": 64,
        "topo_samples": 64,
        "num_epochs": 4,
        "val_every_n_epochs": 2,
        "save_every": 1,
        "orthogonality_target": 10.0,
    },
    "logging": {"tensorboard": False},
}
FAMILIES = {"summary": SUMMARY, "temporal": TEMPORAL, "architecture": ARCHITECTURE}


def column_mean_std(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation of each column."""
    return x.mean(0), x.std(0, correction=0)


def planted_matrix(rows: int, sizes: Sequence[int], *, seed: int, noise: float = 0.3) -> NDArray[np.float32]:
    """[rows, sum sizes] columns in groups that share one hidden factor each; every second column is negated."""
    rng = np.random.default_rng(seed)
    factor = np.repeat(rng.standard_normal((rows, len(sizes))), sizes, axis=1)
    sign = np.where(np.arange(sum(sizes)) % 2 == 0, 1.0, -1.0)
    return (sign * factor + noise * rng.standard_normal(factor.shape)).astype(np.float32)


def synthetic_arrays(
    rows: int,
    *,
    seed: int,
    summary_width: int = 36,
    temporal_shape: tuple[int, int] = (32, 7),
    architecture_width: int = 12,
    trajectories: int = 2,
    field_shape: tuple[int, ...] = (3, 8, 8),
    params_width: int = 12,
    groups: int = 6,
    noise: float = 0.3,
    nan: bool = True,
    structure: bool = True,
) -> dict[str, NDArray[Any]]:
    """Small datasets of the documented layout (docs/data-format.md), by path in the file.

    Args:
        groups: number of hidden factors; the columns of every family follow them in turn.
        noise: standard deviation of the noise; that of a factor is 1.
        nan: make every twelfth summary column and about 1 % of the other raw values NaN.
        structure: if False, all values are independent noise.
    """
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((rows, groups)) if structure else np.zeros((rows, groups))

    def columns(width: int) -> NDArray[np.float64]:
        base = factors[:, np.arange(width) % groups] * rng.choice([-1.0, 1.0], width)
        return base + (noise if structure else 1.0) * rng.standard_normal((rows, width))

    summary = columns(summary_width) * np.exp(rng.uniform(-2.0, 2.0, summary_width)) + rng.normal(size=summary_width)
    per_trajectory = summary[:, None] + 0.1 * rng.standard_normal((rows, trajectories, summary_width))
    steps, channels = temporal_shape
    phase = 2.0 * np.pi * np.arange(1, channels + 1) * np.linspace(0.0, 1.0, steps)[:, None]  # [T, D]
    amplitude = columns(channels)[:, None]
    temporal = amplitude * np.sin(phase) + factors[:, :1, None] + 0.1 * rng.standard_normal((rows, steps, channels))
    if nan:
        for values in (summary, temporal):
            values[rng.random(values.shape) < 0.01] = np.nan
        summary[:, ::12] = np.nan
    choice = rng.integers(0, 3, (3, rows))
    return {
        SUMMARY: summary.astype(np.float32),
        TRAJECTORIES: per_trajectory[..., : max(summary_width // 3, 1)].astype(np.float32),
        TEMPORAL: temporal.astype(np.float32),
        ARCHITECTURE: (1.0 / (1.0 + np.exp(-columns(architecture_width)))).astype(np.float32),
        FIELDS: rng.standard_normal((rows, *field_shape)).astype(np.float32),
        PARAMS: rng.random((rows, params_width)).astype(np.float32),
        "metadata/ic_types": np.array(["gaussian", "grf", "waves"], dtype=object)[choice[0]],
        "metadata/evolution_policies": np.array(["autoregressive", "residual", "convex"], dtype=object)[choice[1]],
        "metadata/grid_sizes": np.full(rows, field_shape[-1] if field_shape else 0, dtype=np.int32),
        "metadata/noise_regimes": np.array(["low", "medium", "high"], dtype=object)[choice[2]],
    }


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    chunk_rows: int | None = 8,
    compression: str | None = "gzip",
    shuffle: bool = False,
    fletcher32: bool = False,
) -> Path:
    """Writes arrays by path in the file; `chunk_rows=None` stores them contiguous and unfiltered."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    filters: dict[str, Any] = {"compression": compression, "shuffle": shuffle, "fletcher32": fletcher32}
    if compression == "gzip":
        filters["compression_opts"] = 4
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            options: dict[str, Any] = {}
            if chunk_rows is not None and values.size and values.ndim > 1:
                step = 1 if name == FIELDS else min(chunk_rows, len(values))
                options = {"chunks": (step, *values.shape[1:]), **filters}
            dtype = h5py.string_dtype() if values.dtype == object else values.dtype
            file.create_dataset(name, data=values, dtype=dtype, **options)
    return path


def write_dataset(
    path: str | Path,
    rows: int,
    *,
    seed: int,
    chunk_rows: int | None = 8,
    compression: str | None = "gzip",
    shuffle: bool = False,
    fletcher32: bool = False,
    omit: Sequence[str] = (),
    **shape: Any,
) -> Path:
    """Writes a small HDF5 file in the documented layout; see `synthetic_arrays` for `shape`.

    Args:
        omit: paths of datasets or groups to leave out.
    """
    arrays = {
        name: values
        for name, values in synthetic_arrays(rows, seed=seed, **shape).items()
        if not any(name == left or name.startswith(f"{left}/") for left in omit)
    }
    return write_arrays(
        path, arrays, chunk_rows=chunk_rows, compression=compression, shuffle=shuffle, fletcher32=fletcher32
    )


def write_shards(directory: str | Path, counts: Sequence[int], *, seed: int, **options: Any) -> list[Path]:
    """Writes shard_0.h5, shard_1.h5, ..., whose concatenated rows are those of `write_dataset(sum(counts))`."""
    storage = {key: options.pop(key) for key in _STORAGE if key in options}
    arrays = synthetic_arrays(sum(counts), seed=seed, **options)
    ends = np.cumsum(counts)
    return [
        write_arrays(
            Path(directory) / f"shard_{i}.h5",
            {name: values[end - count : end] for name, values in arrays.items()},
            **storage,
        )
        for i, (end, count) in enumerate(zip(ends, counts, strict=True))
    ]


def split_columns(z: torch.Tensor, layout: CodebookLayout) -> list[torch.Tensor]:
    """Packed latents [N, sum D] -> one [N, D_g] per codebook."""
    return list(z.split(list(layout.dims), dim=1))


def split_codebooks(codebook: torch.Tensor, layout: CodebookLayout) -> list[torch.Tensor]:
    """Packed code vectors [sum K D] -> one [K_g, D_g] per codebook."""
    sizes = [k * d for k, d in zip(layout.num_codes, layout.dims, strict=True)]
    return [part.view(-1, d) for part, d in zip(codebook.split(sizes), layout.dims, strict=True)]


def distances64(z: torch.Tensor, codebook: torch.Tensor, layout: CodebookLayout) -> list[torch.Tensor]:
    """Squared distances [N, K_g] of every codebook, from differences in float64."""
    return [
        (part.double()[:, None] - codes.double()[None]).square().sum(-1)
        for part, codes in zip(split_columns(z, layout), split_codebooks(codebook, layout), strict=True)
    ]


def assert_nearest(
    codes: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor, layout: CodebookLayout, ulps: float = 4.0
) -> None:
    """Asserts that every chosen code is as near as the nearest, up to rounding of |e|^2 - 2 z.e in float32.

    The bound is `ulps` * sqrt(D) * eps * (|z|^2 + max |e|^2): rounding errors of D products add up like a random walk.
    """
    eps = torch.finfo(torch.float32).eps
    parts = zip(split_columns(z, layout), split_codebooks(codebook, layout), strict=True)
    for g, ((part, book), distance) in enumerate(zip(parts, distances64(z, codebook, layout), strict=True)):
        chosen = distance.gather(1, codes[:, g : g + 1])[:, 0]
        size = part.double().square().sum(1) + book.double().square().sum(1).max()
        gap = chosen - distance.min(1).values
        assert (gap <= ulps * part.shape[1] ** 0.5 * eps * size).all(), f"codebook {g}: {gap.max()} too far"


def random_group(
    layout: CodebookLayout, rows: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal latents [rows, sum D] and code vectors [sum K D]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, layout.total_dims, generator=generator, dtype=dtype)
    return z, torch.randn(layout.total_entries, generator=generator, dtype=dtype)


def distances(points: torch.Tensor) -> torch.Tensor:
    """[S, S] of points [S, D], from differences."""
    return (points[:, None] - points[None]).square().sum(-1).sqrt()


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of two matrices [S, S] over the pairs i < j."""
    upper = np.triu_indices(a.shape[0], 1)
    return float(np.corrcoef(a.detach().numpy()[upper], b.detach().numpy()[upper])[0, 1])


def mean_distances(z: torch.Tensor, layout: CodebookLayout) -> torch.Tensor:
    """[S, S] of latents [S, sum D]: mean over the codebooks."""
    return torch.stack([distances(part) for part in split_columns(z, layout)]).mean(0)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs PyTorch with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def raises_one_line(kind: type[Exception], *texts: str) -> Iterator[None]:
    """Asserts that the block raises exactly `kind` with a one-line message that contains every text."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert caught.type is kind, f"{caught.type.__name__}: {message}"
    assert "\n" not in message
    for text in texts:
        assert text in message, f"{text!r} is not in: {message}"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits the file size of this process; exceeding it fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# Operators that read a value on the host, or whose output shape depends on values: a CUDA graph cannot hold them.
_HOST_SYNC = {
    "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "bincount", "histc", "repeat_interleave", "_assert_async",
}  # fmt: skip


class _NoHostSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _HOST_SYNC, f"{name} synchronises with the device"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask has a shape that depends on values"
        return func(*args, **(kwargs or {}))


def no_host_sync() -> TorchDispatchMode:
    """Operators that a CUDA graph cannot hold fail, forward and backward. Also disables native CPU kernels."""
    return _NoHostSync()


class _WithoutNativeKernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def without_native_kernels() -> TorchDispatchMode:
    """Disables native CPU kernels: they do not run under a dispatch mode."""
    return _WithoutNativeKernels()


@contextmanager
def stop_after(steps: int, run: Trainer) -> Iterator[None]:
    """Stops a run after so many steps, as SIGTERM does."""
    original, made = TrainingStep.__call__, 0

    def counting(self: TrainingStep, kind: StepKind) -> None:
        nonlocal made
        original(self, kind)
        made += 1
        if made == steps:
            run.stop(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", counting)
        yield

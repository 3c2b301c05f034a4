"""A small data set with known regimes, and a tokenizer trained on it by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from numpy.typing import NDArray

FEATURES = {
    "cluster_1": ["energy_of_last_state", "energy_maximum", "growth_rate"],
    "cluster_2": ["dominant_frequency", "oscillation_amplitude", "spectral_width", "spectral_slope"],
    "cluster_3": ["residual_variance", "autocorrelation_time"],
}


@dataclass(frozen=True)
class Regimes:
    """What was planted, of N rows.

    Args:
        data: HDF5 file with the noise regime as a label, and `metadata/diverged` [N].
        checkpoint: of the trained tokenizer.
        diverged: [N] about one row in 15.
        large_noise: [N] about two rows in five, independent of the rest.
        features: [N, 9] raw, in the order of `FEATURES`.
    """

    data: Path
    checkpoint: Path
    diverged: NDArray[np.bool_]
    large_noise: NDArray[np.bool_]
    features: NDArray[np.float32]


def planted_features(rows: int, seed: int) -> dict[str, NDArray[Any]]:
    """Energies follow five regimes, the last of them diverged; spectra follow 4 frequencies and 3 widths; noise two."""
    rng = np.random.default_rng(seed)
    diverged = rng.random(rows) < 1 / 15
    energy = np.where(diverged, 8.0, 1.5 * rng.integers(0, 4, rows))
    frequency, width = rng.integers(0, 4, rows), rng.integers(0, 3, rows)
    large_noise = rng.random(rows) < 0.4
    columns = [
        *(energy, 0.8 * energy, np.where(diverged, 4.0, 0.5 * energy)),
        *(2.0 * frequency, -1.5 * frequency, 2.0 * width, 1.5 * width),
        *(3.0 * large_noise, -2.0 * large_noise),
    ]
    features = np.stack(columns, 1) + 0.25 * rng.standard_normal((rows, len(columns)))
    return {"features": features.astype(np.float32), "diverged": diverged, "large_noise": large_noise}


def train_on_regimes(directory: Path, rows: int = 900, epochs: int = 30) -> Regimes:
    """Writes data.h5 and trains a checkpoint on it."""
    planted = planted_features(rows, seed=5)
    directory.mkdir(parents=True, exist_ok=True)
    with h5py.File(directory / "data.h5", "w") as file:
        file["features/summary"] = planted["features"]
        file["features/summary"].attrs["feature_names"] = [name for names in FEATURES.values() for name in names]
        file["metadata/diverged"] = planted["diverged"].astype(np.uint8)
        file["metadata/noise_regimes"] = np.where(planted["large_noise"], b"large", b"small")
        file["parameters/params"] = np.random.default_rng(6).random((rows, 2))
    groups, first = {}, 0
    for name, names in FEATURES.items():
        groups[name] = list(range(first, first + len(names)))
        first += len(names)
    (directory / "categories.json").write_text(json.dumps(groups))
    level = {"latent_dim": 4}
    settings = {
        "dataset_path": str(directory / "data.h5"),
        "device": "cpu",
        "families": {"summary": {"encoder": "IdentityEncoder", "dataset": "features/summary"}},
        "model": {"levels": [{"num_tokens": 14, **level}, {"num_tokens": 6, **level}]},
        "training": {
            "batch_size": 64,
            "num_epochs": epochs,
            "val_every_n_epochs": 10,
            "orthogonality_target": 10.0,
            "category_mapping_file": str(directory / "categories.json"),
        },
        "logging": {"tensorboard": False},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    run_command("train", directory / "run.yaml", "--output", directory / "checkpoint", "--quiet")
    return Regimes(
        directory / "data.h5",
        directory / "checkpoint",
        planted["diverged"],
        planted["large_noise"],
        planted["features"],
    )


def run_command(verb: str, *arguments: object) -> None:
    """Runs a command in a process of its own; raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", f"spinlock_fast.{verb}", *map(str, arguments)], check=True)

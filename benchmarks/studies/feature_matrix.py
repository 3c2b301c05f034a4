"""Writes the cleaned, normalised features of data files as one matrix, split by operator, for `rate_distortion.py`.

    python -m benchmarks.studies.feature_matrix configs/10k.yaml --output matrix.npz --set dataset_path='data/10k_*.h5'

Encoders, cleaning, categories and normalisation are those of `train` with the same settings: fitted to the training
rows. Validation and test rows are 15 % each, drawn by `random_seed`. Arrays: x [N, F] float32, train_rows,
validation_rows, test_rows, and `meta`, a JSON text with group_indices and feature_names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spinlock_fast.config.loading import load_config
from spinlock_fast.config.random_streams import VERSION, streams_of
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.split import Split, split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.training.observer import SilentDisplay
from spinlock_fast.training.preparation import PreparedFeatures, open_source, prepare

SHARES = ["training.val_fraction=0.15", "training.test_fraction=0.15"]


def prepared_features(config: RunConfig) -> tuple[PreparedFeatures, Split]:
    """The features of the configured data, and the split of their rows, as `train` has them."""
    config = resolve_families(config)
    with open_source(config) as source, streams_of(VERSION):
        prepared = prepare(source, config, resolve_device(config.device), SilentDisplay())
        return prepared, split_rows(source.rows, config.training, config.random_seed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="settings, as for train")
    parser.add_argument("--output", type=Path, required=True, metavar="MATRIX.npz")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting")
    chosen = parser.parse_args(argv)
    config = load_config(chosen.config, [*SHARES, *chosen.set])
    prepared, split = prepared_features(config)
    meta = {"group_indices": prepared.groups, "feature_names": prepared.feature_names, "levels": {}}
    np.savez(
        chosen.output,
        x=prepared.x,
        train_rows=split.train,
        validation_rows=split.val,
        test_rows=split.test,
        meta=json.dumps(meta),
    )
    print(f"{chosen.output}: {len(prepared.x):,} rows, {len(prepared.feature_names)} features of "
          f"{prepared.columns} columns, {len(prepared.groups)} categories")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

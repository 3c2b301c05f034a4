"""A family of time series encoded by statistics, through training, decoding and a checkpoint."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from spinlock_fast import Tokenizer
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.features.encode import make_encoders
from spinlock_fast.features.statistics_encoder import STATISTICS
from spinlock_fast.train import main as train


def write_series(path: Path, names: bool = True) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 24, 3)).cumsum(1) + rng.standard_normal((96, 1, 3))
    with h5py.File(path, "w") as file:
        file["group/series"] = x.astype(np.float32)
        if names:
            file["group"].attrs["feature_names"] = ["height", "width", "depth"]
    return x


def test_columns_are_named_by_series_and_statistic(tmp_path: Path) -> None:
    settings = {"families": {"mine": {"encoder": "StatisticsEncoder", "dataset": "group/series"}}}
    families = RunConfig.model_validate(settings).families
    for names, first in ((True, "mine::height::mean"), (False, "mine::mine_0::mean")):
        write_series(tmp_path / "a.h5", names)
        with FeatureSource(str(tmp_path / "a.h5"), {"mine": "group/series"}) as source:
            (family,) = make_encoders(source, families, 0, 1 << 30)
        assert family.names[0] == first
        assert len(family.names) == 3 * len(STATISTICS)


def test_tokens_decode_to_statistics_in_their_units(tmp_path: Path) -> None:
    x = write_series(tmp_path / "a.h5")
    settings = [
        f"dataset_path={tmp_path}/a.h5",
        "families={mine: {encoder: StatisticsEncoder, dataset: group/series}}",
        "training.num_epochs=30",
        "training.joint_search_epochs=5",
        "training.batch_size=32",
        "training.topo_samples=32",
        "training.num_categories_auto=3",
        "training.orthogonality_target=10.0",
        "model.codebook_init=product",
        "logging.tensorboard=false",
        "device=cpu",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    with pytest.raises(SystemExit) as ended:
        train([str(config), *arguments, "--output", f"{tmp_path}/c", "--quiet"])
    assert not ended.value.code
    tokenizer = Tokenizer.from_checkpoint(f"{tmp_path}/c")
    tokens = tokenizer.encode({"mine": torch.from_numpy(x).float()})
    decoded = np.asarray(tokenizer.decode(tokens))
    names = list(tokenizer.feature_names)
    column = names.index("mine::height::mean")
    assert np.corrcoef(decoded[:, column], x[:, :, 0].mean(1))[0, 1] > 0.8

"""The number of threads does not change a result on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import planted_matrix

from spinlock_fast import Trainer
from spinlock_fast.config.schema import RunConfig

SETTINGS = {
    "device": "cpu",
    "training.num_epochs": 1,
    "training.joint_search_epochs": 1,
    "training.batch_size": 64,
    "training.topo_samples": 32,
    "training.input_noise": 0.1,
    "model.codebook_init": "product",
    "model.dropout": 0.0,
    "model.group_hidden_dim": 16,
    "model.group_embedding_dim": 8,
}


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
def test_training_and_the_fit_of_the_token_decoder() -> None:
    x = planted_matrix(200, [5, 5, 5, 5], seed=0)
    groups = {f"cluster_{i + 1}": list(range(5 * i, 5 * i + 5)) for i in range(4)}
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result = Trainer.from_config(RunConfig(), SETTINGS).fit(x, groups, normalize=False)
        assert result.model.token_decoder is not None
        states.append(result.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name

"""Random streams are distinct, and a run seeds its own device only."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spinlock_fast.config.random_streams import Stream, generator, seed_torch, streams_of, version
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.split import split_rows
from spinlock_fast.training.trainer import Trainer


def first(random: np.random.Generator) -> tuple[int, ...]:
    return tuple(random.integers(2**63, size=2).tolist())


def test_streams_are_distinct() -> None:
    keys = [(stream, *place) for stream in Stream for place in ((), (0,), (1,), (2,), (0, 0), (1, 0), (0, 1))]
    seeds = (0, 1, 42, 42 + 2**32, 2**32, 2**63 - 1)
    drawn = [first(generator(seed, *key)) for seed in seeds for key in keys]
    drawn += [first(np.random.default_rng(seed)) for seed in seeds]
    drawn += [first(np.random.default_rng([seed, *rest])) for seed in (1, 42) for rest in ((1,), (2,), (3,), (2, 1))]
    assert len(set(drawn)) == len(drawn) - 1  # but for [42, 1], which is how numpy writes 42 + 2**32


def test_the_split_is_not_what_a_user_draws_with_the_same_seed() -> None:
    training = RunConfig().training
    for seed in (0, 42):
        drawn = np.random.default_rng(seed).permutation(500)[:50]
        assert not np.array_equal(split_rows(500, training, seed).val, np.sort(drawn))


def test_a_run_of_an_earlier_version_keeps_its_streams() -> None:
    with streams_of(1):
        assert version() == 1
        for stream, place in itertools.product((Stream.SPLIT, Stream.CATEGORIES, Stream.ROW_ORDER), ((), (3,))):
            assert first(generator(42, stream, *place)) == first(np.random.default_rng([42, int(stream), *place]))
    assert version() == 2


def test_a_state_without_a_version_is_resumed_with_the_streams_it_had() -> None:
    config = {
        "device": "cpu", "training.batch_size": 64, "training.topo_samples": 64, "training.num_epochs": 2,
        "training.orthogonality_target": 10.0,
    }  # fmt: skip
    x = np.random.default_rng(0).standard_normal((120, 12)).astype(np.float32)
    groups = {"a": list(range(6)), "b": list(range(6, 12))}
    with streams_of(1):
        old = Trainer.from_config(RunConfig(), config).fit(x, groups)
        longer = Trainer.from_config(RunConfig(), {**config, "training.num_epochs": 4}).fit(x, groups)
    state = dict(old.final_state)
    del state["streams"]
    found = Trainer.from_config(RunConfig(), {**config, "training.num_epochs": 4}).fit(x, groups, resume=state)
    assert np.array_equal(found.split.val, longer.split.val)
    for key, value in longer.final_state["model_state_dict"].items():
        assert torch.equal(value, found.final_state["model_state_dict"][key])


def test_other_devices_are_not_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reseeds every device")

    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    x = np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32)
    config = {"device": "cpu", "training.num_epochs": 1, "training.batch_size": 64, "training.topo_samples": 64}
    Trainer.from_config(RunConfig(), config).fit(x, {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]})
    assert seeded == []
    with torch.random.fork_rng(devices=[]):
        seed_torch(5, torch.device("cpu"))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_keeps_its_random_state() -> None:
    torch.cuda.manual_seed_all(3)
    before = torch.cuda.get_rng_state(1)
    seed_torch(5, torch.device("cuda", 0))
    assert torch.equal(torch.cuda.get_rng_state(1), before)

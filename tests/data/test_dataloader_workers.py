"""HDF5Loader in the worker processes of a torch DataLoader."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import helpers
import numpy as np
import pytest
from torch.utils.data import DataLoader

from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on two processors

ROWS = 205


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    values = np.arange(ROWS, dtype=np.float32)[:, None]
    return str(helpers.write_arrays(tmp_path_factory.mktemp("data") / "a.h5", {"x": values}, chunk_rows=8))


def load(file: str, **settings: Any) -> HDF5Loader:
    return HDF5Loader(file, "x", **{"batch_size": 16, "window_rows": 48, "num_threads": 1, **settings})


def batches_of(batches: Any) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        assert batch["x"][:, 0].long().tolist() == batch["index"].tolist()
        found.append(tuple(batch["index"].tolist()))
    return found


def in_workers(loader: HDF5Loader, workers: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(loader, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("shuffle", [True, False, "exact"])
@pytest.mark.parametrize(
    ("workers", "settings"), [(2, {}), (3, {"rank": 1, "world_size": 2}), (2, {"drop_last": True})]
)
def test_workers_yield_the_batches_of_one_process(file: str, shuffle: Any, workers: int, settings: Any) -> None:
    alone = load(file, shuffle=shuffle, **settings)
    expected = [batches_of(alone) for _ in range(2)]
    loader = in_workers(load(file, shuffle=shuffle, **settings), workers)
    assert len(loader) == len(expected[0])
    for epoch in range(2):
        assert Counter(batches_of(loader)) == Counter(expected[epoch])


def test_more_workers_than_batches_yield_all_batches(file: str) -> None:
    loader = in_workers(load(file, batch_size=100), 4)
    assert sorted(itertools.chain(*batches_of(loader))) == list(range(ROWS))


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}], ids=["fresh", "persistent"])
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_each_iteration_is_the_next_epoch_and_set_epoch_reaches_workers(file: str, options: Any, method: str) -> None:
    alone = load(file)
    expected = [Counter(batches_of(alone)) for _ in range(4)]
    loader = load(file)
    wrapped = in_workers(loader, multiprocessing_context=method, **options)
    assert [expected.index(Counter(batches_of(wrapped))) for _ in range(2)] == [0, 1]
    loader.set_epoch(3)
    assert expected.index(Counter(batches_of(wrapped))) == 3
    loader.set_epoch(0)
    assert [expected.index(Counter(batches_of(wrapped))) for _ in range(2)] == [0, 1]


def test_epochs_continue_across_processes(file: str) -> None:
    alone = load(file)
    expected = [Counter(batches_of(alone)) for _ in range(6)]
    loader = load(file)
    for epoch, workers in enumerate((0, 2, 2, 3, 0, 1)):
        assert expected.index(Counter(batches_of(in_workers(loader, workers)))) == epoch


@pytest.mark.parametrize("persistent", [False, True])
def test_incomplete_epoch_is_followed_by_the_next(file: str, persistent: bool) -> None:
    alone = load(file)
    expected = [Counter(batches_of(alone)) for _ in range(3)]
    wrapped = in_workers(load(file), persistent_workers=persistent)
    for epoch in range(0, 3, 2):
        assert Counter(batches_of(wrapped)) == expected[epoch]
        for _ in wrapped:
            break


@pytest.mark.parametrize("stop", [0, 1, 6, 12, 13])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_resume_a_state_of_one_process(file: str, stop: int, workers: int) -> None:
    alone = load(file)
    expected = [batches_of(alone) for _ in range(3)]
    loader = load(file)
    list(itertools.islice(loader, stop))
    other = load(file)
    other.load_state_dict(loader.state_dict())
    wrapped = in_workers(other, workers)
    if stop < 13:
        assert Counter(batches_of(wrapped)) == Counter(expected[0][stop:])
    assert Counter(batches_of(wrapped)) == Counter(expected[1])
    assert Counter(batches_of(wrapped)) == Counter(expected[2])


def test_state_dict_with_workers_is_an_error(file: str) -> None:
    loader = load(file)
    batches = iter(in_workers(loader))
    next(batches)
    with helpers.raises_one_line(ConfigError, "state_dict", "workers", "num_workers=0", "StatefulDataLoader"):
        loader.state_dict()
    list(batches)
    loader.set_epoch(1)
    assert loader.state_dict()["epoch"] == 1


class Probe(HDF5Loader):
    """Adds the state to each batch, as torchdata's StatefulDataLoader queries it in a worker."""

    resumed: dict[int, Any] | None = None

    def __iter__(self) -> Any:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        if self.resumed is not None and worker is not None and worker.id in self.resumed:
            self.load_state_dict(self.resumed[worker.id])
            self.resumed = None
        for batch in super().__iter__():
            yield {**batch, "state": self.state_dict()}


@pytest.mark.parametrize("stop", [0, 3, 7, 13])
def test_workers_resume_their_own_states(file: str, stop: int) -> None:
    settings = {"batch_size": 16, "window_rows": 48, "num_threads": 1}
    expected = Counter(batches_of(load(file)))
    probe = Probe(file, "x", **settings)
    states: dict[int, Any] = {}
    taken = []
    for batch in itertools.islice(in_workers(probe), stop):
        states[batch["state"]["worker"][0]] = batch["state"]
        taken.append(batch)
    other = Probe(file, "x", **settings)
    other.resumed = states
    assert Counter(batches_of(taken) + batches_of(in_workers(other))) == expected
    if states:
        with helpers.raises_one_line(ConfigError, "worker"):
            other.load_state_dict(next(iter(states.values())))


def test_too_many_workers_is_an_error(file: str) -> None:
    from spinlock_fast.data.shared_position import SharedPosition

    with helpers.raises_one_line(ConfigError, "num_workers: 129"):
        SharedPosition().begin(0, 129)

"""Streamed rows give the same weights and metrics as resident rows, in less memory."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL_RUN, planted_matrix, raises_one_line, stop_after
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data import host_rows
from spinlock_fast.data.host_rows import HostRows, place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.errors import DataError, Interrupted
from spinlock_fast.features.categories import category_correlation, discover_categories
from spinlock_fast.training import result, row_feed
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.row_feed import CopyStream, StreamedFeed
from spinlock_fast.training.trainer import Trainer

CPU = torch.device("cpu")
SIZES = [6, 9, 5]
GROUPS = {"a": list(range(6)), "b": list(range(6, 15)), "c": list(range(15, 20))}
STEP_BYTES = 64 * 20 * 4


@pytest.fixture(scope="module")
def x() -> np.ndarray[Any, Any]:
    return planted_matrix(600, SIZES, seed=0)  # 540 to train on: 8 batches of 64 and one of 28


@pytest.fixture(scope="module")
def resident(x: np.ndarray[Any, Any]) -> Callable[..., TrainResult]:
    """Results of training on rows on the device, by options."""
    results: dict[str, TrainResult] = {}

    def fit(**options: Any) -> TrainResult:
        key = repr(options)
        if key not in results:
            results[key] = trainer_with("always", **options).fit(x, GROUPS)
        return results[key]

    return fit


@pytest.fixture
def set_steps_per_half(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of steps of 64 rows per half of the table."""
    return lambda steps: monkeypatch.setattr(row_feed, "_HALF_BUFFER_BYTES", steps * STEP_BYTES)


def trainer_with(where: str, observer: SilentObserver | None = None, **options: Any) -> Trainer:
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    return Trainer(apply_overrides(RunConfig(), {**SMALL_RUN, "training.data_on_device": where, **dotted}), observer)


def assert_same(a: TrainResult, b: TrainResult) -> None:
    """Bit-identical."""
    for one, other in ((a.model.state_dict(), b.model.state_dict()), *_states(a, b)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {**a.metrics, "seconds": 0} == {**b.metrics, "seconds": 0}
    assert [{**vars(r), "seconds": 0} for r in a.history] == [{**vars(r), "seconds": 0} for r in b.history]


def _states(a: TrainResult, b: TrainResult) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    for name in ("model_state_dict", "best_state_dict"):
        yield a.final_state[name], b.final_state[name]


def test_row_view_reads_rows_of_a_matrix(x: np.ndarray[Any, Any]) -> None:
    numbers = np.array([5, 3, 3, 599])
    chosen = RowView(x, numbers)
    assert chosen.shape == (4, 20)
    assert np.array_equal(chosen[1:], x[[3, 3, 599]])
    assert np.array_equal(chosen[np.array([3, 0])], x[[599, 5]])
    out = np.empty((2, 20), np.float32)
    chosen.read(slice(0, 2), out)
    assert np.array_equal(out, x[[5, 3]])
    assert np.array_equal(RowView(x)[:], x)


def test_statistics_of_a_row_view_are_those_of_its_rows(x: np.ndarray[Any, Any]) -> None:
    numbers = np.arange(0, 600, 2)
    chosen = RowView(x, numbers)
    assert np.array_equal(category_correlation(chosen, GROUPS), category_correlation(x[numbers], GROUPS))
    names = [f"f{i}" for i in range(20)]
    config = RunConfig().training
    assert discover_categories(chosen, names, config, 0) == discover_categories(x[numbers], names, config, 0)


def test_host_rows_read_like_a_tensor(x: np.ndarray[Any, Any]) -> None:
    numbers = np.random.default_rng(0).permutation(600)[:130]
    host, tensor = HostRows(RowView(x, numbers), CPU), torch.from_numpy(x[numbers])
    assert host.shape == tensor.shape
    assert (len(host), host.dtype, host.device) == (130, tensor.dtype, tensor.device)
    index = torch.tensor([129, 0, 7, 7])
    assert torch.equal(host[index], tensor[index])
    kept = list(host.split(50))  # no block is overwritten by the next
    for block, expected in zip(kept, tensor.split(50), strict=True):
        assert torch.equal(block, expected)
    assert torch.equal(host.to_device(), tensor)


@pytest.mark.parametrize("steps", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"training__val_fraction": 0.04, "training__batch_size": 64},  # 576 to train on: whole batches alone
        {"training__batch_size": 10_000},  # an epoch is one step
        {"training__dead_code_reset_steps": 5, "training__dead_code_threshold": 0.9},
    ],
)
def test_streamed_training_equals_resident_training(
    x: np.ndarray[Any, Any],
    resident: Callable[..., TrainResult],
    set_steps_per_half: Callable[[int], None],
    steps: int,
    options: dict[str, Any],
) -> None:
    set_steps_per_half(steps)
    assert_same(trainer_with("never", **options).fit(x, GROUPS), resident(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"model__codebook_init": "product", "training__decoder_refit": 0.01, "training__test_fraction": 0.1},
        {"model__codebook_init": "uniform", "training__input_noise": 0.3, "training__mixup_scale": 0.2},
        {
            "training__dead_code_reset_interval": 1,
            "training__dead_code_strategy": "sample",
            "training__dead_code_threshold": 0.9,
        },
        {
            "training__num_epochs": 20,
            "training__early_stopping_patience": 1,
            "training__early_stopping_min_delta": 1e9,
        },
    ],
)
def test_every_consumer_reads_host_rows(
    x: np.ndarray[Any, Any], set_steps_per_half: Callable[[int], None], options: dict[str, Any]
) -> None:
    """Initial codes, refit, dead-code latents, validation, test rows and category discovery."""
    set_steps_per_half(2)
    assert_same(trainer_with("never", **options).fit(x), trainer_with("always", **options).fit(x))


class StateRecorder(SilentObserver):
    """Keeps a copy of the saved state."""

    state: dict[str, Any]

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)


@pytest.mark.parametrize("steps", [1, 4, 6, 9, 11, 18])
def test_streamed_run_resumes_within_an_epoch(
    x: np.ndarray[Any, Any],
    resident: Callable[..., TrainResult],
    set_steps_per_half: Callable[[int], None],
    steps: int,
) -> None:
    set_steps_per_half(2)
    whole = resident()
    observer = StateRecorder()
    broken = trainer_with("never", observer)
    with stop_after(steps, broken), pytest.raises(Interrupted):
        broken.fit(x, GROUPS)
    assert observer.state["epoch"] * 9 + observer.state["step"] == steps
    set_steps_per_half(3)  # a state does not depend on the size of the halves
    assert_same(whole, trainer_with("never").fit(x, GROUPS, resume=observer.state))
    assert_same(whole, trainer_with("always").fit(x, GROUPS, resume=observer.state))


@pytest.mark.parametrize(("share", "streamed"), [(0.9, True), (2.1, False)])
def test_rows_stay_in_host_memory_if_they_would_fill_the_device(
    x: np.ndarray[Any, Any], share: float, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_rows, "free_memory", lambda device: share * x.nbytes)
    chosen = RowView(x)
    assert isinstance(place_rows(chosen, CPU), HostRows) == streamed
    assert isinstance(place_rows(chosen, CPU, "never"), HostRows)
    assert isinstance(place_rows(chosen, CPU, "always"), Tensor)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_resident_rows_that_do_not_fit_are_rejected_in_one_line(
    x: np.ndarray[Any, Any], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: HostRows) -> Tensor:
        raise kind("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(HostRows, "to_device", full)
    monkeypatch.setattr(host_rows, "free_memory", lambda device: 2e9)
    with raises_one_line(DataError, "600 rows of 20 features take 0.00 GB, but cpu has 2.00 GB free", "data_on_device"):
        place_rows(RowView(x), CPU, "always")
    assert isinstance(place_rows(RowView(x), CPU), HostRows)


def test_streamed_run_logs_where_rows_are(x: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer_with("never", training__num_epochs=1).fit(x, GROUPS)
    assert "540 rows stay in main memory and are gathered step by step" in caplog.text


def test_free_memory_respects_the_container_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    8000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000000\nfile 1500000\nanon_thp 7\n",
    }

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert host_rows.free_memory(CPU) == 2_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert host_rows.free_memory(CPU) == 8000 * 1024
    files.clear()
    assert host_rows.free_memory(CPU) == float("inf")


def test_equal_matrices_train_equally_in_any_layout(x: np.ndarray[Any, Any], tmp_path: Path) -> None:
    """Read-only memory maps, other dtypes and memory orders."""
    expected = trainer_with("always", training__num_epochs=1).fit(x, GROUPS)
    np.save(tmp_path / "x.npy", x)
    for same in (np.load(tmp_path / "x.npy", mmap_mode="r"), x.astype(np.float64), np.asfortranarray(x), x.tolist()):
        assert_same(trainer_with("never", training__num_epochs=1).fit(same, GROUPS), expected)


def test_nonfinite_value_is_reported_with_its_row(x: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "_ROWS_PER_BLOCK", 128)
    bad = x.copy()
    bad[300, 7] = bad[301, 2] = np.inf
    with raises_one_line(DataError, "x[300, 7] is inf"):
        trainer_with("auto").fit(bad, GROUPS)


@contextmanager
def peak_of_own_memory() -> Iterator[list[int]]:
    """Peak growth of the process's memory in bytes, without pages of mapped files."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before, peak, over = held(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory of a process")
def test_memory_map_is_not_loaded_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 MB of rows, all read by checks, category discovery, training and validation."""
    monkeypatch.setattr(row_feed, "_HALF_BUFFER_BYTES", 1 << 22)
    shape, sizes = (200_000, 120), [40, 40, 40]
    matrix: np.memmap[Any, Any] = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    block = planted_matrix(40_000, sizes, seed=0)
    for start in range(0, shape[0], len(block)):
        matrix[start : start + len(block)] = block
    del block
    level = [{"num_tokens": 4, "latent_dim": 4}]
    settings = {
        "training__num_epochs": 1,
        "training__batch_size": 4096,
        "training__topo_weight": 0.0,
        "model__levels": level,
        "model__group_hidden_dim": 16,
        "model__group_embedding_dim": 8,
    }
    trainer_with("never", **settings).fit(matrix[:20_000])  # libraries have their memory
    with peak_of_own_memory() as peak:
        trainer_with("never", **settings).fit(matrix)
    assert peak[0] < 0.5 * matrix.nbytes  # the order of rows, what is checked at once, the steps


class Queue:
    """A stream of a device with an arbitrary schedule."""

    def __init__(self, device: object = None) -> None:
        self.waiting: list[Callable[[], bool]] = []

    def put(self, work: Callable[[], None]) -> None:
        self.waiting.append(lambda: work() or True)

    def wait_event(self, event: Event) -> None:
        recorded = event.recorded
        self.waiting.append(lambda: recorded is None or recorded.is_set())

    def wait_stream(self, other: Queue) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)


class Event:
    """An event."""

    device: Device

    def __init__(self) -> None:
        self.recorded: threading.Event | None = None

    def record(self, stream: Queue) -> None:
        reached = self.recorded = threading.Event()
        stream.put(reached.set)

    def synchronize(self) -> None:
        reached = self.recorded
        if reached is not None:
            self.device.run(reached.is_set)


class Device:
    """Runs its queues in random order, constrained only by events."""

    def __init__(self, choose: Callable[[list[Queue]], list[Queue]]) -> None:
        self.choose = choose
        self.steps, self.copies = Queue(), Queue()
        self.current = self.steps

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            assert any(self._advance(queue) for queue in self.choose([self.steps, self.copies])), "deadlock"

    def _advance(self, queue: Queue) -> bool:
        if not queue.waiting or not queue.waiting[0]():
            return False
        queue.waiting.pop(0)
        return True

    @contextmanager
    def stream(self, queue: Queue) -> Iterator[None]:
        before, self.current = self.current, queue
        yield
        self.current = before


ORDERS: dict[str, Callable[[list[Queue]], list[Queue]]] = {
    "steps first": lambda queues: queues,
    "copies first": lambda queues: queues[::-1],
    "any": lambda queues: random.sample(queues, 2),
}


@pytest.mark.parametrize("order_of_work", ORDERS)
@pytest.mark.parametrize(("count", "batch", "half"), [(270, 64, 1), (256, 64, 2), (900, 64, 3), (50, 64, 1)])
def test_no_step_reads_rows_of_another_step(
    count: int,
    batch: int,
    half: int,
    order_of_work: str,
    set_steps_per_half: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launched ahead and executed in any order that events allow, each step finds its own rows in the table."""
    random.seed(0)
    device = Device(ORDERS[order_of_work])
    monkeypatch.setattr(Event, "device", device, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: device.copies)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    at_once = CopyStream._copy
    monkeypatch.setattr(CopyStream, "_copy", lambda self, *what: device.current.put(lambda: at_once(self, *what)))
    monkeypatch.setattr(row_feed, "NoTransfer", CopyStream)
    set_steps_per_half(half)
    x = torch.randn(count, 20)
    batch = min(batch, count)
    steps, read = -(-count // batch), 0
    feed = StreamedFeed(HostRows(RowView(x.numpy()), CPU), batch, steps)

    def check(places: Tensor, numbers: Tensor) -> None:
        nonlocal read
        read += 1
        assert torch.equal(feed.table[places], x[numbers])

    for done in (0, 0, steps // 2, 0):
        order = torch.randperm(count)
        places, step = feed.begin_epoch(order, done), done
        while step < steps:
            launched = min(feed.steps_available(step), 2, steps - step)
            for _ in range(launched):
                mine = slice(step * batch, (step + 1) * batch)
                device.steps.put(lambda mine=mine, places=places, order=order: check(places[mine], order[mine]))  # type: ignore[misc]
                step += 1
    device.run(lambda: not device.steps.waiting)
    assert read == 4 * steps - steps // 2

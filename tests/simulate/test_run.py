"""The data file: layout, shards, existing files, kills, signals and full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from processes import forkserver

from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.descriptors.registry import aggregated_names, temporal_names, trajectory_names
from spinlock_fast.errors import ConfigError, DataError, Interrupted, OutputError
from spinlock_fast.generate import main as generate_main
from spinlock_fast.simulate.config import GeneratorConfig
from spinlock_fast.simulate.run import generate
from spinlock_fast.simulate.simulator import Rows, Simulator, aggregate, concatenate_rows
from spinlock_fast.simulate.writer import Writer

CONFIG = GeneratorConfig(
    operators=24, grid_size=32, num_timesteps=64, num_realizations=2, random_seed=3, batch_operators=8, workers=1
)
SETTINGS = "grid_size: 32\nnum_timesteps: 64\nnum_realizations: 2\nrandom_seed: 3\nbatch_operators: 8\n"


def contents(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a file."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.array_equal(value, b[name], equal_nan=value.dtype.kind == "f"), name


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Simulator(CONFIG, torch.device("cpu")).simulate(0, 24)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complete") / "data.h5"
    assert generate(CONFIG, path) == path
    return path


@pytest.fixture
def simulated(rows: Rows) -> Iterator[None]:
    """`generate` writes the rows of `rows`, for tests of the file alone."""

    def stream(self: Simulator, start: int, stop: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Rows]:
        for i in range(start, stop):
            if stopped():
                return
            yield rows.select(slice(i, i + 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulator, "stream", stream)
        yield


def test_layout(complete: Path) -> None:
    with h5py.File(complete) as file:
        expected = {
            "features/summary/aggregated/features": (24, 360),
            "features/summary/per_trajectory/features": (24, 2, 120),
            "features/temporal/features": (24, 64, 63),
            "features/architecture/aggregated/features": (24, 12),
            "inputs/fields": (24, 3, 32, 32),
            "parameters/params": (24, 12),
        }
        for path, shape in expected.items():
            data = file[path]
            assert (data.shape, data.dtype, data.chunks) == (shape, np.float32, (8, *shape[1:])), path
            assert (data.compression, data.compression_opts, data.shuffle) == ("gzip", 4, True), path
        for name in ("ic_types", "evolution_policies", "noise_regimes"):
            assert h5py.check_string_dtype(file["metadata"][name].dtype) is not None
        assert file["metadata/grid_sizes"].dtype == np.int32
        assert (file["metadata/grid_sizes"][:] == 32).all()
        assert (file["metadata/finished"][:] == 1).all()
        assert set(file["metadata/evolution_policies"].asstr()[:]) == {"residual", "convex"}
        assert set(file["metadata/noise_regimes"].asstr()[:]) == {"low", "medium", "high"}
        assert file.attrs["seed"] == 3
        assert json.loads(file.attrs["config"])["grid_size"] == 32
        assert file.attrs["generator_version"]
        assert list(file["features/architecture/aggregated"].attrs["feature_names"])[5] == "noise_scale"
        assert list(file["features/temporal"].attrs["feature_names"]) == temporal_names()
        assert list(file["features/summary/aggregated"].attrs["feature_names"]) == aggregated_names()
        assert list(file["features/summary/per_trajectory"].attrs["feature_names"]) == trajectory_names()
        registry = json.loads(file["features/summary"].attrs["feature_registry"])
        assert registry["temporal"]["early_growth_rate"]["column"] == 46
    assert sorted(os.listdir(complete.parent)) == ["data.h5"]


def test_values_are_those_of_the_simulator(complete: Path, rows: Rows) -> None:
    found = contents(complete)
    assert np.array_equal(found["inputs/fields"], rows.fields)
    assert np.array_equal(found["features/temporal/features"], rows.temporal)
    assert np.array_equal(found["features/summary/aggregated/features"], aggregate(rows.trajectories), equal_nan=True)
    assert np.array_equal(found["metadata/diverged"], rows.diverged)
    architecture = found["features/architecture/aggregated/features"]
    assert architecture.min() >= 0.0
    assert architecture.max() <= 1.0


def test_the_main_job_reads_it_with_names(complete: Path) -> None:
    paths = {
        "summary": "features/summary/aggregated/features",
        "architecture": "features/architecture/aggregated/features",
    }
    with FeatureSource(str(complete), paths) as source:
        assert source.rows == 24
        assert source.feature_names("summary") == aggregated_names()
        assert source.feature_names("architecture")[0] == "num_layers"  # type: ignore[index]


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("count", [2, 5])
def test_shards_follow_each_other_to_the_whole(complete: Path, tmp_path: Path, count: int) -> None:
    parts = [contents(generate(CONFIG, tmp_path / f"{i}.h5", shard=(i, count))) for i in range(count)]
    concatenate_series = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert_same(concatenate_series, contents(complete))


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("compression", ["none", "lzf"])
def test_compression_and_batch_change_only_the_storage(complete: Path, tmp_path: Path, compression: str) -> None:
    changes = {"compression": compression, "batch_operators": 3, "workers": 1}
    path = generate(CONFIG.model_copy(update=changes), tmp_path / "data.h5")
    assert_same(contents(path), contents(complete))
    with h5py.File(path) as file:
        assert file["features/temporal/features"].compression == (None if compression == "none" else compression)


@pytest.mark.usefixtures("simulated")
def test_only_whole_chunks_are_written_whatever_the_tiles(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, write = Simulator.stream, Writer.write
    sizes: list[int] = []

    def in_fives(self: Simulator, start: int, stop: int, *rest: object) -> Iterator[Rows]:
        rows = concatenate_rows(list(stream(self, start, stop)))
        for first in range(0, len(rows), 5):
            yield rows.select(slice(first, first + 5))

    def spy(self: Writer, rows: Rows) -> None:
        sizes.append(len(rows))
        write(self, rows)

    monkeypatch.setattr(Simulator, "stream", in_fives)
    monkeypatch.setattr(Writer, "write", spy)
    assert_same(contents(generate(CONFIG, tmp_path / "data.h5")), contents(complete))
    assert sizes == [8, 8, 8]


@pytest.mark.usefixtures("simulated")
def test_existing_files_are_not_replaced_without_overwrite(complete: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.h5"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists; --overwrite"):
        generate(CONFIG, path)
    assert path.read_bytes() == b"precious"
    assert_same(contents(generate(CONFIG, path, overwrite=True)), contents(complete))
    path.unlink()
    for name in ("data.h5.partial", "data.h5.partial.old"):
        (tmp_path / name).write_bytes(b"unfinished")
        with pytest.raises(OutputError, match="--resume continues"):
            generate(CONFIG, path)
        assert (tmp_path / name).read_bytes() == b"unfinished"
        (tmp_path / name).unlink()


def test_resume_does_not_change_a_complete_file(complete: Path) -> None:
    before = complete.stat().st_mtime_ns
    assert generate(CONFIG, complete, resume=True) == complete
    assert complete.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"random_seed was 3, is 4|seed was 3, is 4"):
        generate(CONFIG.model_copy(update={"random_seed": 4}), complete, resume=True)
    with pytest.raises(ConfigError, match=r"gain was 2\.0, is 1\.0"):
        generate(CONFIG.model_copy(update={"gain": 1.0}), complete, resume=True)
    with pytest.raises(ConfigError, match="operators was 24, is 32"):
        generate(CONFIG.model_copy(update={"operators": 32}), complete, resume=True)


def test_a_damaged_file_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "data.h5.partial").write_bytes(b"no HDF5 at all")
    with pytest.raises(DataError, match=r"damaged.*--overwrite"):
        generate(CONFIG, tmp_path / "data.h5", resume=True)


def test_unwritable_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        generate(CONFIG, tmp_path / "file" / "data.h5")
    with pytest.raises(OutputError, match="is a directory"):
        generate(CONFIG, tmp_path)


def test_settings_without_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--operators"):
        generate(CONFIG.model_copy(update={"operators": None}), tmp_path / "data.h5")
    with pytest.raises(ConfigError, match="is empty for"):
        generate(CONFIG.model_copy(update={"operators": 2}), tmp_path / "data.h5", shard=(0, 4))
    assert not list(tmp_path.iterdir())


def command(directory: Path, operators: int = 24, workers: int = 2) -> list[str]:
    (directory / "settings.yaml").write_text(f"{SETTINGS}workers: {workers}\n")
    fixed = ["--config", str(directory / "settings.yaml"), "--output", str(directory / "data.h5")]
    return [sys.executable, "-m", "spinlock_fast.generate", "--operators", str(operators), *fixed]


def finished_rows(partial: Path) -> int:
    try:
        with h5py.File(partial, "r", swmr=True, libver="latest") as file:
            return int(file["metadata/finished"][:].sum())
    except (OSError, KeyError, RuntimeError):
        return 0


@pytest.mark.slow  # three processes; test_resumed_file_equals_an_uninterrupted_one stops within this one
def test_a_killed_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = 400
    with subprocess.Popen(command(tmp_path, operators=operators), stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "data.h5.partial"
        deadline = time.monotonic() + 300
        while finished_rows(partial) < 8 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "data.h5").exists()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children)  # no worker outlives its parent
    kept = finished_rows(partial)
    assert 8 <= kept < operators
    # What remains is cut down to two batches, so that the test is short: the rows are compared, not the file.
    starts: list[int] = []
    stream = Simulator.stream

    def short(self: Simulator, start: int, stop: int, *rest: object) -> object:
        starts.append(start)
        yield from stream(self, start, start + 16)

    monkeypatch.setattr(Simulator, "stream", short)
    config = CONFIG.model_copy(update={"operators": operators})
    with pytest.raises(DataError, match="not all"):
        generate(config, tmp_path / "data.h5", resume=True)
    assert starts == [kept // 8 * 8]
    assert finished_rows(partial) == starts[0] + 16
    monkeypatch.undo()
    rows = Simulator(config, torch.device("cpu")).simulate(starts[0] - 4, starts[0] + 4)
    with h5py.File(partial) as file:
        place = slice(starts[0] - 4, starts[0] + 4)
        assert np.array_equal(file["features/temporal/features"][place], rows.temporal)
        assert np.array_equal(
            file["features/summary/per_trajectory/features"][place], rows.trajectories, equal_nan=True
        )


@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}, {}])
def test_a_second_run_of_the_same_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, bool]
) -> None:
    """A second process is refused during a run, which is not affected."""
    stream = Simulator.stream

    def second(self: Simulator, start: int, stop: int, *rest: Any) -> Iterator[Rows]:
        monkeypatch.setattr(Simulator, "stream", stream)
        with pytest.raises(OutputError, match=r"is being written by process|exists, from an unfinished run"):
            generate(CONFIG, tmp_path / "data.h5", **how)
        yield from stream(self, start, stop, *rest)

    monkeypatch.setattr(Simulator, "stream", second)
    generate(CONFIG.model_copy(update={"operators": 2}), tmp_path / "data.h5")
    with h5py.File(tmp_path / "data.h5") as file:
        assert np.isfinite(file["features/temporal/features"][:]).all()
    assert os.listdir(tmp_path) == ["data.h5"]


@pytest.mark.parametrize("name", ["data.h5.partial", "data.h5.partial.old"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path: Path, name: str, there: bool) -> None:
    victim = tmp_path / "victim.h5"
    if there:
        victim.write_text("mine")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(OutputError, match="exists, from an unfinished run"):
        generate(CONFIG, tmp_path / "data.h5")
    with pytest.raises(OutputError, match="is a symbolic link"):
        generate(CONFIG, tmp_path / "data.h5", resume=True)
    generate(CONFIG.model_copy(update={"operators": 1}), tmp_path / "data.h5", overwrite=True)
    assert victim.exists() == there
    assert not there or victim.read_text() == "mine"


def test_the_output_may_be_a_link_to_a_file_but_no_device(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data.h5").symlink_to("elsewhere/target.h5")
    generate(CONFIG.model_copy(update={"operators": 1}), tmp_path / "data.h5")
    assert (tmp_path / "data.h5").is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["target.h5"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        generate(CONFIG, tmp_path / "pipe", overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("batch", [8, 24])  # the second is not full when the signal comes
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_between_operators(
    number: signal.Signals, status: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, handler = Simulator.stream, signal.getsignal(number)

    def signalled(self: Simulator, start: int, stop: int, stopped: Callable[[], bool]) -> Iterator[Rows]:
        for done, rows in enumerate(stream(self, start, stop, stopped)):
            if done == 10:
                signal.raise_signal(number)
            yield rows

    monkeypatch.setattr(Simulator, "stream", signalled)
    with pytest.raises(Interrupted, match="8 of 24 operators are kept, --resume continues") as stopped:
        generate(CONFIG.model_copy(update={"batch_operators": batch}), tmp_path / "data.h5")
    assert stopped.value.exit_status == status
    assert signal.getsignal(number) is handler
    assert sorted(os.listdir(tmp_path)) == ["data.h5.partial"]


@pytest.mark.usefixtures("simulated")
def test_resumed_file_equals_an_uninterrupted_one(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Simulator.stream

    def broken(self: Simulator, start: int, stop: int, *rest: object) -> object:
        for done, rows in enumerate(stream(self, start, stop)):
            if done == 11:
                raise OSError("the machine went away")
            yield rows

    monkeypatch.setattr(Simulator, "stream", broken)
    with pytest.raises(OSError, match="went away"):
        generate(CONFIG, tmp_path / "data.h5")
    monkeypatch.undo()
    assert finished_rows(tmp_path / "data.h5.partial") == 8
    assert_same(contents(generate(CONFIG, tmp_path / "data.h5", resume=True)), contents(complete))
    assert sorted(os.listdir(tmp_path)) == ["data.h5"]
    assert abs((tmp_path / "data.h5").stat().st_size - complete.stat().st_size) < 4096


def generate_with_file_limit(arguments: list[str], errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))
    generate_main(arguments)


@pytest.mark.usefixtures("simulated")
def test_a_full_disk(tmp_path: Path) -> None:
    arguments = command(tmp_path, workers=1)[3:]
    process = forkserver().Process(target=generate_with_file_limit, args=(arguments, tmp_path / "errors"))
    process.start()
    process.join(60.0)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 4, errors
    assert "cannot be written: the limit on the file's size is reached" in errors.splitlines()[-1]
    assert "of 24 operators are kept, --resume continues" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "data.h5").exists()
    kept = finished_rows(tmp_path / "data.h5.partial")
    assert kept >= 8
    path = generate(CONFIG, tmp_path / "data.h5", resume=True)
    assert contents(path)["metadata/finished"].all()

"""`extract`: one file of features from every layout; kills, shards, missing samples, and `train` on the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import largest_file, raises_one_line
from trajectory_files import (
    CHANNELS,
    SPACING,
    STEP,
    smooth_fields,
    write_pdebench_arrays,
    write_pdebench_groups,
    write_py_pde,
    write_well,
)

from spinlock_fast.descriptors import describe
from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.extract import main
from spinlock_fast.trajectories import extraction
from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options

FIELDS = smooth_fields(samples=7)
FAMILIES = {"temporal": "features/temporal/features", "summary": "features/summary/aggregated/features"}
ARRAY = ["--axes", "n t c y x", "--fields", ",".join(CHANNELS), "--spacing", f"{SPACING[1]},{SPACING[0]}"]
ARRAY += ["--time-step", str(STEP)]


def command(*arguments: object) -> None:
    """The command line; raises SystemExit with a status that is not 0."""
    try:
        main([str(argument) for argument in (*arguments, "--device", "cpu", "--quiet")])
    except SystemExit as ended:
        if ended.code:
            raise


def features(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return {name: file[dataset][()] for name, dataset in FAMILIES.items()}


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "fields.npy", FIELDS)
    return tmp_path / "fields.npy"


def test_every_layout_gives_the_same_features(tmp_path: Path, array: Path) -> None:
    expected = describe(FIELDS, "n t c y x", spacing=SPACING, time_step=STEP)
    inputs = {
        "array": [array, *ARRAY],
        "well": [write_well(tmp_path / "w.h5", FIELDS)],
        "pdebench": [write_pdebench_arrays(tmp_path / "p.h5", FIELDS)],
        "groups": [write_pdebench_groups(tmp_path / "g.h5", FIELDS)],
        "pypde": [write_py_pde(tmp_path / f"{i}.h5", sample) for i, sample in enumerate(FIELDS)],
    }
    for name, arguments in inputs.items():
        output = tmp_path / f"{name}.features.h5"
        command(*arguments, "--output", output)
        for family, values in features(output).items():
            np.testing.assert_allclose(values, expected[family], rtol=2e-4, atol=1e-5, err_msg=name)
        with h5py.File(output) as file:
            for family, dataset in FAMILIES.items():
                assert list(file[dataset].parent.attrs["feature_names"]) == expected.names[family]
            assert file.attrs["time_step"] == pytest.approx(STEP)
        assert not output.with_name(f"{output.name}.partial").exists()


def test_the_registry_of_the_file_has_units_and_what_a_descriptor_changes_with(tmp_path: Path, array: Path) -> None:
    command(array, *ARRAY, "--output", tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        found = json.loads(file["features/summary"].attrs["feature_registry"])
    assert found["temporal"]["activity"]["unit"] == "u/step"
    assert found["temporal"]["activity"]["changes_with"] == ["units", "time step"]


def test_parameters_become_the_architecture_family(tmp_path: Path) -> None:
    a = write_well(tmp_path / "a.h5", FIELDS[:3], {"nu": 1.0})
    b = write_well(tmp_path / "b.h5", FIELDS[3:], {"nu": 3.0})
    command(a, b, "--output", tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["parameters/params"][:, 0].tolist() == [1.0] * 3 + [3.0] * 4
        scaled = file["features/architecture/aggregated/features"]
        assert scaled[:, 0].tolist() == [0.0] * 3 + [1.0] * 4
        assert (scaled.attrs["low"][0], scaled.attrs["high"][0]) == (1.0, 3.0)
        assert list(file["parameters"].attrs["feature_names"]) == ["nu"]
        assert file["metadata/source_rows"][:].tolist() == [0, 1, 2, 0, 1, 2, 3]
        assert Path(file["metadata/source_files"].asstr()[3]) == b


def test_shards_follow_each_other_to_the_whole(tmp_path: Path, array: Path) -> None:
    command(array, *ARRAY, "--output", tmp_path / "whole.h5")
    for i in range(3):
        command(array, *ARRAY, "--output", tmp_path / f"{i}.h5", "--shard", f"{i}/3")
    whole, parts = features(tmp_path / "whole.h5"), [features(tmp_path / f"{i}.h5") for i in range(3)]
    for family, values in whole.items():
        assert np.array_equal(np.concatenate([part[family] for part in parts]), values)


@pytest.mark.parametrize(("step", "value"), [(3, np.nan), (0, 1e300)])  # the latter overflows in float32
def test_a_sample_that_is_not_finite_is_kept_and_flagged(
    step: int, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = FIELDS.astype(np.float64)
    fields[2, step, 0, 1, 1] = value
    np.save(tmp_path / "a.npy", fields)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.npy"), *ARRAY, "--output", str(tmp_path / "f.h5"), "--device", "cpu"])
    assert "1 of 7 trajectories diverged" in " ".join(capsys.readouterr().err.split())
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["metadata/diverged"][:].tolist() == [0, 0, 1, 0, 0, 0, 0]
    for values in features(tmp_path / "f.h5").values():
        assert np.isnan(values[2]).all()
        assert np.isfinite(np.delete(values, 2, 0)).all()


def test_blocks_that_are_done_are_kept(tmp_path: Path, array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "BLOCK", 2)
    options = Options(axes="n t c y x")
    whole = features(extract(str(array), tmp_path / "whole.h5", options=options))

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise StoppedError

    output = tmp_path / "f.h5"
    with pytest.raises(StoppedError):
        extract(str(array), output, options=options, progress=stop)
    partial = tmp_path / "f.h5.partial"
    assert len(list(partial.glob("*.npz"))) == 2
    with raises_one_line(OutputError, "an unfinished extraction is there; --resume goes on"):
        extract(str(array), output, options=options)
    with raises_one_line(ConfigError, "made with other settings", "time_step differs"):
        extract(str(array), output, options=Options(axes="n t c y x", time_step=2.0), resume=True)
    done: list[int] = []
    extract(str(array), output, options=options, resume=True, progress=lambda now, total: done.append(now))
    assert done == [5, 6, 7]
    for family, values in features(output).items():
        assert np.array_equal(values, whole[family])


def test_a_damaged_block_is_described_again(tmp_path: Path, array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(axes="n t c y x")
    write = extraction._write
    monkeypatch.setattr(extraction, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        extract(str(array), tmp_path / "f.h5", options=options)
    monkeypatch.setattr(extraction, "_write", write)
    block = next((tmp_path / "f.h5.partial").glob("*.npz"))
    block.write_bytes(block.read_bytes()[:100])
    with raises_one_line(DataError, "is damaged", "--resume describes it again"):
        extract(str(array), tmp_path / "f.h5", options=options, resume=True)
    extract(str(array), tmp_path / "f.h5", options=options, resume=True)
    assert (tmp_path / "f.h5").exists()


def test_files_that_changed_are_not_resumed(tmp_path: Path, array: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(axes="n t c y x")
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extract(str(array), tmp_path / "f.h5", options=options)
    os.utime(array, ns=(1, 1))
    with raises_one_line(ConfigError, "files have changed; --overwrite starts again"):
        extract(str(array), tmp_path / "f.h5", options=options, resume=True)
    extract(str(array), tmp_path / "f.h5", options=options, overwrite=True)


def test_an_output_that_exists_is_not_replaced(tmp_path: Path, array: Path) -> None:
    (tmp_path / "f.h5").write_text("mine")
    with raises_one_line(OutputError, "exists; --overwrite replaces it"):
        extract(str(array), tmp_path / "f.h5", options=Options(axes="n t c y x"))
    assert (tmp_path / "f.h5").read_text() == "mine"


def test_an_input_is_never_replaced(tmp_path: Path, array: Path) -> None:
    before = array.read_bytes()
    link = tmp_path / "link.npy"
    link.symlink_to(array)
    for output in (array, link):
        with raises_one_line(OutputError, "is one of the files to read"):
            extract(str(array), output, options=Options(axes="n t c y x"), overwrite=True)
    assert array.read_bytes() == before


@pytest.mark.parametrize("settings", [{"overwrite": True}, {"resume": True}])
def test_a_directory_of_the_user_is_never_removed(settings: dict[str, bool], tmp_path: Path, array: Path) -> None:
    partial = tmp_path / "f.h5.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with raises_one_line(OutputError, "is not a directory of an extraction (thesis.txt)"):
        extract(str(array), tmp_path / "f.h5", options=Options(axes="n t c y x"), **settings)
    assert (partial / "thesis.txt").read_text() == "mine"
    (partial / "thesis.txt").unlink()
    partial.rmdir()
    partial.write_text("an unfinished simulation")
    with raises_one_line(OutputError, "is not a directory of an extraction (a file)"):
        extract(str(array), tmp_path / "f.h5", options=Options(axes="n t c y x"), **settings)


@pytest.mark.parametrize("kind", ["fortran", ">f4", ">f8", "f2", "i2", "longdouble"])
def test_stored_types_and_orders_give_the_same_features(kind: str, tmp_path: Path) -> None:
    fields = np.round(8.0 * FIELDS) / 8.0 if kind == "f2" else np.round(100.0 * FIELDS)
    expected = describe(fields, "n t c y x")
    stored = np.asfortranarray(fields) if kind == "fortran" else fields.astype(kind)
    np.save(tmp_path / "a.npy", stored)
    extract(str(tmp_path / "a.npy"), tmp_path / "f.h5", options=Options(axes="n t c y x"))
    assert np.array_equal(features(tmp_path / "f.h5")["temporal"], expected["temporal"])


def test_a_full_disk_is_one_line_and_blocks_are_kept(tmp_path: Path, array: Path) -> None:
    output = tmp_path / "f.h5"
    with largest_file(100), raises_one_line(OutputError, "cannot be written", "File too large"):
        extract(str(array), output, options=Options(axes="n t c y x"))
    assert not output.exists()
    with largest_file(60_000), raises_one_line(OutputError, "f.h5: cannot be written", "File too large"):
        extract(str(array), output, options=Options(axes="n t c y x"), overwrite=True)
    extract(str(array), output, options=Options(axes="n t c y x"), resume=True)


def test_a_second_process_is_refused(tmp_path: Path, array: Path) -> None:
    from spinlock_fast.output.locks import locked

    with locked(tmp_path / "f.h5"), raises_one_line(OutputError, "f.h5"):
        extract(str(array), tmp_path / "f.h5", options=Options(axes="n t c y x"))


@pytest.mark.slow  # four processes; test_blocks_that_are_done_are_kept resumes in this one
def test_a_killed_command_is_resumed(tmp_path: Path) -> None:
    fields = smooth_fields(samples=400, extents=(24, 24))
    np.save(tmp_path / "fields.npy", fields)
    line = [sys.executable, "-m", "spinlock_fast.extract", str(tmp_path / "fields.npy"), "--axes", "n t c y x"]
    line += ["--device", "cpu", "--quiet"]
    partial = tmp_path / "f.h5.partial"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [*line, "--output", str(tmp_path / "f.h5"), "--resume"], stderr=subprocess.PIPE, text=True
        )
        before = len(list(partial.glob("*.npz")))
        deadline = time.monotonic() + 60.0
        while len(list(partial.glob("*.npz"))) == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        if number == signal.SIGTERM and process.returncode:
            assert process.returncode == 143
            assert "--resume goes on" in errors
            assert errors.count("\n") == 1
    subprocess.run([*line, "--output", str(tmp_path / "f.h5"), "--resume"], check=True)
    extract(str(tmp_path / "fields.npy"), tmp_path / "whole.h5", options=Options(axes="n t c y x"))
    for family, values in features(tmp_path / "whole.h5").items():
        assert np.array_equal(features(tmp_path / "f.h5")[family], values)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--axes", "n t q y x"], 2),
        (["--axes", "n t c y x", "--spacing", "0"], 2),
        (["--axes", "n t c y x", "--time-step", "-1"], 2),
        (["--axes", "n t c y x", "--shard", "3/2"], 2),
        (["--axes", "n t c y x", "--memory-budget", "much"], 2),
        (["--layout", "well"], 3),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], status: int, tmp_path: Path, array: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(array, *arguments, "--output", tmp_path / "f.h5")
    assert ended.value.code == status
    errors = capfd.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "f.h5").exists()


def test_a_tokenizer_is_trained_on_the_features(tmp_path: Path) -> None:
    from spinlock_fast.tokenize import main as tokenize
    from spinlock_fast.train import main as train

    rng = np.random.default_rng(0)
    fields = np.concatenate([smooth_fields(40), 3.0 * rng.standard_normal((40, 6, 2, 8, 12)).astype(np.float32)])
    command(write_well(tmp_path / "w.h5", fields), "--output", tmp_path / "f.h5")
    settings = ["training.num_epochs=3", "training.batch_size=32", "training.joint_search_epochs=2"]
    settings += ["logging.tensorboard=false", "device=cpu"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    for verb, given in (
        (
            train,
            [
                str(Path(__file__).parents[2] / "configs" / "trajectories.yaml"),
                "--set",
                f"dataset_path={tmp_path}/f.h5",
                *arguments,
                "--output",
                f"{tmp_path}/c",
            ],
        ),
        (tokenize, [f"{tmp_path}/c", f"{tmp_path}/f.h5", "--output", f"{tmp_path}/t.h5"]),
    ):
        with pytest.raises(SystemExit) as ended:
            verb([*given, "--quiet"])
        assert not ended.value.code
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["tokens"].shape[0] == 80
        assert len(np.unique(file["tokens"][:], axis=0)) > 10

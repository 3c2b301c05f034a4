"""`extract --parameters`: tables of parameters beside the fields."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import raises_one_line
from trajectory_files import smooth_fields, write_well

from spinlock_fast.errors import ConfigError, DataError, OutputError
from spinlock_fast.trajectories import open_trajectories
from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.given_parameters import read_given_parameters
from spinlock_fast.trajectories.options import Options

FIELDS = smooth_fields()


def given(name: object, **arrays: object) -> dict[str, list[float]]:
    return {key: values.tolist() for key, values in read_given_parameters(str(name), [], [3, 2]).items()}


def test_tables_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffnu, Re\r\n" + "".join(f"{i},1e{i}\r\n" for i in range(5)) + "\r\n")
    assert given(tmp_path / "a.csv") == {"nu": [0.0, 1.0, 2.0, 3.0, 4.0], "Re": [1.0, 10.0, 100.0, 1e3, 1e4]}
    np.save(tmp_path / "nu.npy", np.arange(5, dtype=">i2"))
    assert given(tmp_path / "nu.npy") == {"nu": [0.0, 1.0, 2.0, 3.0, 4.0]}
    np.save(tmp_path / "p.npy", np.arange(10.0).reshape(5, 2))
    assert given(tmp_path / "p.npy") == {"p_0": [0.0, 2.0, 4.0, 6.0, 8.0], "p_1": [1.0, 3.0, 5.0, 7.0, 9.0]}


def test_a_dataset_of_every_file_replaces_parameters_of_the_layout(tmp_path: Path) -> None:
    paths = [write_well(tmp_path / f"{i}.h5", FIELDS[:2], {"nu": 1.0, "mu": 2.0}) for i in range(2)]
    for i, path in enumerate(paths):
        with h5py.File(path, "a") as file:
            file["nu"] = np.array([i, i + 0.5])
    found = open_trajectories([str(path) for path in paths], options=Options(parameters="nu")).parameters
    assert {name: values.tolist() for name, values in found.items()} == {"mu": [2.0] * 4, "nu": [0.0, 0.5, 1.0, 1.5]}


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("a.csv", None, ["a.csv", "No such file"]),
        ("a.csv", "", ["is empty; expected a line of column names"]),
        ("a.csv", "nu\n", ["has 0 rows for 5 trajectories"]),
        ("a.csv", "nu, nu\n1,2\n", ["2 columns are named nu"]),
        ("a.csv", ",nu\n0,1\n", ["column 1 has no name", "index=False"]),
        ("a.csv", "nu;mu\n1;2\n", ["separated by ';'; expected commas"]),
        ("a.csv", "nu,mu\n1,2\n3\n", ["line 3 has 1 values, the first line has 2"]),
        ("a.csv", "kind\n" + "wave\n" * 5, ["line 2: kind: expected a number", "'wave'", "--conditions"]),
        ("a.csv", "nu\n" + "1\n" * 4, ["has 4 rows for 5 trajectories"]),
        ("a.csv", "nu\n1\n2\nnan\n4\n5\n", ["nu: row 2 is not a finite number"]),
        ("a.npy", "no array", ["a.npy: cannot be read as .npy"]),
    ],
)
def test_tables_that_do_not_fit_are_one_line(name: str, text: str | None, messages: list[str], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with raises_one_line(DataError, *messages):
        given(tmp_path / name)


def test_datasets_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    path = write_well(tmp_path / "a.h5", FIELDS)
    with h5py.File(path, "a") as file:
        file["short"], file["deep"], file["text"] = np.zeros(3), np.zeros((5, 1, 1)), ["a"] * 5
    for name, message in (
        ("none", "a.h5: no dataset 'none'"),
        ("scalars", "a.h5: no dataset 'scalars'"),
        ("short", "a.h5: short has 3 rows for 5 trajectories"),
        ("deep", "a.h5: deep: expected numbers [N] or [N, P], got float64 [5, 1, 1]"),
        ("text", "a.h5: text: expected numbers [N] or [N, P], got object [5]"),
    ):
        with raises_one_line(DataError, message):
            open_trajectories(str(path), options=Options(parameters=name))
    np.save(tmp_path / "b.npy", FIELDS)
    with raises_one_line(DataError, "b.npy has no datasets; name a .csv or .npy file"):
        open_trajectories(str(tmp_path / "b.npy"), options=Options(axes="n t c y x", parameters="nu"))


def test_a_table_is_an_input_like_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not replaced, and an extraction is not resumed with another one."""
    np.save(tmp_path / "f.npy", FIELDS)
    np.save(tmp_path / "nu.npy", np.arange(5.0))
    options = Options(axes="n t c y x", parameters=str(tmp_path / "nu.npy"))
    with raises_one_line(OutputError, "is one of the files to read"):
        extract(str(tmp_path / "f.npy"), tmp_path / "nu.npy", options=options, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "spinlock_fast.trajectories.extraction._write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            extract(str(tmp_path / "f.npy"), tmp_path / "o.h5", options=options)
    np.save(tmp_path / "nu.npy", np.arange(5.0, dtype=np.float32))
    with raises_one_line(ConfigError, "files have changed"):
        extract(str(tmp_path / "f.npy"), tmp_path / "o.h5", options=options, resume=True)

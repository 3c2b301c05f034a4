"""Arrays, frames and fields as users have them: read as they mean, or refused in one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import planted_matrix, raises_one_line

from spinlock_fast import BehaviourLoss, Tokenizer
from spinlock_fast.descriptors import describe
from spinlock_fast.descriptors.describe import Families
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.extract import main as extract_main

TINY = {
    "num_epochs": 1,
    "batch_size": 32,
    "device": "cpu",
    "group_hidden_dim": 16,
    "levels": [{"num_tokens": 3, "latent_dim": 4}],
}
Fields = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def fields() -> Fields:
    """[N, T, C, Y, X] = [12, 5, 2, 4, 8]."""
    return np.cumsum(np.random.default_rng(0).standard_normal((12, 5, 2, 4, 8)), 1).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> Fields:
    return planted_matrix(60, [3, 3], seed=0)


@pytest.mark.parametrize("one", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_single_values_of_any_kind(fields: Fields, one: Any) -> None:
    fields = fields[:2]
    expected = describe(fields, spacing=0.5, periodic=False)
    found = describe(fields, "n,t,c,y,x", spacing=one, periodic=np.bool_(False))
    assert np.array_equal(found["summary"], expected["summary"])


@pytest.mark.parametrize(
    ("shape", "arguments", "text"),
    [
        ((2, 3, 0, 4), {"axes": "n t c x"}, "axis c has length 0"),
        ((2, 3, 0, 4), {"axes": "n t m x"}, "axis m has length 0"),
        ((2, 3, 1, 4), {"axes": "n t c x", "periodic": "no"}, "periodic must be one value"),
        ((2, 3, 1, 4), {"axes": "n t c x", "spacing": "dx"}, "spacing must be one value"),
        ((2, 3, 1, 4), {"axes": "n t c x", "time_step": "dt"}, "time_step must be positive"),
        ((2, 3, 1, 4), {"axes": "n t c x", "time_step": None}, "time_step must be positive"),
    ],
)
def test_wrong_arguments_of_describe(shape: tuple[int, ...], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        describe(np.zeros(shape), **arguments)


def test_dimensions_of_data_arrays_are_not_ignored(fields: Fields) -> None:
    class DataArray(np.ndarray):  # type: ignore[type-arg]
        dims = ("t", "n", "c", "y", "x")

    array = fields.view(DataArray)
    with pytest.raises(ValueError, match="dimensions of fields are t n c y x"):
        describe(array, "n t c y x")
    assert len(describe(array, "t n c y x")["summary"]) == 5
    DataArray.dims = ("time", "run", "c", "y", "x")  # type: ignore[assignment]
    assert len(describe(array, "n t c y x")["summary"]) == 12


def test_a_simulation_that_blows_up_is_missing(fields: Fields) -> None:
    """Before NaN come values whose descriptors overflow: an infinite one would make the whole set unusable."""
    values = fields.copy()
    values[3, 4] *= 1e30
    found = describe(values)
    for array in found.values():
        assert np.isnan(array[3]).all()
        assert np.isfinite(np.delete(array, 3, 0)).all()
    summary = {"summary": found["summary"]}
    assert len(Tokenizer(settings=TINY).fit(summary).transform(summary)) == 12


def test_columns_in_another_order_are_refused(fields: Fields, tmp_path: Path) -> None:
    families = describe(fields[:, :, 0, 0], "n t x")
    tokenizer = Tokenizer(settings=TINY).fit(families)
    for name, values in families.items():
        other = Families({**families, name: values[..., ::-1]}, {**families.names, name: families.names[name][::-1]})
        for use in (tokenizer.transform, tokenizer.encode, tokenizer.features, tokenizer.score):
            with raises_one_line(DataError, f"family '{name}'", "in name or order", families.names[name][-1]):
                use(other)
        path = tmp_path / f"{name}.h5"
        with h5py.File(path, "w") as file:
            for family, dataset in ((f.name, f.dataset) for f in tokenizer.families):
                file[dataset] = other[family]
                file[dataset].attrs["feature_names"] = other.names[family]
        with raises_one_line(DataError, str(path), "in name or order"):
            tokenizer.encode(path)
    assert np.array_equal(tokenizer.encode(dict(families)), tokenizer.encode(families))  # without names


def test_frames(rows: Fields) -> None:
    pandas = pytest.importorskip("pandas", reason="data frames")
    frame = pandas.DataFrame(rows, columns=list("abcdef"))
    with_missing = frame.convert_dtypes()
    with_missing.iloc[3, 2] = pandas.NA
    holes = rows.copy()
    holes[3, 2] = np.nan
    tokenizer = Tokenizer(settings=TINY).fit(with_missing)
    assert np.array_equal(tokenizer.transform(with_missing), Tokenizer(settings=TINY).fit(holes).transform(holes))
    mixed = frame.assign(a=frame["a"] > 0)  # an object array
    family = Tokenizer(settings=TINY).fit({"s": mixed})
    assert len(family.transform({"s": mixed})) == 60
    with raises_one_line(DataError, "family 's'", "in name or order"):
        family.transform({"s": mixed[mixed.columns[::-1]]})
    for wrong in (["u", "v"] * 30, pandas.Categorical(["u", "v"] * 30), pandas.date_range("2020", periods=60)):
        with raises_one_line(DataError, "numbers"):
            Tokenizer(settings=TINY).fit(frame.assign(kind=wrong))


def test_other_kinds_of_arrays(fields: Fields, rows: Fields) -> None:
    sparse = pytest.importorskip("scipy.sparse", reason="scipy")
    tokenizer = Tokenizer(settings=TINY).fit(rows)
    dense = torch.from_numpy(rows)
    for use in (tokenizer.transform, tokenizer.score, Tokenizer(settings=TINY).fit):
        for values in (sparse.csr_matrix(rows), dense.to_sparse(), {"x": sparse.csr_array(rows)}):
            with raises_one_line(DataError, "sparse", "dense"):
                use(values)
        with raises_one_line(DataError, "describe"):
            use(fields)
    assert np.array_equal(tokenizer.transform({"x": rows.astype(object)}), tokenizer.transform(rows))


def test_tokens_of_another_shape(rows: Fields) -> None:
    tokenizer = Tokenizer(settings=TINY).fit(rows)
    tokens = tokenizer.transform(rows)
    for wrong in (tokens[0], tokens[:, :1], tokens[:, :0], tokens[None]):
        with raises_one_line(DataError, "tokens: expected [N, "):
            tokenizer.decode(wrong)
    with raises_one_line(DataError, "tokens: expected a dense tensor"):
        tokenizer.decode(torch.from_numpy(tokens).to_sparse())


def test_a_loaded_tokenizer_checks_the_columns_of_a_frame(rows: Fields, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="data frames")
    frame = pandas.DataFrame(rows, columns=list("abcdef"))
    loaded = Tokenizer.from_pretrained(Tokenizer(settings=TINY).fit(frame).save(tmp_path / "c"))
    assert np.array_equal(loaded.transform(frame), loaded.transform(rows))
    with raises_one_line(DataError, "in name or order: 'f' instead of 'a'"):
        loaded.transform(frame[frame.columns[::-1]])
    tokens = loaded.set_output(transform="pandas").transform(frame.iloc[5:])
    assert tokens.columns.tolist() == loaded.get_feature_names_out().tolist()
    assert tokens.index[0] == 5
    assert isinstance(loaded.score(frame), float)


def test_output_of_a_pipeline(rows: Fields) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn")
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(Tokenizer(settings=TINY)).set_output(transform="default").fit(rows)
    assert isinstance(pipeline.transform(rows), np.ndarray)
    kept = clone(pipeline.set_output(transform="pandas"))
    assert kept[0]._sklearn_output_config == {"transform": "pandas"}
    with raises_one_line(ConfigError, "excel"):
        Tokenizer().set_output(transform="excel")


def test_threads_give_the_result_of_one(rows: Fields) -> None:
    """They share torch's random state."""
    alone = [Tokenizer(settings=TINY).fit(rows, random_seed=seed).inverse_transform([[0, 0]]) for seed in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        fitted = list(pool.map(lambda seed: Tokenizer(settings=TINY).fit(rows, random_seed=seed), (1, 2, 3)))
    for expected, tokenizer in zip(alone, fitted, strict=True):
        assert np.array_equal(tokenizer.inverse_transform([[0, 0]]), expected)


@pytest.mark.parametrize(
    ("shape", "axes", "text"),
    [((2, 3, 0, 4), "n t c x", "axis c"), ((0, 3, 4), "n t x", "axis n"), ((2, 3, 0), "n t x", "axis x")],
)
def test_empty_arrays_of_extract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...], axes: str, text: str
) -> None:
    np.save(tmp_path / "u.npy", np.zeros(shape))
    assert _extract(str(tmp_path / "u.npy"), "--axes", axes, "--output", str(tmp_path / "f.h5")) == 3
    assert f"{text} has length 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.npy", "missing*.h5", "missing.zarr"])
def test_a_missing_simulation_is_not_generated(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert _extract(name, "--axes", "n t x", "--output", "f.h5") == 3
    error = capsys.readouterr().err
    assert name in error
    assert "generate" not in error


def _extract(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as end:
        extract_main(arguments)
    return end.value.code


def test_what_a_behaviour_loss_refuses(fields: Fields) -> None:
    tokenizer = Tokenizer(settings=TINY).fit(describe(fields[:, :, 0, 0], "n t x"))
    loss = BehaviourLoss(tokenizer, {"axes": "n t x"})
    u = torch.from_numpy(fields[:4, :, 0, 0])
    assert bool(loss(u, u)["latent"] == 0.0)
    for predicted, target in ((u.numpy(), u), (u, u.numpy()), (u.numpy(), u.numpy())):
        with raises_one_line(DataError, "torch tensor", "ndarray"):
            loss(predicted, target)
    with raises_one_line(DataError, "no values"):
        loss(u[:0], u[:0])
    with raises_one_line(ConfigError, "from_checkpoint"):
        BehaviourLoss("checkpoints/mine")  # type: ignore[arg-type]

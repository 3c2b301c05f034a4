"""`predict`: training, measuring and applying a predictor of tokens."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spinlock_fast import Tokenizer
from spinlock_fast.errors import Interrupted
from spinlock_fast.extract import main as extract_main
from spinlock_fast.predict import main
from spinlock_fast.prediction import training
from spinlock_fast.prediction.cached_inputs import CachedInputs
from spinlock_fast.prediction.inputs import Inputs
from spinlock_fast.prediction.network import InputShape, TokenNetwork
from spinlock_fast.prediction.settings import PredictorConfig, load_predictor_config
from spinlock_fast.prediction.training import train_predictor
from spinlock_fast.tokenize import main as tokenize_main

ROWS = 400
SMALL = ["hidden_dim=32", "channels=4", "stages=2", "batch_size=64", "learning_rate=0.003"]


def write_data(path: Path, seed: int, rows: int = ROWS, features: bool = True) -> Path:
    """Features that depend on theta, and on the mean and the roughness of u0, with noise."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal((rows, 3))
    level, rough = rng.standard_normal(rows), rng.random(rows)
    field = level[:, None, None, None] + rough[:, None, None, None] * rng.standard_normal((rows, 2, 8, 8))
    causes = np.column_stack([theta[:, 0], theta[:, 1], level, 3.0 * rough])
    columns = np.repeat(causes, 5, axis=1) + 0.2 * rng.standard_normal((rows, 20))
    with h5py.File(path, "w") as file:
        file["parameters/params"] = 5.0 + 3.0 * theta
        file["parameters/params"].attrs["feature_names"] = ["a", "b", "c"]
        file["inputs/fields"] = field.astype(np.float32)
        if features:
            file["features/summary/aggregated/features"] = columns.astype(np.float32)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.h5", seed=0)


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    levels = [{"num_tokens": 6, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 4}]
    tokenizer = Tokenizer(
        num_epochs=15, batch_size=64, topo_samples=64, device="cpu", group_hidden_dim=32, levels=levels
    )
    return tokenizer.fit(data).save(tmp_path_factory.mktemp("checkpoint"))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def train(checkpoint: Path, data: Path, output: Path, *settings: str, extra: tuple[str, ...] = ()) -> int:
    changes = [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    return run("train", checkpoint, data, "--output", output, "--device", "cpu", "--quiet", *changes, *extra)


@pytest.fixture(scope="module")
def predictor(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "predictor"
    assert train(checkpoint, data, output, "num_epochs=25") == 0
    return output


def test_a_predictor_is_better_than_its_references(predictor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in predictor.iterdir()} == {"predictor.pt", "metrics.json"}
    metrics = json.loads((predictor / "metrics.json").read_text())
    accuracy, loss, error = metrics["accuracy"], metrics["log_loss"], metrics["features_error"]
    assert accuracy["predicted"] > accuracy["nearest"] > accuracy["majority"]
    assert loss["predicted"] < loss["nearest"] < loss["majority"]
    assert error["true_tokens"] < error["predicted"] < error["nearest"] < error["majority"]
    assert error["regression"] < error["predicted"]
    assert error["mean"] == pytest.approx(1.0, abs=0.3)
    assert metrics["samples"] == 40  # the validation rows of the tokenizer's run
    assert (metrics["trained_rows"], metrics["validation_rows"]) == (324, 36)
    assert sum(row["count"] for row in metrics["calibration"]) == 40 * len(metrics["codebooks"])
    assert 0.0 <= metrics["calibration_error"] < 0.3
    best = metrics["history"][metrics["best_epoch"] - 1]
    assert loss["predicted"] == pytest.approx(best["val_tokens"], rel=0.015)  # both given the true tokens
    assert metrics["history"][-1]["train_loss"] < metrics["history"][0]["train_loss"]


def test_parameters_in_another_order_are_refused(
    predictor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_data(tmp_path / "new.h5", seed=1, rows=20, features=False)
    apply = ("apply", predictor, path, "--device", "cpu", "--quiet", "--output", tmp_path / "tokens.h5")
    with h5py.File(path, "r+") as file:
        file["parameters/params"].attrs["feature_names"] = ["b", "a", "c"]
    assert run(*apply) == 3
    assert "differ from those of training, in name or order: ['b', 'a', 'c'] instead of ['a'" in capsys.readouterr().err
    with h5py.File(path, "r+") as file:
        del file["parameters/params"].attrs["feature_names"]
    assert run(*apply) == 0


def test_eval_repeats_the_metrics_of_the_training_rows_apart(
    predictor: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("eval", predictor, data, "--json", tmp_path / "m.json", "--device", "cpu") == 0
    measured, trained = (
        json.loads((tmp_path / "m.json").read_text()),
        json.loads((predictor / "metrics.json").read_text()),
    )
    for name in ("accuracy", "log_loss", "features_error"):
        assert measured[name] == pytest.approx(trained[name], rel=1e-5)
    assert "accuracy of a token" in capsys.readouterr().out
    other = write_data(tmp_path / "new.h5", seed=1, rows=100)
    assert run("eval", predictor, other, "--json", tmp_path / "n.json", "--device", "cpu", "--quiet") == 0
    new = json.loads((tmp_path / "n.json").read_text())
    assert (new["samples"], new["rows"]) == (100, "heldout")
    assert new["accuracy"]["predicted"] > new["accuracy"]["majority"] + 0.05


def test_apply_needs_no_features(predictor: Path, checkpoint: Path, tmp_path: Path) -> None:
    inputs = write_data(tmp_path / "inputs.h5", seed=1, rows=100, features=False)
    assert run("apply", predictor, inputs, "--output", tmp_path / "tokens.h5", "--device", "cpu", "--quiet") == 0
    with h5py.File(tmp_path / "tokens.h5") as file:
        predicted = file["tokens"][()]
        digest = file["tokens"].attrs["checkpoint_sha256"]
    assert digest == Tokenizer.from_checkpoint(checkpoint).checkpoint_hash
    full = write_data(tmp_path / "full.h5", seed=1, rows=100)
    with pytest.raises(SystemExit):
        tokenize_main([str(checkpoint), str(full), "--output", str(tmp_path / "true.npy"), "--quiet"])
    true = np.load(tmp_path / "true.npy")
    assert predicted.shape == true.shape
    assert (predicted == true).mean() > 0.5


def test_each_input_alone(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    found = {}
    for name, settings in (("theta", ["fields=null"]), ("field", ["parameters=null", "autoregressive=false"])):
        assert train(checkpoint, data, tmp_path / name, "num_epochs=2", *settings) == 0
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())["accuracy"]
        assert (
            run("apply", tmp_path / name, data, "--output", tmp_path / f"{name}.npy", "--device", "cpu", "--quiet") == 0
        )
    assert found["theta"] != found["field"]


def test_a_resumed_training_has_the_same_result(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("epochs", 2):
            raise Interrupted("", signal.SIGTERM)

    config = load_predictor_config(None, [*SMALL, "num_epochs=3", "fields=null"])
    cpu = torch.device("cpu")
    train_predictor(checkpoint, str(data), config, tmp_path / "whole", cpu)
    with pytest.raises(Interrupted, match="--resume"):
        train_predictor(checkpoint, str(data), config, tmp_path / "part", cpu, progress=stop)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {"state.pt"}
    train_predictor(checkpoint, str(data), config, tmp_path / "part", cpu, resume=True)
    whole, part = (torch.load(tmp_path / name / "predictor.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(part["network"][name], value) for name, value in whole["network"].items())


def test_inputs_are_decoded_once(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.h5", seed=0, rows=50, features=False)
    cached = CachedInputs(Inputs(str(path), PredictorConfig(batch_size=16)), tmp_path)
    path.unlink()
    assert not list(tmp_path.iterdir())  # the temporary file has no name
    chosen = np.arange(50) % 3 > 0
    orders = [torch.cat([batch.index for batch in cached.shuffled(chosen, 0, epoch)]) for epoch in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert np.array_equal(np.sort(orders[2]), np.flatnonzero(chosen))
    batches = list(cached.batches(chosen))
    assert [len(batch.index) for batch in batches] == [16, 16, 1]
    again = write_data(path, seed=0, rows=50, features=False)
    with h5py.File(again) as file:
        for name, values in (
            ("parameters/params", [b.theta for b in batches]),
            ("inputs/fields", [b.field for b in batches]),
        ):
            assert np.array_equal(torch.cat(values), file[name][()][chosen].astype(np.float32))


# Training that gets SIGTERM after its second epoch is saved.
def test_an_interrupted_training_goes_on_to_the_same_result(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(checkpoint, data, tmp_path / "whole", "num_epochs=6") == 0
    save = training._Run._save

    def save_and_stop(run: training._Run) -> None:
        save(run)
        if len(run.history) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_save", save_and_stop)
        assert train(checkpoint, data, tmp_path / "part", "num_epochs=6") == 143
    assert "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "part" / "predictor.pt").exists()
    assert train(checkpoint, data, tmp_path / "part", "num_epochs=6") == 4
    assert train(checkpoint, data, tmp_path / "part", "num_epochs=6", "hidden_dim=16", extra=("--resume",)) == 2
    assert train(checkpoint, data, tmp_path / "part", "num_epochs=6", extra=("--resume",)) == 0
    whole, part = (torch.load(tmp_path / name / "predictor.pt", weights_only=True) for name in ("whole", "part"))
    assert all(torch.equal(part["network"][name], value) for name, value in whole["network"].items())


def test_levels_depend_on_the_tokens_before_them() -> None:
    config = PredictorConfig(hidden_dim=8, fields=None)
    network = TokenNetwork(InputShape(2, 0, 0), [3, 4, 3], [[], [0], []], config).eval()
    with torch.no_grad():
        network.pairs["0_1"].copy_(10.0 * torch.eye(3, 4))
    theta = torch.randn(5, 2)
    logits, tokens = network(theta, None)
    assert torch.equal(tokens[:, 1], tokens[:, 0])
    given = torch.tensor([[2, 0, 0]]).expand(5, -1)
    assert bool((network(theta, None, given)[0][1].argmax(1) == 2).all())
    assert [part.shape[1] for part in logits] == [3, 4, 3]


@pytest.mark.parametrize(
    ("changes", "status", "texts"),
    [
        ({"set": "hiden_dim=3"}, 2, ["hiden_dim", "hidden_dim"]),
        ({"set": "num_epochs=0"}, 2, ["num_epochs"]),
        ({"set": "fields=inputs/feilds"}, 3, ["inputs/feilds", "inputs/fields", "--set fields=null"]),
        ({"set": "fields=parameters/params"}, 2, ["different names"]),
        ({"set": "fields=features/summary/aggregated/features"}, 3, ["[N, C, Y, X]", "[20]"]),
        ({"set": "parameters=inputs/fields", "also": "fields=null"}, 3, ["[N, P]"]),
        ({"set": "parameters=null", "also": "fields=null"}, 2, ["both null"]),
        ({"data": "missing.h5"}, 3, ["missing.h5"]),
        ({"checkpoint": "missing"}, 3, ["missing"]),
        ({"extra": "--resume"}, 3, ["no interrupted training"]),
    ],
)
def test_wrong_input_is_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any],
    status: int, texts: list[str],
) -> None:  # fmt: skip
    settings = [changes[key] for key in ("set", "also") if key in changes]
    extra = (changes["extra"],) if "extra" in changes else ()
    where = changes.get("checkpoint", checkpoint), changes.get("data", data)
    assert train(*where, tmp_path / "out", *settings, extra=extra) == status
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert all(text in errors[0] for text in texts), errors[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_other_inputs_and_damage_are_named(
    predictor: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(tmp_path / "narrow.h5", "w") as file:
        file["parameters/params"] = np.zeros((30, 2))
        file["inputs/fields"] = np.zeros((30, 2, 8, 8))
    arguments = ("--output", tmp_path / "t.npy", "--device", "cpu", "--quiet")
    assert run("apply", predictor, tmp_path / "narrow.h5", *arguments) == 3
    assert "2 parameters" in capsys.readouterr().err
    with h5py.File(tmp_path / "narrow.h5", "a") as file:
        del file["parameters/params"]
        file["parameters/params"] = np.where(np.arange(90).reshape(30, 3) == 50, np.nan, 0.0)
    assert run("apply", predictor, tmp_path / "narrow.h5", *arguments) == 3
    assert "row 16" in capsys.readouterr().err
    assert not (tmp_path / "t.npy").exists()
    assert run("apply", tmp_path, data, *arguments) == 3
    assert "predictor.pt" in capsys.readouterr().err
    torch.save({"format": 1, "config": {"hidden_dim": "x"}}, tmp_path / "predictor.pt")
    assert run("apply", tmp_path, data, *arguments) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("dimensions", [1, 3])
def test_fields_that_extract_keeps(dimensions: int, tmp_path: Path) -> None:
    """Trajectories of one and three dimensions, from `extract --initial-fields` to predicted tokens."""
    rng = np.random.default_rng(0)
    space = (16,) if dimensions == 1 else (4, 4, 8)
    fields = np.cumsum(rng.standard_normal((40, 5, 2, *space)), 1).astype(np.float32)
    np.save(tmp_path / "fields.npy", fields)
    axes = "n t c x" if dimensions == 1 else "n t c z y x"
    arguments = [str(tmp_path / "fields.npy"), "--axes", axes, "--output", str(tmp_path / "f.h5"), "--initial-fields"]
    with pytest.raises(SystemExit) as end:
        extract_main([*arguments, "--device", "cpu", "--quiet"])
    assert not end.value.code
    with h5py.File(tmp_path / "f.h5") as file:
        assert np.array_equal(file["inputs/fields"], fields[:, 0])
    levels = [{"num_tokens": 4, "latent_dim": 4}]
    tokenizer = Tokenizer(num_epochs=1, batch_size=32, device="cpu", group_hidden_dim=8, levels=levels)
    checkpoint = tokenizer.fit(tmp_path / "f.h5", config={"families": {"summary": {}}}).save(tmp_path / "c")
    assert train(checkpoint, tmp_path / "f.h5", tmp_path / "p", "num_epochs=1", "parameters=null") == 0
    assert run("apply", tmp_path / "p", tmp_path / "f.h5", "--output", tmp_path / "t.npy", "--quiet") == 0
    assert len(np.load(tmp_path / "t.npy")) == 40
